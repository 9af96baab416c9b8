"""The safety net: what is masked can be slimmed, on models that were never tried.

Combing ends with a trial: remove units at random, mask one copy, slim another, run both on the example input and
compare; once with about half of the units gone and once with a few, since some mistakes show in only one of them. The
weights are random: behind a branch that is still almost zero no mistake would show. It runs in float64, where rounding
hides nothing; a difference that the last bits of the weights explain is no mistake. Where the copies differ by more, or
where slimming or running fails, `fault_search` finds the groups at fault.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..coupling import Coupling, Keep
from ..errors import CombError, SlimError, first_line
from ..example import Example
from ..modes import InDouble
from ..nested import map_tensors, tensors_in
from ..random_state import draws
from .compare import (
    compare_gradients,
    differences,
    evaluating,
    gaps_between,
    gaps_of_gradients,
    gradient_gaps,
    gradients_of,
    moved_by_rounding,
    outputs_of,
)
from .copying import copied, discarding
from .fault_search import Fault, Watch, search
from .mask import mask_, named_tensors
from .places import raised_at
from .slimming import as_tensor_of, slim

NOISE = 1_000_003  # random numbers for all weights; a prime, so that rows repeat none
KEEPS = ((0.5, 0), (0.8, 1))  # what a trial leaves, and the seed of the choice
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
ROUNDING = 100  # a difference is a mistake from so many times what the last bits of the weights change
LARGE = 1e-2  # and from here on anyway: where rounding did that in float64, no digit would be right in float32
NOT_FINITE = 'not finite'
FAILURES = (Exception,)  # what a forward may raise


def random_keep(
    coupling: Coupling, ratio: float, seed: int, *, among: set[str] | None = None, awkward: bool = False
) -> Keep:
    """Return a keep in which a share `ratio` of each group in `among` (all by default) stays at random, one at least.

    `awkward` makes the number of kept units odd, each group's share differ by up to 0.2, and groups of one size keep
    different numbers as long as there are any, so that no two widths agree and nothing divides by chance; groups of
    three units or more keep more than one, for over one channel every statistic is right.
    """
    taken: Counter[tuple[int, int]] = Counter()
    generator = torch.Generator().manual_seed(seed)
    keep = coupling.keep()
    for group in coupling.groups:
        order = torch.randperm(group.units, generator=generator)
        share = ratio + (0.4 * float(torch.rand((), generator=generator)) - 0.2 if awkward else 0.0)
        count = max(least := min(group.units, coupling.floors[group.name]), round(share * group.units))
        if awkward:
            odd = range(3, group.units, 2) or [max(least, group.units - 1)]
            count = min(odd, key=lambda n: (taken[group.units, n], abs(n - share * group.units)))
            taken[group.units, count] += 1
        if among is None or group.name in among:
            keep[group.name][order[count:]] = False
    return keep


def randomised(model: nn.Module) -> nn.Module:
    """Return a copy in which every weight matters: unit variance over what is summed, scales and biases about one.

    Example:
        >>> twin = randomised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        >>> bool((twin[0].weight == twin[1].weight).any()), bool((twin[0].bias >= 0.5).all())
        (False, True)
    """
    return _randomise_(copied(model))


@torch.no_grad()
def _randomise_(model: nn.Module) -> nn.Module:
    noise = torch.rand(NOISE, generator=torch.Generator().manual_seed(0)) - 0.5
    begin = 0
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.numel():
            end = begin + parameter.numel()
            values = noise.expand(-(-end // NOISE), -1).reshape(-1)[begin:end].reshape(parameter.shape)
            matrix = parameter.dim() > 1
            work, by = (torch.mul, (12 / parameter[0].numel()) ** 0.5) if matrix else (torch.add, 1.0)
            work(values.to(parameter.device), by, out=parameter)
            begin = end % NOISE
    return model


def is_finite(out: object) -> bool:
    """Say whether an output has a number everywhere."""
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(out) if t.is_floating_point())


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return tensor.double() if tensor.device.type != 'mps' else tensor.cpu().double()


def doubled(model: nn.Module) -> nn.Module:
    """Return a copy of a model in float64, on the CPU where its device has none."""
    tensors = [tensor for tensor in named_tensors(model).values() if tensor.is_floating_point()]
    memo: dict[int, Any] = {id(t): as_tensor_of(t, _doubled(t.detach())) for t in tensors}
    twin = copied(model, memo)
    return twin.cpu() if any(tensor.device.type == 'mps' for tensor in tensors) else twin


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.to(torch.device('cpu') if tensor.device.type == 'mps' else tensor.device, torch.float64, copy=True)


def _in_double(example: Example) -> Example:
    def wide(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return double(value)
        return value.cpu() if value.device.type == 'mps' else value.clone()

    also = tuple(InDouble(each) for each in example.also)
    return Example(map_tensors(example.inputs, wide), InDouble(example.forward), also)


def in_double(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return copies in float64, on the CPU where the device has none, or as they are where they do not run in it."""
    with discarding(model) as failed:
        try:
            failed.append(twin := doubled(model))
            tried = _in_double(example)
            with evaluating(twin):
                if is_finite(tried.run_all(twin)):
                    failed.clear()
                    return twin, tried
        except FAILURES:
            pass
    return copied(model), example


