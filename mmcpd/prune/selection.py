"""Which units are removed: the lowest scores, as few as bring every quantity down, and how far that can go."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ..coupling import Coupling, Keep
from ..errors import PruneError
from .remain import check_remain, least_units
from .schedule import LATENCY, check_quantities, is_count

# Groups of at least so many units keep a multiple of `round_to`, because kernels of most hardware work in blocks of 8
# or more channels. A smaller group would lose too large a part of itself at once.
ROUNDED_FROM = 64


class UnitFloors(TypedDict):
    """Hold the floors that every group has."""

    min_units: int
    round_to: int


class Floors(UnitFloors, total=False):
    """What each group keeps: at least `min_units`, two under a norm, and in a large group a multiple of `round_to`.

    `remain` names the share of their units that some groups keep, by patterns of their names.
    """

    remain: Mapping[str, float]


def shares(coupling: Coupling, keep: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what remains of each quantity under `keep`, as a share of the dense model's; of latency where it is timed.

    Example:
        >>> shares(coupling, coupling.keep())
        {'macs': 1.0, 'params': 1.0, 'memory': 1.0, 'units': 1.0}
    """
    dense = _quantities(coupling, coupling.flat(coupling.keep()))
    found = _quantities(coupling, coupling.flat(keep))
    return {quantity: found[quantity] / all_ if all_ else 1.0 for quantity, all_ in dense.items()}


def select(
    scores: Mapping[str, Tensor],
    coupling: Coupling,
    keep: Mapping[str, Tensor],
    ratios: Mapping[str, float],
    *,
    min_units: int = 1,
    round_to: int = 8,
    remain: Mapping[str, float] = {},
    limit: int | None = None,
    fixed: Collection[str] = (),
) -> Keep:
    """Choose the units to remove: the lowest scores, as few as bring every quantity down to its ratio.

    Units are taken in chunks, ordered by the chunk's mean score, ties in the order of groups: single units, and
    `round_to` of them in a large group. The search halves the list of chunks, with the closed-form cost at each trial:
    about 15 for a ResNet-50. A large last chunk may bring a quantity down further than asked for: then a smaller one
    that is enough goes instead, where its score is no higher, and the most important ones before it that still fit
    are kept.

    Scores are normalised ones, (units,) per group; `keep` are the kept units so far, and is not changed. The ratios are
    shares of the dense model's quantities that may remain, for some of `macs`, `params`, `memory`, `units` and
    `latency` (of a coupling with timed layers; units whose removal buys no time are kept). Each group keeps `min_units`
    (a smaller one stays whole), under a norm at least two, and a group of at least 64 units, and of more than
    `round_to`, a multiple of `round_to`. A group whose name fits a pattern in `remain` keeps at least that share. At
    most `limit` units are removed; a chunk is not broken, so at least one chunk is. The groups in `fixed` lose none.

    Raises:
        ValueError: an unknown quantity, latency without times, a floor below 1, or a pattern that fits no group.
        PruneError: the floors do not allow as little as the ratios, and there is no `limit`.

    Example:
        >>> scores = {group.name: torch.rand(group.units) for group in coupling.groups}
        >>> chosen = select(scores, coupling, coupling.keep(), {'macs': 0.5, 'params': 0.8})
        >>> shares(coupling, chosen)['macs'] <= 0.5
        True
    """
    check_quantities(coupling, ratios)
    chunks = _order(scores, coupling, keep, steps_of(coupling, keep, min_units, round_to, fixed, remain))
    search = _Search(coupling, coupling.flat(keep), ratios, chunks)
    most = chunks.within(limit)
    number = bisect_left(range(most + 1), True, key=lambda number: search.room(range(number)) >= 0)
    if number > most and (limit is None or not most):
        raise out_of_reach(coupling, ratios, min_units, round_to, remain)
    chosen = search.fitting(range(number)) if number <= most else search.without(range(most))
    parts = np.split(chosen, list(coupling.start.values())[1:])
    return {group.name: torch.from_numpy(part.copy()) for group, part in zip(coupling.groups, parts, strict=True)}


