"""Read and write what a checkpoint must hold, module by module: hooks that rename or drop entries have no say in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX as EXTRA_STATE
from torch.nn.parameter import is_lazy

from .copying import writable_
from .noted_rows import Rows
from .slimming import as_tensor_of


def weights(model: nn.Module) -> dict[str, Any]:
    """Return parameters, persistent buffers and extra states by name, those of shared modules under each name.

    In a model without hooks on its state dict this is what `state_dict()` returns.

    Example:
        >>> list(weights(model)) == list(model.state_dict())
        True
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f'{path}.' if path else ''
        for name, tensor in own_tensors(module):
            if name not in module._non_persistent_buffers_set:
                found[prefix + name] = tensor.detach()
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found[prefix + EXTRA_STATE] = module.get_extra_state()
    return found


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a module itself, by name."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, shared ones under each of their names.

    Example:
        >>> list(all_tensors(model))[:2]
        ['conv1.weight', 'conv1.bias']
    """
    modules = model.named_modules(remove_duplicate=False)
    return {f'{path}.{name}'.lstrip('.'): t for path, module in modules for name, t in own_tensors(module)}


@torch.no_grad()
def set_weights_(model: nn.Module, values: Mapping[str, Any]) -> None:
    """Write values into the tensors and the extra states of these names, in place.

    Example:
        >>> set_weights_(model, {'fc.bias': torch.ones(2)})
        >>> model.fc.bias.tolist()
        [1.0, 1.0]
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, value in values.items():
        path, _, local = name.rpartition('.')
        if local == EXTRA_STATE:
            modules[path].set_extra_state(value)
        else:
            writable_(dict(own_tensors(modules[path]))[local]).copy_(value)


def is_extra_state(name: str) -> bool:
    """Say whether an entry of a state dict is a module's extra state, which need not be a tensor."""
    return name.rpartition('.')[2] == EXTRA_STATE


class Slots:
    """Know where each tensor of a model is registered, so that another takes its place everywhere.

    It holds the tensors: the identity of one that is freed may become another's.
    """

    def __init__(self, model: nn.Module) -> None:
        self._slots: dict[Tensor, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, tensor in own_tensors(module):
                self._slots.setdefault(tensor, []).append((module, name))

    def resize_(self, tensor: Tensor, shape: Sequence[int], rows: Rows | None = None) -> None:
        """Cut a tensor to the first rows or to the given ones, or give one that waits for its first forward a shape."""
        if is_lazy(tensor):
            tensor.materialize(tuple(shape))
        elif tensor.shape != torch.Size(shape):
            value = tensor.detach()
            for dim, size in enumerate(shape):
                kept = None if rows is None else rows[dim]
                index = torch.arange(size) if kept is None else torch.tensor(kept)
                value = value.index_select(dim, index.to(value.device)) if size < value.shape[dim] else value
            new = as_tensor_of(tensor, value)
            self._slots[new] = self._slots.pop(tensor)
            for module, name in self._slots[new]:
                own: Any = module._parameters if name in module._parameters else module._buffers
                own[name] = new
