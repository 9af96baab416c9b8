"""When units go, how many, and which: the pruning curve, the choice under floors, and what can be reached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..cost import COSTS
from ..errors import PruneError
from ..names import look_up, match

if TYPE_CHECKING:
    from ..comb.groups import Coupling

Keep = dict[str, Tensor]

# Name -> share of the way from dense to the target that is still to go, at progress t in [0, 1].
CURVES: dict[str, Callable[[float], float]] = {
    'linear': lambda t: 1 - t,
    'cubic': lambda t: (1 - t) ** 3,
    'cosine': lambda t: (1 + math.cos(math.pi * t)) / 2,
    'paper': lambda _: 0.0,  # a fixed number of units per event, down to the target
}
METRICS = dict.fromkeys((*COSTS, 'units'))


@dataclass(frozen=True)
class Schedule:
    """Say at which iterations units go, and what share of the metric may be left afterwards.

    Iterations are finished ones: the first event is `interval` iterations after `begin`, the last at `end`.

    Args:
        begin, end: iterations (int), or a share of the run (float in [0, 1]).
        interval: iterations between two events.
        target: share of the dense model's metric that **remains** at `end`, 0 < target < 1.
        metric: `macs`, `params`, `memory` or `units`.
        curve: `cubic` (fast first), `linear`, `cosine`, or `paper` (`units_per_event` at each event).
        units_per_event: for `paper` alone: so many units go, until the metric is at the target.

    Raises:
        ValueError: an argument that makes no sense.

    Source: cubic: Zhu and Gupta, To prune, or not to prune, 2017, equation 1; paper: CPD's greedy removal.

    Example:
        >>> plan = Schedule(begin=0.25, end=0.75, interval=10, target=0.5).resolve(400)
        >>> plan.due(110), plan.due(111), plan.ratio(300)
        (True, False, 0.5)
    """

    begin: int | float
    end: int | float
    interval: int
    target: float
    metric: str = 'macs'
    curve: str = 'cubic'
    units_per_event: int | None = None

    def __post_init__(self) -> None:
        look_up(METRICS, self.metric, 'metric')
        look_up(CURVES, self.curve, 'curve')
        if not 0 < self.target < 1:
            raise ValueError(f'target is the share of {self.metric} that remains, between 0 and 1: got {self.target}')
        if isinstance(self.interval, bool) or not isinstance(self.interval, int) or self.interval < 1:
            raise ValueError(f'interval counts iterations, at least 1: got {self.interval}')
        for name, value in (('begin', self.begin), ('end', self.end)):
            if value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f'{name} is an iteration (int) or a share of the run (float in [0, 1]): got {value}')
        if type(self.begin) is type(self.end) and self.begin >= self.end:
            raise ValueError(f'pruning begins at {self.begin}, so it cannot end at {self.end}')
        if (self.curve == 'paper') != (self.units_per_event is not None):
            raise ValueError("units_per_event belongs to curve='paper', and that curve needs it")
        if self.units_per_event is not None and self.units_per_event < 1:
            raise ValueError(f'units_per_event is at least 1: got {self.units_per_event}')

    def resolve(self, iterations: int) -> Schedule:
        """Return the schedule with `begin` and `end` in iterations of a run that has so many.

        Raises:
            ValueError: pruning would not end within the run.
        """
        begin, end = (
            round(value * iterations) if isinstance(value, float) else value for value in (self.begin, self.end)
        )
        if not begin < end <= iterations:
            raise ValueError(
                f'pruning from iteration {begin} to {end} does not fit into a run of {iterations}: '
                'mend begin and end, or train longer'
            )
        return replace(self, begin=begin, end=end)

    def due(self, iteration: int) -> bool:
        """Tell whether units go after so many finished iterations."""
        begin, end = self._resolved()
        return begin < iteration <= end and ((iteration - begin) % self.interval == 0 or iteration == end)

    def ratio(self, iteration: int) -> float:
        """Return the share of the metric that may remain after so many finished iterations."""
        begin, end = self._resolved()
        if iteration <= begin:
            return 1.0
        to_go = CURVES[self.curve](min(1.0, (iteration - begin) / (end - begin)))
        return self.target + (1 - self.target) * to_go

    def events(self) -> int:
        """Return how many times units go."""
        begin, end = self._resolved()
        return math.ceil((end - begin) / self.interval)

    def _resolved(self) -> tuple[int, int]:
        if isinstance(self.begin, float) or isinstance(self.end, float):
            raise ValueError('begin or end is a share of the run: call resolve(iterations) first')
        return self.begin, self.end


def share(comb: Coupling, keep: Keep, metric: str) -> float:
    """Return what is left of a metric under `keep`, as a share of the dense model's.

    Example:
        >>> share(c, c.keep(), "macs")
        1.0
    """
    look_up(METRICS, metric, 'metric')
    return _metric(comb, comb.flat(keep), metric) / _metric(comb, comb.flat(comb.keep()), metric)


def select(
    scores: dict[str, Tensor],
    comb: Coupling,
    keep: Keep,
    ratio: float,
    metric: str = 'macs',
    min_units: int = 1,
    round_to: int = 1,
    ignore: Sequence[str] = (),
    limit: int | None = None,
) -> Keep:
    """Choose the units that go: the lowest-scored, as few as bring the metric down to `ratio`.

    Units are taken in chunks of `round_to`, ordered by the chunk's mean score, ties in the order of groups.
    The search halves the list of chunks, with the closed-form cost at each trial: about 15 for a ResNet-50.

    Args:
        scores: one tensor (units,) per group, already normalised; those left alone need none.
        comb: what belongs together.
        keep: the units that stay now; it is not changed.
        ratio: share of the dense model's metric that may be left.
        metric: `macs`, `params`, `memory` or `units`.
        min_units: units that stay in each group, at least one; a smaller group is left alone.
        round_to: groups with more units than this keep a multiple of it.
        ignore: shell-style patterns of group names that are left alone.
        limit: at most this many units go; a chunk is not broken, so at least one chunk goes.

    Returns:
        A new keep.

    Raises:
        PruneError: the floors do not allow as little as `ratio`, and there is no `limit`.

    Example:
        >>> keep = select(normalize(score.scores(), c, keep), c, keep, ratio=0.9, round_to=8)
    """
    steps = _steps(comb, keep, min_units, round_to, ignore)
    if share(comb, keep, metric) <= ratio:
        return {name: k.clone() for name, k in keep.items()}
    order, ends = _order(scores, comb, keep, steps)
    if limit is not None:
        ends = ends[: max(1, int((ends <= limit).sum()))]
    live = comb.flat(keep)
    goal = ratio * _metric(comb, comb.flat(comb.keep()), metric)

    def left(chunks: int) -> int:
        """Return the metric with the first chunks gone."""
        trial = live.copy()
        trial[order[: ends[chunks - 1]]] = False
        return _metric(comb, trial, metric)

    low, high = 0, len(ends)  # the metric is above the goal with `low` chunks gone, not above with `high`
    if high == 0 or left(high) > goal:
        if limit is None or high == 0:
            lowest = reachable(comb, metric, min_units, round_to, ignore)
            raise PruneError(f'{metric} cannot go down to {ratio:.4f} of the dense model, only to {lowest:.4f}')
        low = high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if left(middle) <= goal else (middle, high)
    live[order[: ends[high - 1]]] = False
    parts = np.split(live, list(comb.start.values())[1:])
    return {group.name: torch.from_numpy(part.copy()) for group, part in zip(comb.groups, parts, strict=True)}


def reachable(
    comb: Coupling, metric: str = 'macs', min_units: int = 1, round_to: int = 1, ignore: Sequence[str] = ()
) -> float:
    """Return the lowest share of the metric that the floors of `select` allow.

    Example:
        >>> reachable(c, "macs", round_to=8)
        0.0121
    """
    keep = comb.keep()
    steps = _steps(comb, keep, min_units, round_to, ignore)
    stay = {name: (numbers[-1] if numbers else len(keep[name])) for name, numbers in steps.items()}
    return share(comb, {name: torch.arange(len(k)) < stay[name] for name, k in keep.items()}, metric)


def check_reachable(
    comb: Coupling, schedule: Schedule, min_units: int = 1, round_to: int = 1, ignore: Sequence[str] = ()
) -> None:
    """Refuse a target that no choice of units can meet, before any training.

    Raises:
        PruneError: no prunable group, a target below the range, or (curve `paper`) too few events.

    Example:
        >>> check_reachable(c, Schedule(0, 100, 10, target=0.5), round_to=8)
    """
    if not any(_steps(comb, comb.keep(), min_units, round_to, ignore).values()):
        raise PruneError(
            f'nothing can be pruned: {len(comb.groups)} groups, all ignored or at their floor '
            f'(min_units={min_units}, round_to={round_to}, ignore={list(ignore)}); '
            'print the comb to see what is frozen and why'
        )
    metric, target = schedule.metric, schedule.target
    low = reachable(comb, metric, min_units, round_to, ignore)
    if low > target:
        raise PruneError(
            f'target={target} of {metric} cannot be reached, only {low:.4f} of the dense model '
            f'(min_units={min_units}, round_to={round_to}, ignore={list(ignore)})'
        )
    if schedule.units_per_event is not None and metric == 'units':
        units = sum(group.units for group in comb.groups)
        most = schedule.events() * schedule.units_per_event
        if units - most > target * units:
            raise PruneError(
                f'{schedule.events()} events of {schedule.units_per_event} units take {most} of {units}: '
                f'too few for target={target}: raise units_per_event, or lower interval'
            )


def _steps(comb: Coupling, keep: Keep, min_units: int, round_to: int, ignore: Sequence[str]) -> dict[str, list[int]]:
    """Return, for each group, the numbers of units that it may be brought down to, from most to least."""
    if min_units < 1 or round_to < 1:
        raise ValueError(f'min_units and round_to are at least 1: got {min_units} and {round_to}')
    ignored = match(ignore, keep)
    steps = {}
    for group in comb.groups:
        chunk = round_to if group.units > round_to else 1
        floor = math.ceil(min_units / chunk) * chunk
        first = (int(keep[group.name].sum()) - 1) // chunk * chunk
        steps[group.name] = [] if group.name in ignored else list(range(first, floor - 1, -chunk))
    return steps


def _order(
    scores: dict[str, Tensor], comb: Coupling, keep: Keep, steps: dict[str, list[int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the units that may go (numbered through all groups), lowest chunk first, and where each chunk ends."""
    units, keys, sizes = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0, np.int64)]
    for name, numbers in steps.items():
        if not numbers:
            continue
        live = np.flatnonzero(keep[name].numpy())
        score = scores[name].double().cpu().numpy()[live]
        rank = np.argsort(score, kind='stable')[: len(live) - numbers[-1]]
        begins = len(live) - np.array([len(live), *numbers])  # of each chunk in `rank`, and the end of the last
        units.append(comb.start[name] + live[rank])
        keys.append(np.add.reduceat(score[rank], begins[:-1]) / np.diff(begins))
        sizes.append(np.diff(begins))
    size, key, unit = np.concatenate(sizes), np.concatenate(keys), np.concatenate(units)
    order = np.argsort(key, kind='stable')
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return unit[np.argsort(np.repeat(place, size), kind='stable')], np.cumsum(size[order])


def _metric(comb: Coupling, flat: np.ndarray, metric: str) -> int:
    """Return a metric for a boolean vector over all units."""
    return int(flat.sum()) if metric == 'units' else comb.cost_model(flat)[metric]