# -- the trial ---------------------------------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """What a trial found."""

    faults: dict[str, str]  # the groups that cannot be slimmed, with the reason
    untried: str = ''  # why none could be held


@dataclass(frozen=True)
class _Trial:
    """A model to try, as which kind of copy, and whether gradients are compared too.

    Each comparison makes one copy, slims it and then masks it in place: no more is in memory at a time, but for weights
    to put back where a small difference is looked into.
    """

    model: nn.Module
    combed: Coupling
    wide: bool  # in float64
    random: bool  # with random weights
    gradients: bool

    @cached_property
    def coupling(self) -> Coupling:
        return replace(self.combed, example=_in_double(self.combed.example)) if self.wide else self.combed

    def copy(self) -> nn.Module:
        twin = (doubled if self.wide else copied)(self.model)
        return _randomise_(twin) if self.random else twin

    def fault(self, among: Collection[str], watched: bool = False) -> Fault | None:
        """Return why pruning these groups fails, and which are suspects where it is watched, or None if it works."""
        for keep in (random_keep(self.combed, *each, among=set(among), awkward=True) for each in KEEPS):
            watch = Watch(self.coupling, keep) if watched else None
            with discarding(self.model) as copies:
                try:
                    why = self._difference(keep, watch, copies)
                except (torch.cuda.OutOfMemoryError, MemoryError):
                    raise
                except FAILURES as error:
                    why = _failure(error)
                    if watch is not None and isinstance(error, SlimError) and error.module is not None:
                        watch.place = error.module
            if why is not None:
                return Fault(why, watch.suspects() if watch is not None else frozenset())
        return None

    def _difference(self, keep: Keep, watch: Watch | None, copies: list[nn.Module]) -> str | None:
        copies.append(masked := self.copy())
        copies.append(small := slim(masked, self.coupling, keep))
        example = self.coupling.example
        mask_(masked, self.coupling, keep)
        tolerance = TOLERANCE.get(next((p.dtype for p in masked.parameters()), torch.float32), 1e-3)
        with watch.observing(masked, small, tolerance) if watch is not None else nullcontext():
            gaps = gaps_between(masked, small, example)
        moved = partial(moved_by_rounding, masked, partial(outputs_of, masked, example), differences)
        if (gap := unexplained(gaps, tolerance, moved)) > 0:
            why = f'a trial failed: the slimmed model differs from the masked one by {gap:.1e}'
            if math.isinf(gap):
                why = 'a trial failed: an output has no number where units go, as if something divided by them'
            with evaluating(masked):
                drawn = draws(lambda: example.forward(masked, *example.inputs))
            return f'{why}; the forward draws random numbers, whose count must not depend on a width' if drawn else why
        slopes = gaps_of_gradients(masked, small, self.coupling, keep) if self.gradients else {}

        def steeper() -> list[float]:
            by = moved_by_rounding(masked, partial(gradients_of, masked, example), gradient_gaps)
            return [by[name] for name in slopes]

        if (slope := unexplained(list(slopes.values()), 10 * tolerance, steeper)) > 0:
            return (
                f'a trial failed: gradients of the slimmed model differ from those of the masked one by {slope:.1e}: a '
                'backward of its own, or a recomputation, goes over all channels'
            )
        return None

    def error(self) -> str | None:
        """Return why the model itself fails, with all units, or None where it does not."""
        with discarding(self.model) as copies:
            try:
                copies.append(dense := self.copy())
                with evaluating(dense):
                    finite = is_finite(self.coupling.example.run_all(dense))
                if finite and self.gradients:
                    finite = math.isfinite(compare_gradients(dense, self.coupling, self.coupling.keep()))
                return None if finite else NOT_FINITE
            except FAILURES as error:
                return f'{type(error).__name__}: {first_line(error)}'


