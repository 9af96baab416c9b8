"""Find the groups at fault after a failed trial, in fewer trials than bisection of all groups takes.

A slimmed model goes wrong somewhere. The groups near the first module whose output differs from the masked model's, or
near the one that raises, are suspects. They are put aside until the rest passes; bisection then tells who is at fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..coupling import Coupling, Keep
from ..nested import tensors_in
from .compare import difference


class Fault(NamedTuple):
    """Why a trial failed, and which groups it may be due to; none where that is not known."""

    reason: str
    suspects: frozenset[str] = frozenset()


def search(names: Sequence[str], fault_of: Callable[[Collection[str], bool], Fault | None]) -> dict[str, str]:
    """Return the groups at fault, with reasons; all others can be pruned together.

    Args:
        names: groups that fail together.
        fault_of: `fault_of(groups, watched)` holds a trial of some groups; suspects are named where it is watched.

    Example:
        >>> search(['a', 'b', 'c'], lambda groups, watched: Fault('wrong') if 'b' in groups else None)
        {'b': 'wrong'}
    """
    rest, suspects, reason = list(names), list[str](), ''
    while rest and (fault := fault_of(rest, True)) is not None:
        reason = fault.reason
        found = [name for name in rest if name in fault.suspects] or rest
        suspects += found
        rest = [name for name in rest if name not in found]

    if not suspects and (unseen := fault_of(rest, False)) is not None:  # watching hid it
        suspects, reason, rest = rest, unseen.reason, []
    return _bisect(suspects, reason, rest, fault_of) if suspects else {}


def _bisect(
    candidates: Sequence[str],
    reason: str,
    rest: list[str],
    fault_of: Callable[[Collection[str], bool], Fault | None],
) -> dict[str, str]:
    """Return which of these groups fail beside the rest, with reasons; the others join the rest."""
    if len(candidates) == 1:
        return {candidates[0]: reason}
    faults: dict[str, str] = {}
    for half in (candidates[: len(candidates) // 2], candidates[len(candidates) // 2 :]):
        if (fault := fault_of([*rest, *half], False)) is None:
            rest.extend(half)
        else:
            faults |= _bisect(half, fault.reason, rest, fault_of)
    return faults


class _Call(NamedTuple):
    """One call of a module: its path, and how often it ran before."""

    module: str
    number: int


class Watch:
    """Compare a slimmed model with the masked one module by module, in the order in which they end.

    Args:
        coupling: what combing found.
        keep: what both were made with.
    """

    def __init__(self, coupling: Coupling, keep: Keep) -> None:
        self.coupling = coupling
        self.place: str | None = None  # the module that raised, or that differs first
        self.shapes: list[torch.Size] = []  # of what it was given
        self._inputs: dict[_Call, list[torch.Size]] = {}
        self._outputs: dict[_Call, list[Tensor]] = {}
        flat = coupling.flat(keep)
        self._kept = [(units < 0) | flat[units.clip(min=0)] for units in coupling.axes]
        self._scaled = {rows.tensor.rpartition('.')[0] for scale in coupling.fixes.scales for rows in scale.rows}

    @contextmanager
    def observing(self, masked: nn.Module, small: nn.Module, tolerance: float) -> Iterator[None]:
        """Watch the slimmed model, which runs first, and then the masked one."""
        with self._slimmed(small), self._masked(masked, tolerance):
            yield

    @contextmanager
    def _slimmed(self, model: nn.Module) -> Iterator[None]:
        """Keep the outputs of all modules, and where one raises: that module, or the one in it that ended last."""
        running: list[_Call] = []
        ended: list[_Call] = []
        counts: Counter[str] = Counter()

        def enter(path: str, args: Any) -> None:
            running.append(_Call(path, counts[path]))
            counts[path] += 1
            self._inputs[running[-1]] = [tensor.shape for tensor in tensors_in(args)]

        def leave(path: str, out: Any) -> None:
            ended.append(running.pop())
            self._outputs[ended[-1]] = [tensor.detach().clone() for tensor in tensors_in(out)]

        with _hooked(model, enter, leave):
            try:
                yield
            except Exception:
                if running:
                    self.place, self.shapes = running[-1].module, self._inputs[running[-1]]
                    if ended and ended[-1].module.startswith(self.place and f'{self.place}.'):
                        self.place = ended[-1].module
                        self.shapes = [tensor.shape for tensor in self._outputs[ended[-1]]]
                raise

    @contextmanager
    def _masked(self, model: nn.Module, tolerance: float) -> Iterator[None]:
        """Find the first module whose output differs."""
        running: list[_Call] = []
        counts: Counter[str] = Counter()

        def enter(path: str, args: Any) -> None:
            running.append(_Call(path, counts[path]))
            counts[path] += 1

        def leave(path: str, out: Any) -> None:
            call = running.pop()
            ours, theirs = tensors_in(out), self._outputs.get(call)
            if self.place is not None or path in self._scaled or theirs is None or len(ours) != len(theirs):
                return
            if not all(map(partial(self._agree, tolerance), ours, theirs)):
                self.place, self.shapes = path, self._inputs[call]

        with _hooked(model, enter, leave):
            yield

    def _agree(self, tolerance: float, masked: Tensor, slimmed: Tensor) -> bool:
        """Say whether an output is the kept part of another, or where it is not known which part that is."""
        if masked.dim() != slimmed.dim():
            return True
        dims = [dim for dim, (n, k) in enumerate(zip(masked.shape, slimmed.shape, strict=True)) if n != k]
        choices = [self._kept_of(masked.shape[dim], slimmed.shape[dim]) for dim in dims]
        gaps: list[float] = []
        for chosen in product(*choices):
            part = masked.detach()
            for dim, kept in zip(dims, chosen, strict=True):
                part = part.index_select(dim, torch.from_numpy(kept.nonzero()[0]).to(part.device))
            gaps.append(difference(part, slimmed))
            if gaps[-1] <= tolerance:
                return True
        return not gaps

    def _kept_of(self, width: int, live: int) -> list[np.ndarray]:
        """Return which positions are kept of the axes that have so many and keep so many; different ones only."""
        fitting = [kept for kept in self._kept if len(kept) == width and int(kept.sum()) == live]
        return list({kept.tobytes(): kept for kept in fitting}.values())

    def suspects(self) -> frozenset[str]:
        """Return the groups that have rows in the module found, or those that come to it where it has none."""
        if self.place is None:
            return frozenset()
        below = f'{self.place}.' if self.place else ''
        own = {g.name for g in self.coupling.groups if any(m.tensor.startswith(below) for m in g.members)}
        return frozenset(own or self._given())

    def _given(self) -> Iterator[str]:
        """Yield the groups that may be axes of what the module found was given, by their sizes."""
        ends = np.cumsum([group.units for group in self.coupling.groups])
        sizes = {size for shape in self.shapes for size in shape}
        for units, kept in zip(self.coupling.axes, self._kept, strict=True):
            if not kept.all() and int(kept.sum()) in sizes:
                for number in np.unique(np.searchsorted(ends, units[units >= 0], side='right')):
                    yield self.coupling.groups[number].name


@contextmanager
def _hooked(model: nn.Module, enter: Callable[[str, Any], None], leave: Callable[[str, Any], None]) -> Iterator[None]:
    """Call `enter(path, arguments)` and `leave(path, output)` around each module."""
    with ExitStack() as stack:
        for path, module in model.named_modules():

            def before(_m: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                enter(path, [args, kwargs])

            def after(_m: nn.Module, _a: Any, out: Any, path: str = path) -> None:
                leave(path, out)

            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        yield
