"""Modules that compute channels without a weight, as encodings of positions do: they give out those that are kept.

What such a module computes is added to channels of layers. So it gets a buffer with the numbers of the channels that it
gives out, which masking and slimming cut as any other tensor, and a hook that picks them from its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..fixes import ComputedChannels
from .layout import gathered

CHANNELS = 'kept_channels'  # the buffer's name


def buffer_name(path: str) -> str:
    """Return the name of the buffer of the module at a path."""
    return f'{path}.{CHANNELS}'


class GiveKept:
    """A forward hook: of a module's output, only the channels whose numbers are in its buffer.

    Args:
        dim: the dimension of the channels.
        width: how many the module computes.
    """

    def __init__(self, dim: int, width: int) -> None:
        self.dim, self.width = dim, width

    def __call__(self, module: nn.Module, _: Any, out: Tensor) -> Tensor:
        return gathered(out, self.dim, module.get_buffer(CHANNELS).to(out.device))


def computed_channels(model: nn.Module) -> tuple[ComputedChannels, ...]:
    """Return which modules of a model give out only kept channels.

    Example:
        >>> model.noise = nn.Identity()
        >>> give_kept_(model, [ComputedChannels('noise', 1, 8)])
        >>> computed_channels(model), model.noise(torch.ones(1, 8)).shape
        ((ComputedChannels(module='noise', dim=1, width=8),), torch.Size([1, 8]))
    """
    hooks = ((path, hook_of(module)) for path, module in model.named_modules())
    return tuple(ComputedChannels(path, hook.dim, hook.width) for path, hook in hooks if hook is not None)


def hook_of(module: nn.Module) -> GiveKept | None:
    """Return the hook of a module that gives out only kept channels, or None."""
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, GiveKept)), None)


def give_kept_(model: nn.Module, found: Iterable[ComputedChannels]) -> None:
    """Let modules give out only their kept channels, at first all; those that do already stay as they are."""
    for each in found:
        module = model.get_submodule(each.module)
        if hook_of(module) is None:
            module.register_buffer(CHANNELS, torch.arange(each.width, device=_device(model)), persistent=False)
            module.register_forward_hook(GiveKept(each.dim, each.width))


def all_channels(computed: Mapping[str, Mapping[str, int]]) -> dict[str, Tensor]:
    """Return the buffers of modules that give out all channels, by name, for the entries of a structure."""
    return {buffer_name(path): torch.arange(entry['width']) for path, entry in computed.items()}


def give_all_(model: nn.Module, paths: Iterable[str]) -> None:
    """Let modules give out all that they compute again."""
    for module in map(model.get_submodule, paths):
        delattr(module, CHANNELS)
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, GiveKept)]:
            del module._forward_hooks[key]


def _device(model: nn.Module) -> torch.device:
    return next((tensor.device for tensor in model.parameters()), torch.device('cpu'))