def reachable(
    coupling: Coupling,
    *,
    min_units: int = 1,
    round_to: int = 8,
    remain: Mapping[str, float] = {},
    keep: Mapping[str, Tensor] | None = None,
    fixed: Collection[str] = (),
) -> dict[str, float]:
    """Return the lowest share of each quantity that the floors of `select` allow, from `keep` (by default all) on.

    Example:
        >>> reachable(coupling)['units'] == 2 / 12    # one unit of each of the two groups
        True
    """
    keep = coupling.keep() if keep is None else keep
    steps = steps_of(coupling, keep, min_units, round_to, fixed, remain)
    lowest = {group.name: [int(keep[group.name].sum()), *steps[group.name]][-1] for group in coupling.groups}
    return shares(coupling, {group.name: torch.arange(group.units) < lowest[group.name] for group in coupling.groups})


def check_floors(*, min_units: int, round_to: int, remain: Mapping[str, float] = {}) -> None:
    """Refuse floors that make no sense; that takes no model.

    Raises:
        ValueError: one of them is not an integer of at least 1, or no share in `remain`.

    Example:
        >>> check_floors(min_units=1, round_to=8)
    """
    for name, value in (('min_units', min_units), ('round_to', round_to)):
        if not is_count(value, 1):
            raise ValueError(f'{name} counts units, at least 1: got {value!r}')
    check_remain(remain)


def out_of_reach(
    coupling: Coupling, ratios: Mapping[str, float], min_units: int, round_to: int, remain: Mapping[str, float] = {}
) -> PruneError:
    """Return the error about the quantity that lies furthest out of reach."""
    lowest = reachable(coupling, min_units=min_units, round_to=round_to, remain=remain)
    quantity = max(ratios, key=lambda quantity: lowest[quantity] - ratios[quantity])
    return PruneError(
        f'{quantity} cannot go down to {ratios[quantity]:.4f} of the dense model, only to {lowest[quantity]:.4f} '
        f'({in_words(min_units, round_to, remain)}): raise its target, lower these, or print the coupling to '
        'see what is frozen and why'
    )


def in_words(min_units: int, round_to: int, remain: Mapping[str, float] = {}) -> str:
    """Return the floors as a message shows them."""
    return f'min_units={min_units}, round_to={round_to}' + (f', remain={dict(remain)}' if remain else '')


def steps_of(
    coupling: Coupling,
    keep: Mapping[str, Tensor],
    min_units: int,
    round_to: int,
    fixed: Collection[str] = (),
    remain: Mapping[str, float] = {},
) -> dict[str, list[int]]:
    """Return, for each group, the numbers of units that it may be brought down to, from most to least."""
    check_floors(min_units=min_units, round_to=round_to, remain=remain)
    steps, least = {}, least_units(coupling, remain)
    for group in coupling.groups:
        chunk = round_to if group.units >= ROUNDED_FROM and group.units > round_to else 1
        floor = math.ceil(max(min_units, coupling.floors[group.name]) / chunk) * chunk
        floor = max(floor, math.ceil(least[group.name] / chunk) * chunk)
        first = (int(keep[group.name].sum()) - 1) // chunk * chunk
        steps[group.name] = [] if group.name in fixed else list(range(first, floor - 1, -chunk))
    return steps


@dataclass(frozen=True, eq=False)
class _Chunks:
    """What may be removed, lowest mean score first: units as numbers in all units, and of each chunk what follows.

    The chunks of a group are in the order in which they must go.
    """

    units: np.ndarray
    ends: np.ndarray  # in `units`
    groups: list[str]
    scores: np.ndarray  # means

    def __getitem__(self, chunk: int) -> np.ndarray:
        return self.units[self.ends[chunk - 1] if chunk else 0 : self.ends[chunk]]

    def within(self, limit: int | None) -> int:
        """Return how many chunks hold at most so many units, at least one."""
        return min(len(self.ends), len(self.ends) if limit is None else max(1, int((self.ends <= limit).sum())))


