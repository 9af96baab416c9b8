"""Read the course of a training from what MMEngine's visualizer wrote: losses, metrics and costs over iterations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmcpd.engine.report import ROWS
from mmcpd.prune import Schedule
from mmcpd.report.data import Curve

SCALARS = '*/vis_data/scalars.json'
PREFIX = 'prune_'  # of what PruneHook logs: what remains of a cost, as a share
LOSSES = 6  # curves at most


@dataclass(frozen=True)
class Course:
    """The costs that remain, in percent, and the losses, metrics and rates, over iterations."""

    costs: Sequence[Curve]
    curves: Sequence[Curve]


def course(folder: Path, metrics: Sequence[str] = ()) -> Course:
    """Return the course of the runs in a work dir: of one that was resumed, what its later parts say holds.

    Example:
        >>> course(Path('nowhere'))
        Course(costs=[], curves=[])
    """
    values: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob(SCALARS)):
        new = _values(file)
        begin = min((step for steps in new.values() for step in steps), default=0)
        for name in {*values, *new}:
            before = {step: value for step, value in values.get(name, {}).items() if step < begin}
            values[name] = before | new.get(name, {})
    values = {name: steps for name, steps in values.items() if steps}
    names = [name for name in ROWS if PREFIX + name in values]
    costs = [_curve(ROWS[name][0], '%', values[PREFIX + name], 100) for name in names]
    losses = sorted((name for name in values if 'loss' in name.rpartition('.')[2]), key=lambda name: name != 'loss')
    shown = [*losses[:LOSSES], *(name for name in metrics if name in values), *(n for n in ('lr',) if n in values)]
    return Course(costs, [_curve({'lr': 'learning rate'}.get(name, name), '', values[name], 1) for name in shown])


def _curve(name: str, unit: str, steps: Mapping[int, float], times: float) -> Curve:
    iterations = sorted(steps)
    return Curve(name, unit, iterations, [times * steps[each] for each in iterations])


def _values(file: Path) -> dict[str, dict[int, float]]:
    """Return the scalars of a run by name and iteration; a validation is at the iteration that was logged before it."""
    found: dict[str, dict[int, float]] = {}
    step = 0
    for line in _lines(file):
        is_training = 'iter' in line
        step = int(line['iter']) if is_training else step or int(line.get('step', 0))
        for name, value in line.items():
            if isinstance(value, int | float) and math.isfinite(value) and name not in ('iter', 'step', 'epoch'):
                found.setdefault(name, {})[step] = float(value)
    return found


def _lines(file: Path) -> Iterator[dict[str, float]]:
    """Yield the records of a file; the last line of a run that was killed may be half a line."""
    for line in file.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            yield record


def events(options: Mapping[str, object], iterations: int) -> list[int]:
    """Return the iterations at which a PruneHook with these options removes units in a run of so many.

    Example:
        >>> events({'begin': 0.5, 'end': 1.0, 'interval': 2, 'target': {'macs': 0.5}}, 8)
        [6, 8]
    """
    if options.get('at_once'):
        begin = options.get('begin', 0)
        return [round(begin * iterations) if isinstance(begin, float) else int(str(begin))]
    known = ('target', 'begin', 'end', 'interval', 'curve', 'units_per_event')
    given: dict[str, object] = {name: options[name] for name in known if name in options}
    schedule = Schedule(**{'target': {'macs': 0.5}, **given}).resolve(iterations)  # type: ignore[arg-type]
    return [step for step in range(1, iterations + 1) if schedule.due(step)]
