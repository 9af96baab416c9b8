"""Which units are removed: the lowest scores, as few as bring every quantity down, and how far that can go."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Collection, Mapping
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from ..coupling import Coupling, Keep
from ..errors import PruneError
from ..names import look_up
from .schedule import QUANTITIES, Schedule, is_count

# Groups of at least so many units keep a multiple of `round_to`, because kernels of most hardware work in blocks of 8
# or more channels. A smaller group would lose too large a part of itself at once.
ROUNDED_FROM = 64


class Floors(TypedDict):
    """What each group keeps: at least `min_units`, and in a large group a multiple of `round_to`."""

    min_units: int
    round_to: int


def shares(coupling: Coupling, keep: Mapping[str, Tensor]) -> dict[str, float]:
    """Return what remains of each quantity under `keep`, as a share of the dense model's.

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
    limit: int | None = None,
    fixed: Collection[str] = (),
) -> Keep:
    """Choose the units to remove: the lowest scores, as few as bring every quantity down to its ratio.

    Units are taken in chunks, ordered by the chunk's mean score, ties in the order of groups: single units, and
    `round_to` of them in a large group. The search halves the list of chunks, with the closed-form cost at each trial:
    about 15 for a ResNet-50. A large last chunk may bring a quantity down further than asked for: then the most
    important ones before it that still fit are kept.

    Scores are normalised ones, (units,) per group; `keep` are the kept units so far, and is not changed. The ratios are
    shares of the dense model's quantities that may remain, for some of `macs`, `params`, `memory` and `units`. Each
    group keeps `min_units` (a smaller one stays whole), and a group of at least 64 units, and of more than `round_to`,
    a multiple of `round_to`. At most `limit` units are removed; a chunk is not broken, so at least one chunk is. The
    groups in `fixed` lose none.

    Raises:
        ValueError: an unknown quantity, or a floor below 1.
        PruneError: the floors do not allow as little as the ratios, and there is no `limit`.

    Example:
        >>> scores = {group.name: torch.rand(group.units) for group in coupling.groups}
        >>> chosen = select(scores, coupling, coupling.keep(), {'macs': 0.5, 'params': 0.8})
        >>> shares(coupling, chosen)['macs'] <= 0.5
        True
    """
    for quantity in ratios:
        look_up(dict.fromkeys(QUANTITIES), quantity, 'quantity')
    order, ends, groups = _order(scores, coupling, keep, _steps(coupling, keep, min_units, round_to, fixed))
    if limit is not None:
        ends = ends[: max(1, int((ends <= limit).sum()))]
    dense, kept = _quantities(coupling, coupling.flat(coupling.keep())), coupling.flat(keep)

    def without(chunks: int) -> np.ndarray:
        """Return which units are kept when the first chunks are removed."""
        found = kept.copy()
        found[order[: ends[chunks - 1] if chunks else 0]] = False
        return found

    def reached(kept: np.ndarray) -> bool:
        found = _quantities(coupling, kept)
        return all(found[quantity] <= ratio * dense[quantity] for quantity, ratio in ratios.items())

    chunks = bisect_left(range(len(ends) + 1), True, key=lambda chunks: reached(without(chunks)))
    if chunks > len(ends):
        if limit is None or not len(ends):
            raise _out_of_reach(coupling, ratios, min_units, round_to)
        chunks = len(ends)
    chosen, full = without(chunks), set()  # groups of which no further chunk fits
    for chunk in reversed(range(chunks)):
        if groups[chunk] not in full:
            units = order[ends[chunk - 1] if chunk else 0 : ends[chunk]]
            chosen[units] = True
            if not reached(chosen):
                chosen[units] = False
                full.add(groups[chunk])
    parts = np.split(chosen, list(coupling.start.values())[1:])
    return {group.name: torch.from_numpy(part.copy()) for group, part in zip(coupling.groups, parts, strict=True)}


def reachable(
    coupling: Coupling,
    *,
    min_units: int = 1,
    round_to: int = 8,
    keep: Mapping[str, Tensor] | None = None,
    fixed: Collection[str] = (),
) -> dict[str, float]:
    """Return the lowest share of each quantity that the floors of `select` allow, from `keep` (by default all) on.

    Example:
        >>> reachable(coupling)['units'] == 2 / 12    # one unit of each of the two groups
        True
    """
    keep = coupling.keep() if keep is None else keep
    steps = _steps(coupling, keep, min_units, round_to, fixed)
    lowest = {group.name: [int(keep[group.name].sum()), *steps[group.name]][-1] for group in coupling.groups}
    return shares(coupling, {group.name: torch.arange(group.units) < lowest[group.name] for group in coupling.groups})