@dataclass(frozen=True, eq=False)
class _Search:
    """Try chunks, to be removed from the kept units `start`, against ratios."""

    coupling: Coupling
    start: np.ndarray
    ratios: Mapping[str, float]
    chunks: _Chunks

    @cached_property
    def dense(self) -> dict[str, float]:
        return _quantities(self.coupling, self.coupling.flat(self.coupling.keep()))

    def without(self, removed: Iterable[int]) -> np.ndarray:
        """Return which units are kept without some chunks."""
        kept = self.start.copy()
        for chunk in removed:
            kept[self.chunks[chunk]] = False
        return kept

    def room(self, removed: Iterable[int]) -> float:
        """Return by how much of the dense model the rest is below the ratios; negative where it exceeds one."""
        return self._room(self.without(removed))

    def _room(self, kept: np.ndarray) -> float:
        found, dense = _quantities(self.coupling, kept), self.dense
        return min((ratio * dense[name] - found[name]) / (dense[name] or 1) for name, ratio in self.ratios.items())

    def fitting(self, removed: Sequence[int]) -> np.ndarray:
        """Return what is kept: nearest to the ratios of these chunks, or with a smaller one in place of the last."""
        ends = [self._give_back(removed)]
        if removed and (last := self._smaller(removed)) != removed[-1]:
            ends.append(self._give_back([*removed[:-1], last]))
        return min(ends, key=self._room)

    def _give_back(self, removed: Sequence[int]) -> np.ndarray:
        """Return what is kept without these chunks, the last ones given back where the ratios hold all the same."""
        chosen, full = self.without(removed), set()
        for chunk in reversed(removed):
            if self.chunks.groups[chunk] not in full:
                chosen[self.chunks[chunk]] = True
                if self._room(chosen) < 0:
                    chosen[self.chunks[chunk]] = False
                    full.add(self.chunks.groups[chunk])  # no further chunk of it fits
        return chosen

    def _smaller(self, removed: Sequence[int]) -> int:
        """Return the first chunk that is enough and saves less than the last one, or the last one.

        Its score times what it saves is no higher, and it has no more units. A single unit is as small as can be.
        """
        chunks, rest, last = self.chunks, removed[:-1], removed[-1]
        if len(chunks[last]) == 1:
            return last
        before, most, seen = self.room(rest), self.room(removed), {chunks.groups[last]}
        for other in range(last + 1, len(chunks.groups)):
            if chunks.groups[other] in seen:
                continue  # its turn has not come
            seen.add(chunks.groups[other])
            found = self.room([*rest, other]) if len(chunks[other]) <= len(chunks[last]) else most
            if 0 <= found < most and chunks.scores[other] * (found - before) <= chunks.scores[last] * (most - before):
                return other
        return last


def _order(
    scores: Mapping[str, Tensor], coupling: Coupling, keep: Mapping[str, Tensor], steps: dict[str, list[int]]
) -> _Chunks:
    units: list[np.ndarray] = [np.empty(0, np.int64)]
    keys: list[np.ndarray] = [np.empty(0)]
    sizes: list[np.ndarray] = [np.empty(0, np.int64)]
    groups: list[str] = []
    for name, numbers in steps.items():
        if not numbers:
            continue
        kept = np.flatnonzero(keep[name].numpy())
        score = scores[name].cpu().double().numpy()[kept]
        rank = np.argsort(score, kind='stable')[: len(kept) - numbers[-1]]
        begins = len(kept) - np.array([len(kept), *numbers])  # of each chunk in `rank`, and the end of the last
        units.append(coupling.start[name] + kept[rank])
        keys.append(np.add.reduceat(score[rank], begins[:-1]) / np.diff(begins))
        sizes.append(np.diff(begins))
        groups += [name] * len(numbers)
    size, key, unit = np.concatenate(sizes), np.concatenate(keys), np.concatenate(units)
    order = np.argsort(key, kind='stable')
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    in_order = unit[np.argsort(np.repeat(place, size), kind='stable')]
    return _Chunks(in_order, np.cumsum(size[order]), [groups[chunk] for chunk in order], key[order])


def _quantities(coupling: Coupling, kept: np.ndarray) -> dict[str, float]:
    """Return every quantity for a boolean vector over all units."""
    cost = coupling.cost_model(kept)
    found: dict[str, float] = {
        'macs': cost.macs,
        'params': cost.params,
        'memory': cost.memory,
        'units': int(kept.sum()),
    }
    return found if coupling.cost_model.latency is None else {**found, LATENCY: cost.latency}
