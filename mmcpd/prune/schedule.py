"""When units are removed, and what share of each quantity may remain by then."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from ..cost import COSTS
from ..coupling import Coupling
from ..names import look_up

# Name -> share of the way from dense to the target that is still to go, at progress t in [0, 1].
CURVES: dict[str, Callable[[float], float]] = {
    'linear': lambda t: 1 - t,
    'cubic': lambda t: (1 - t) ** 3,
    'cosine': lambda t: (1 + math.cos(math.pi * t)) / 2,
    'paper': lambda _: 0.0,  # a fixed number of units per event, down to the target
}
LATENCY = 'latency'  # of the exported model, where its layers were timed
QUANTITIES = (*COSTS, 'units', LATENCY)


@dataclass(frozen=True)
class Schedule:
    """Say at which iterations units are removed, and what share of each quantity may remain afterwards.

    Iterations are finished ones: the first event is `interval` iterations after `begin`, the last at `end`.

    Args:
        target: share of the dense model's quantity that **remains** at `end`, between 0 and 1, for one or more of
            `macs`, `params`, `memory`, `units` and `latency`; where there are several, all of them hold.
        begin, end: iterations (int), or shares of the run (float in [0, 1]).
        interval: iterations between two events.
        curve: `cubic` (fast first), `linear`, `cosine`, or `paper` (`units_per_event` at each event).
        units_per_event: only for `paper`: so many units are removed, until every quantity is at its target.

    Raises:
        ValueError: an argument that makes no sense.

    Source: cubic: Zhu and Gupta, To prune, or not to prune, 2017, equation 1; paper: CPD's greedy removal.

    Example:
        >>> from mmcpd.prune import Schedule
        >>> schedule = Schedule(target=dict(macs=0.5), begin=0.25, end=0.75, interval=10).resolve(400)
        >>> schedule.due(110), schedule.due(111), schedule.ratios(300)
        (True, False, {'macs': 0.5})
    """

    target: Mapping[str, float]
    begin: int | float = 0
    end: int | float = 0.6
    interval: int = 10
    curve: str = 'cubic'
    units_per_event: int | None = None

    def __post_init__(self) -> None:
        _check_target(self.target)
        object.__setattr__(self, 'target', dict(self.target))
        look_up(CURVES, self.curve, 'curve')
        for name, value in (('begin', self.begin), ('end', self.end)):
            if not (is_count(value, 0) or (isinstance(value, float) and 0 <= value <= 1)):
                raise ValueError(f'{name} is an iteration (int) or a share of the run (float in [0, 1]): got {value!r}')
        if type(self.end) is int and self.end == 1:
            raise ValueError('end=1 is the first iteration: write 1.0 for the whole run')
        if type(self.begin) is type(self.end) and self.begin >= self.end:
            raise ValueError(f'pruning begins at {self.begin}, so it cannot end at {self.end}')
        if not is_count(self.interval, 1):
            raise ValueError(f'interval counts iterations, at least 1: got {self.interval!r}')
        if (self.curve == 'paper') != (self.units_per_event is not None):
            raise ValueError("units_per_event belongs to curve='paper', and that curve needs it")
        if self.units_per_event is not None and not is_count(self.units_per_event, 1):
            raise ValueError(f'units_per_event is at least 1: got {self.units_per_event!r}')

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
                'change begin and end, or train longer'
            )
        return replace(self, begin=begin, end=end)

    def due(self, iteration: int) -> bool:
        """Tell whether units are removed after so many finished iterations."""
        begin, end = self.span()
        return begin < iteration <= end and ((iteration - begin) % self.interval == 0 or iteration == end)

    def ratios(self, iteration: int) -> dict[str, float]:
        """Return the share of each quantity that may remain after so many finished iterations."""
        begin, end = self.span()
        if iteration <= begin:
            return dict.fromkeys(self.target, 1.0)
        to_go = CURVES[self.curve](min(1.0, (iteration - begin) / (end - begin)))
        return {quantity: target + (1 - target) * to_go for quantity, target in self.target.items()}

    def events(self, iteration: int = 0) -> int:
        """Return how many times units are removed after so many finished iterations."""
        begin, end = self.span()
        passed = max(0, iteration - begin) // self.interval
        return math.ceil((end - begin) / self.interval) - passed if iteration < end else 0

    def span(self) -> tuple[int, int]:
        """Return `begin` and `end` as iterations.

        Raises:
            ValueError: one of them is a share of a run whose length is not known here.
        """
        if isinstance(self.begin, float) or isinstance(self.end, float):
            raise ValueError(
                f'begin={self.begin} and end={self.end} hold a share of the run: '
                'call schedule.resolve(iterations) first'
            )
        return self.begin, self.end


def _check_target(target: object) -> None:
    """Refuse what is not a mapping from quantities to shares between 0 and 1."""
    shares = target if isinstance(target, Mapping) else {}
    for quantity in shares:
        look_up(dict.fromkeys(QUANTITIES), quantity, 'quantity')
    if not shares or not all(isinstance(share, float) and 0 < share < 1 for share in shares.values()):
        raise ValueError(
            "target names quantities and the share of the dense model's that remains, between 0 and 1: "
            f'target=dict(macs=0.5); got {target!r}'
        )


def check_quantities(coupling: Coupling, ratios: Iterable[str]) -> None:
    """Refuse quantities that are unknown, or that this coupling knows nothing of.

    Raises:
        ValueError: with what to do.

    Example:
        >>> check_quantities(coupling, ['latency'])
        Traceback (most recent call last):
        ValueError: the layers were not timed, so nothing is known of latency: coupling = mmcpd.deploy.with_latency(...
    """
    for quantity in ratios:
        look_up(dict.fromkeys(QUANTITIES), quantity, 'quantity')
    if LATENCY in ratios and coupling.cost_model.latency is None:
        raise ValueError(
            'the layers were not timed, so nothing is known of latency: '
            'coupling = mmcpd.deploy.with_latency(model, coupling) times them'
        )


def is_count(value: object, least: int) -> bool:
    """Tell whether a value is an integer, and no boolean, of at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
