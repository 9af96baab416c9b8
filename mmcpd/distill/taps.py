"""Look at the outputs of named modules while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..names import near

# Where classifiers keep their last layer: what the tap 'logits' stands for, the first that a model has.
LOGITS = (
    'decode_head.conv_seg',  # mmseg
    'decode_head.fc_seg',  # mmseg, point heads
    'head.fc',  # mmpretrain
    'head.layers.head',  # mmpretrain, vision transformers
    'head.head',
    'fc',  # torchvision
    'classifier',
)


@dataclass(frozen=True)
class Tap:
    """Where to look: a module, and which part of what it takes or gives.

    Written as `'backbone.layer4'` (its output, of several the last), `'backbone:0'` (output 0 of several), or
    `'decode_head.conv_seg:in'` (its first input). `'logits'` is the last layer of the usual classifiers.

    Example:
        >>> Tap.parse('fc:in', model)
        Tap(module='fc', part='in')
    """

    module: str
    part: int | str | None = None  # an index, 'in', or None

    @staticmethod
    def parse(name: str, model: nn.Module) -> Tap:
        """Read a tap's name and find its module.

        Raises:
            ValueError: If the model has no such module, or the part is neither 'in' nor an integer.
        """
        path, _, part = name.partition(':')
        modules = dict(model.named_modules())
        if path == 'logits' and path not in modules:
            path = next((known for known in LOGITS if known in modules), '')
            if not path:
                raise ValueError(
                    f"tap 'logits': {type(model).__name__} has none of {', '.join(LOGITS)}; name the module "
                    'that computes the logits'
                )
        if not path or path not in modules:
            raise ValueError(
                f'tap {name!r}: {type(model).__name__} has no module {path!r}; near: {near(path, modules)}'
            )
        if part in ('', 'in'):
            return Tap(path, part or None)
        try:
            return Tap(path, int(part))
        except ValueError as error:
            raise ValueError(f"tap {name!r}: after ':' comes an index into its outputs, or 'in'") from error


class Reached(Exception):
    """Stop a forward when all taps have seen what they look for."""


class Taps:
    """Capture what the named taps of a model give (or take) during one forward, of several calls the first.

    What is captured is a copy: modules after the tap may work in place. Memory: one more tensor per tap.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> with Taps(model, ['fc:in']) as taps:
        ...     _ = model(images)
        >>> taps['fc:in'].shape
        torch.Size([2, 4])
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.taps = {name: Tap.parse(name, model) for name in names}
        self.seen: dict[str, Tensor] = {}
        self.stop = False
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Taps:
        self.seen.clear()
        modules = dict(self.model.named_modules())
        for name, tap in self.taps.items():
            module, hook = modules[tap.module], partial(self._see, name, tap)
            self._handles.append(
                module.register_forward_pre_hook(hook) if tap.part == 'in' else module.register_forward_hook(hook)
            )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _see(self, name: str, tap: Tap, module: nn.Module, *passed: Any) -> None:
        """Keep what a hook was passed last: a module's inputs before its forward, its output after."""
        if name not in self.seen:
            self.seen[name] = _choose(name, tap, passed[-1]).clone()
        if self.stop and len(self.seen) == len(self.taps):
            raise Reached

    def __getitem__(self, name: str) -> Tensor:
        """Return what a tap saw.

        Raises:
            ValueError: If the forward never called the module.
        """
        if name not in self.seen:
            raise ValueError(
                f'tap {name!r}: {type(self.model).__name__} did not call {self.taps[name].module!r} in this '
                'forward; tap a module that runs in it'
            )
        return self.seen[name]

    def run(self, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Run the model as far as the taps need, and return what they saw.

        Raises:
            ValueError: If the forward never called a tap's module.
        """
        self.stop = True
        try:
            with suppress(Reached), self:
                self.model(*inputs, **kwargs)
        finally:
            self.stop = False
        return {name: self[name] for name in self.taps}


def _choose(name: str, tap: Tap, value: Any) -> Tensor:
    """Find the tensor that a tap means in what a module takes or gives."""
    if isinstance(tap.part, int):
        if not isinstance(value, (tuple, list)) or not -len(value) <= tap.part < len(value):
            got = f'{len(value)} outputs' if isinstance(value, (tuple, list)) else f'one {type(value).__name__}'
            raise ValueError(f'tap {name!r}: {tap.module!r} gives {got}, there is no output {tap.part}')
        value = value[tap.part]
    elif isinstance(value, (tuple, list)):
        tensors = [item for item in value if isinstance(item, Tensor)]
        value = tensors[0 if tap.part == 'in' else -1] if tensors else value
    if not isinstance(value, Tensor):
        raise ValueError(
            f'tap {name!r}: {tap.module!r} has no tensor there, but {type(value).__name__}; tap a module '
            f"inside it, or choose one of its outputs by index, as in '{tap.module}:0'"
        )
    return value