def check_floors(*, min_units: int, round_to: int) -> None:
    """Refuse floors that make no sense; that takes no model.

    Raises:
        ValueError: one of them is not an integer of at least 1.

    Example:
        >>> check_floors(min_units=1, round_to=8)
    """
    for name, value in (('min_units', min_units), ('round_to', round_to)):
        if not is_count(value, 1):
            raise ValueError(f'{name} counts units, at least 1: got {value!r}')


def check_reachable(coupling: Coupling, schedule: Schedule, *, min_units: int = 1, round_to: int = 8) -> None:
    """Refuse a target that no choice of units can meet, before any training.

    Raises:
        PruneError: no prunable group, a target below the range, or (curve `paper`) too few events.

    Example:
        >>> check_reachable(coupling, Schedule(target=dict(macs=0.5, params=0.6), end=100))
    """
    if not any(_steps(coupling, coupling.keep(), min_units, round_to).values()):
        raise PruneError(
            f'nothing can be pruned: {len(coupling.groups) or "no"} groups were found, none above its floor '
            f'(min_units={min_units}, round_to={round_to}); print the coupling to see what is frozen and why'
        )
    lowest = reachable(coupling, min_units=min_units, round_to=round_to)
    if any(lowest[quantity] > share for quantity, share in schedule.target.items()):
        raise _out_of_reach(coupling, schedule.target, min_units, round_to)
    if schedule.units_per_event is not None and 'units' in schedule.target:
        most = schedule.events() * schedule.units_per_event
        if coupling.units - most > schedule.target['units'] * coupling.units:
            raise PruneError(
                f'{schedule.events()} events of {schedule.units_per_event} units remove {most} of {coupling.units}: '
                f'too few for units={schedule.target["units"]}: raise units_per_event, or lower interval'
            )


def _out_of_reach(coupling: Coupling, ratios: Mapping[str, float], min_units: int, round_to: int) -> PruneError:
    """Return the error about the quantity that lies furthest out of reach."""
    lowest = reachable(coupling, min_units=min_units, round_to=round_to)
    quantity = max(ratios, key=lambda quantity: lowest[quantity] - ratios[quantity])
    return PruneError(
        f'{quantity} cannot go down to {ratios[quantity]:.4f} of the dense model, only to {lowest[quantity]:.4f} '
        f'(min_units={min_units}, round_to={round_to}): raise its target, lower these two, or print the coupling to '
        'see what is frozen and why'
    )


def _steps(
    coupling: Coupling, keep: Mapping[str, Tensor], min_units: int, round_to: int, fixed: Collection[str] = ()
) -> dict[str, list[int]]:
    """Return, for each group, the numbers of units that it may be brought down to, from most to least."""
    check_floors(min_units=min_units, round_to=round_to)
    steps = {}
    for group in coupling.groups:
        chunk = round_to if group.units >= ROUNDED_FROM and group.units > round_to else 1
        floor = math.ceil(min_units / chunk) * chunk
        first = (int(keep[group.name].sum()) - 1) // chunk * chunk
        steps[group.name] = [] if group.name in fixed else list(range(first, floor - 1, -chunk))
    return steps


def _order(
    scores: Mapping[str, Tensor], coupling: Coupling, keep: Mapping[str, Tensor], steps: dict[str, list[int]]
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the units that may be removed, as numbers in all units, lowest chunk first; each chunk's end, group."""
    units, keys, sizes = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0, np.int64)]
    groups: list[str] = []
    for name, numbers in steps.items():
        if not numbers:
            continue
        kept = np.flatnonzero(keep[name].numpy())
        score = scores[name].double().cpu().numpy()[kept]
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
    return in_order, np.cumsum(size[order]), [groups[chunk] for chunk in order]


def _quantities(coupling: Coupling, kept: np.ndarray) -> dict[str, int]:
    """Return every quantity for a boolean vector over all units."""
    cost = coupling.cost_model(kept)
    return {'macs': cost.macs, 'params': cost.params, 'memory': cost.memory, 'units': int(kept.sum())}
