"""Look at the outputs of named modules while a model runs."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import first_line
from ..names import near
from ..nested import tensors_in
from .forwards import Call, watching


@dataclass(frozen=True)
class Tap:
    """Where to look: a module, and which part of what it takes or gives.

    Written as `'backbone.layer4'` (its output, of several the last), `'backbone:0'` (output 0 of several), `'neck:*'`
    (all of its outputs), or `'decode_head.conv_seg:in'` (its first input).

    Example:
        >>> Tap.parse('fc:in', model)
        Tap(module='fc', part='in')
    """

    module: str
    part: int | str | None = None  # an index, 'in', '*', or None

    @staticmethod
    def parse(name: str, model: nn.Module) -> Tap:
        """Read a tap's name and find its module.

        Raises:
            ValueError: If the model has no such module, or the part is neither 'in' nor '*' nor an integer.
        """
        path, _, part = name.partition(':')
        modules = dict(model.named_modules(remove_duplicate=False))
        if not path or path not in modules:
            raise ValueError(
                f'tap {name!r}: {type(model).__name__} has no module {path!r}; near: {near(path, modules)}'
            )
        if part in ('', 'in', '*'):
            return Tap(path, part or None)
        try:
            return Tap(path, int(part))
        except ValueError as error:
            raise ValueError(f"tap {name!r}: after ':' comes an index into its outputs, '*' or 'in'") from error


def expanded(pattern: str, model: nn.Module) -> list[str]:
    """Return the taps that a pattern names, in the model's order: each `*` stands for one part of a module's path.

    Example:
        >>> expanded('conv*:in', model)
        ['conv1:in', 'conv2:in']

    Raises:
        ValueError: If no module's path is like it.
    """
    path, colon, part = pattern.partition(':')
    if '*' not in path:
        return [pattern]
    like = re.compile(re.escape(path).replace(r'\*', r'[^.]*'))
    found = [name for name, _ in model.named_modules(remove_duplicate=False) if name and like.fullmatch(name)]
    if not found:
        paths = [name for name, _ in model.named_modules()]
        raise ValueError(f'tap {pattern!r}: no module of {type(model).__name__} is like it; near: {near(path, paths)}')
    return [f'{name}{colon}{part}' for name in found]


class Reached(Exception):
    """Stop a forward when all taps have seen what they look for."""


class Taps:
    """Capture what the named taps of a model give (or take) during one forward, in the order of the calls.

    A tap has several outputs where its module is called several times, as a head's layers are for each level of a
    pyramid, or gives several and the tap takes all of them. What is captured are copies: modules after the tap may work
    in place. Memory: one more tensor per output.

    Raises:
        ValueError: If a name is not known.

    Example:
        >>> with Taps(model, ['fc:in']) as taps:
        ...     _ = model(images)
        >>> [output.shape for output in taps['fc:in']]
        [torch.Size([2, 4])]
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self.taps = {name: Tap.parse(name, model) for name in names}
        self.seen: dict[str, list[Tensor]] = {}
        self.stop_at: Mapping[str, int] = {}
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
            if tap.module == call.module and (tap.part == 'in') == of_input:
                chosen = [each.clone() for each in _choose(name, tap, value)]
                self.seen.setdefault(name, []).extend(chosen)
        if self.stop_at and all(len(self.seen.get(name, ())) >= number for name, number in self.stop_at.items()):
            raise Reached

    def __getitem__(self, name: str) -> list[Tensor]:
        """Return what a tap saw, one tensor or several.

        Raises:
            ValueError: If the forward never called the module.
        """
        if name not in self.seen:
            raise ValueError(
                f'tap {name!r}: {type(self.model).__name__} did not call {self.taps[name].module!r} in this '
                'forward; tap a module that runs in it'
            )
        return self.seen[name]

    def run(self, *inputs: Any, outputs: Mapping[str, int] | None = None, **kwargs: Any) -> dict[str, list[Tensor]]:
        """Run the model, and return what the taps saw; with the number of `outputs` of each no further than to these.

        What fails after all taps have seen something ends the run, with a warning; being out of memory never does.

        Raises:
            ValueError: If the forward never called a tap's module.
        """
        self.stop_at = outputs or {}
        try:
            with suppress(Reached), self:
                self.model(*inputs, **kwargs)
        except Exception as error:
            if self.seen.keys() < self.taps.keys() or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            counts = ', '.join(f'{name} (x{len(seen)})' for name, seen in self.seen.items())
            logging.getLogger('mmcpd').warning(
                f'{type(self.model).__name__} fails after its taps {counts}, what they have seen is taken: '
                f'{type(error).__name__}: {first_line(error)}'
            )
        finally:
            self.stop_at = {}
        return {name: self[name] for name in self.taps}


def _choose(name: str, tap: Tap, value: Any) -> list[Tensor]:
    """Find the tensors that a tap means in what a module takes or gives: all of them, or one."""
    if tap.part == '*':
        tensors = list(tensors_in(value))
    elif isinstance(tap.part, int):
        if not isinstance(value, tuple | list) or not -len(value) <= tap.part < len(value):
            got = f'{len(value)} outputs' if isinstance(value, tuple | list) else f'one {type(value).__name__}'
            raise ValueError(f'tap {name!r}: {tap.module!r} gives {got}, there is no output {tap.part}')
        tensors = [each for each in [value[tap.part]] if isinstance(each, Tensor)]
    else:
        given = [each for each in (value if isinstance(value, tuple | list) else [value]) if isinstance(each, Tensor)]
        tensors = given[:1] if tap.part == 'in' else given[-1:]
    if not tensors:
        raise ValueError(
            f'tap {name!r}: {tap.module!r} has no tensor there, but {type(value).__name__}; tap a module '
            f"inside it, or choose one of its outputs by index, as in '{tap.module}:0'"
        )
    return tensors