def unexplained(gaps: list[float], tolerance: float, moved: Callable[[], list[float]]) -> float:
    """Return the largest difference that is no rounding, 0 where there is none.

    Args:
        gaps: the differences of some tensors.
        tolerance: up to which they are rounding.
        moved: returns how far the last bits of the weights move each tensor; asked only where a gap is small but above
            the tolerance.

    Example:
        >>> unexplained([1e-7, 1e-8], 1e-9, lambda: [1e-8, 1e-12])
        1e-08
    """
    worst = max(gaps, default=0.0)
    if worst <= tolerance:
        return 0.0
    if worst >= LARGE:
        return worst
    pairs = zip(gaps, moved(), strict=True)
    return max((gap for gap, by in pairs if gap > max(tolerance, ROUNDING * by)), default=0.0)


def _failure(error: Exception) -> str:
    text = first_line(error)
    named = text if isinstance(error, SlimError) else f'{type(error).__name__}: {text}{raised_at(error)}'
    return f'a trial failed: {named}'


def _try(model: nn.Module, coupling: Coupling, gradients: bool) -> tuple[_Trial, Fault | None]:
    """Try all groups at once: in float64, with random weights, with gradients; or as far as the model runs so.

    Whether it does is asked only where a trial with random weights fails: most models run once less.

    Returns:
        The trial, and why it failed, or None.

    Raises:
        CombError: the output is not finite, so that nothing could be compared.
        _Untried: a copy of the model fails by itself.
    """
    names = [group.name for group in coupling.groups]
    ways = [_How(True, gradients), _How(False, gradients), _How(False, False)][: 3 if gradients else 2]
    error: str | None = None
    for trial in (_Trial(model, coupling, wide, *way) for wide in (True, False) for way in ways):
        if not trial.random and (error := trial.error()) is not None:
            continue
        fault = trial.fault(names)
        if fault is None or not trial.random or (error := trial.error()) is None:
            return trial, fault
    if error == NOT_FINITE:
        raise CombError('the output on the example input is not finite; give an input, or weights, for which it is')
    raise _Untried(f'a copy of the dense model fails as well ({error})')


class _How(NamedTuple):
    """How far a trial goes."""

    random: bool
    gradients: bool


class _Untried(Exception):
    """No trial could be held; the message says why."""


def disagreement(model: nn.Module, coupling: Coupling, forward: Callable[..., object]) -> str | None:
    """Return why another forward than the one that was combed cannot be run on the slimmed model, or None if it can.

    Example:
        >>> disagreement(model, coupling, lambda model, images: model(images).relu()) is None
        True
    """
    try:
        tried = replace(coupling, example=Example(coupling.example.inputs, forward))
        fault = _try(model, tried, False)[1] if coupling.groups else None
        return None if fault is None else fault.reason
    except _Untried as error:
        return str(error)


def trial_of(model: nn.Module, coupling: Coupling, *, gradients: bool = False) -> Outcome:
    """Find the groups that cannot be slimmed, by trying.

    Args:
        model: the model that was combed.
        coupling: what combing found.
        gradients: compare gradients too: for models with a backward of their own.

    Raises:
        CombError: if the model's output on the example input is not finite, so that nothing could be compared.

    Example:
        >>> trial_of(model, coupling)
        Outcome(faults={}, untried='')
    """
    if not coupling.groups:
        return Outcome({})
    if any(tensor.is_meta for tensor in named_tensors(model).values()):
        return Outcome({}, 'tensors on the meta device have no values to compare')
    try:
        trial, fault = _try(model, coupling, gradients)
    except _Untried as error:
        return Outcome({}, str(error))
    return Outcome({} if fault is None else search([group.name for group in coupling.groups], trial.fault))
