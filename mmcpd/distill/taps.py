"""Look at the outputs of named modules while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..names import near
from .forwards import Call, watching


@dataclass(frozen=True)
class Tap:
    """Where to look: a module, and which part of what it takes or gives.

    Written as `'backbone.layer4'` (its output, of several the last), `'backbone:0'` (output 0 of several), or
    `'decode_head.conv_seg:in'` (its first input).

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
        modules = dict(model.named_modules(remove_duplicate=False))
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
        self._watching: AbstractContextManager[None] | None = None

    def __enter__(self) -> Taps:
        self.seen.clear()
        self._watching = watching(
            {tap.module: self.model.get_submodule(tap.module) for tap in self.taps.values()}, self._after, self._before
        )
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._watching is not None:
            self._watching.__exit__(*error)

    def _before(self, call: Call) -> None:
        self._see(call, (*call.args, *call.kwargs.values()), of_input=True)

    def _after(self, call: Call) -> None:
        self._see(call, call.output, of_input=False)

    def _see(self, call: Call, value: Any, of_input: bool) -> None:
        for name, tap in self.taps.items():
            if tap.module == call.module and (tap.part == 'in') == of_input and name not in self.seen:
                self.seen[name] = _choose(name, tap, value).clone()
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
