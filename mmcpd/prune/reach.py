"""Whether a schedule can reach its target: said before training, and again where a run goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise

import torch

from ..coupling import Coupling, Keep
from ..errors import PruneError
from .schedule import LATENCY, Schedule, check_quantities
from .selection import Floors, in_words, out_of_reach, reachable, select, shares, steps_of


def check_reachable(
    coupling: Coupling,
    schedule: Schedule,
    *,
    min_units: int = 1,
    round_to: int = 8,
    remain: Mapping[str, float] = {},
) -> None:
    """Refuse a target that no choice of units can meet, before any training.

    Raises:
        ValueError: a pattern in `remain` that fits no group, or a latency without times.
        PruneError: no prunable group, a target below the range, or (curve `paper`) too few events.

    Example:
        >>> check_reachable(coupling, Schedule(target=dict(macs=0.5, params=0.6), end=100))
    """
    floors: Floors = {'min_units': min_units, 'round_to': round_to, 'remain': remain}
    check_quantities(coupling, schedule.target)
    if not any(steps_of(coupling, coupling.keep(), **floors).values()):
        raise PruneError(
            f'nothing can be pruned: {len(coupling.groups) or "no"} groups were found, none above its floor '
            f'({in_words(**floors)}); print the coupling to see what is frozen and why'
        )
    lowest = reachable(coupling, **floors)
    if any(lowest[quantity] > share for quantity, share in schedule.target.items()):
        raise out_of_reach(coupling, schedule.target, **floors)
    if schedule.units_per_event is not None:
        check_events(coupling, schedule, coupling.keep(), schedule.events(), floors)


def check_resumed(
    coupling: Coupling, schedule: Schedule, keep: Keep, iteration: int, floors: Floors, *, waiting: bool = False
) -> None:
    """Refuse to go on, after so many finished iterations, with a run that has too few events left for its target.

    `waiting` says that an event is due which had nothing to choose by.

    Raises:
        PruneError: with what to change.

    Example:
        >>> schedule = Schedule(target=dict(macs=0.5), begin=0, end=10)
        >>> check_resumed(coupling, schedule, coupling.keep(), 12, {'min_units': 1, 'round_to': 8})
        Traceback (most recent call last):
        mmcpd.errors.PruneError: macs is at 1.0000 ... and pruning ends at 10. Set end=13 or later, ...
    """
    left = shares(coupling, keep)
    above = [quantity for quantity, share in schedule.target.items() if left[quantity] > share * (1 + 1e-9)]
    events = schedule.events(iteration) + waiting
    if above and not events:
        end, quantity = schedule.span()[1], above[0]
        raise PruneError(
            f'{quantity} is at {left[quantity]:.4f} of the dense model, its target is {schedule.target[quantity]:.4f}, '
            f'and no unit is removed any more: {iteration} iterations are finished and pruning ends at {end}. Set '
            f'end={iteration + 1} or later, train longer where end is a share of the run, or set the target to what '
            'is left'
        )
    if above and schedule.units_per_event is not None:
        check_events(coupling, schedule, keep, events, floors)


def check_events(coupling: Coupling, schedule: Schedule, keep: Keep, events: int, floors: Floors) -> None:
    """Refuse a number of events of curve 'paper' that is too small for the target, whichever units they take.

    Raises:
        PruneError: with how many units do.

    Example:
        >>> schedule = Schedule(dict(macs=0.5), 0, 100, curve='paper', units_per_event=1)
        >>> check_events(coupling, schedule, coupling.keep(), 8, {'min_units': 1, 'round_to': 8})
    """
    least = least_left(coupling, keep, events, schedule.units_per_event or 0, floors)
    for quantity, share in schedule.target.items():
        if least[quantity] > share * (1 + 1e-9):
            enough = math.ceil(units_on_the_way(coupling, schedule.target, keep, floors) / max(1, events))
            raise PruneError(
                f'{events} events of {schedule.units_per_event} units leave at least {least[quantity]:.4f} of '
                f'{quantity}, and its target is {share:.4f}: set units_per_event={enough} or more, lower interval, or '
                'let pruning end later'
            )


def few_events(coupling: Coupling, schedule: Schedule, floors: Floors) -> str:
    """Say where the events of curve 'paper' may be too few for the target; '' where they do.

    They are too few if units go evenly from all groups: scores decide, so that is no mistake for certain.

    Example:
        >>> few_events(coupling, Schedule(dict(macs=0.5), 0, 10), {'min_units': 1, 'round_to': 8})
        ''
    """
    if schedule.units_per_event is None:
        return ''
    needed, events = units_on_the_way(coupling, schedule.target, coupling.keep(), floors), schedule.events()
    if events * schedule.units_per_event >= needed:
        return ''
    return (
        f'the run may end before its target: {events} events of {schedule.units_per_event} units remove '
        f'{events * schedule.units_per_event}, and the target takes {needed} where they go evenly from all groups; '
        f'units_per_event={math.ceil(needed / events)} does'
    )


def units_on_the_way(coupling: Coupling, target: Mapping[str, float], keep: Keep, floors: Floors) -> int:
    """Return how many units go on the way from a keep to a target, where all groups give the same share of theirs.

    Example:
        >>> units_on_the_way(coupling, dict(units=0.5), coupling.keep(), {'min_units': 1, 'round_to': 8})
        6
    """
    even = {}
    for name, kept in keep.items():
        even[name] = torch.zeros(len(kept))
        even[name][kept] = (torch.arange(int(kept.sum())) + 1) / kept.sum()
    chosen = select(even, coupling, keep, target, **floors)
    return sum(int((keep[name] & ~kept).sum()) for name, kept in chosen.items())


def least_left(coupling: Coupling, keep: Keep, events: int, limit: int, floors: Floors) -> dict[str, float]:
    """Return a share of each quantity below which so many events of `limit` units cannot bring it, whatever they take.

    A unit saves at most what it saves now: costs are sums of products of live counts. Of latency, which goes down in
    steps, the floors alone are known. Where a chunk of a large group
    is larger than `limit`, an event takes it whole, and nothing else.

    Example:
        >>> least_left(coupling, coupling.keep(), 3, 1, {'min_units': 1, 'round_to': 8})['units']
        0.75
    """
    counts = {name: [int(keep[name].sum()), *each] for name, each in steps_of(coupling, keep, **floors).items()}
    widths = {name: max([limit, *(a - b for a, b in pairwise(each))]) for name, each in counts.items()}  # in one event
    saved, found = coupling.marginal(keep), shares(coupling, keep)
    dense = coupling.cost(coupling.keep())
    if LATENCY in found:
        found[LATENCY] = reachable(coupling, keep=keep, **floors)[LATENCY]
    for quantity in found.keys() - {LATENCY}:
        each = {name: 1 if quantity == 'units' else saved[name][quantity] for name in counts}
        whole = coupling.units if quantity == 'units' else dense[quantity]
        free = float(events)
        for name in sorted(counts, key=lambda name: -each[name] * widths[name]):
            taken = min(free, (counts[name][0] - counts[name][-1]) / widths[name])
            found[quantity] -= taken * widths[name] * each[name] / max(1, whole)
            free -= taken
    return found
