"""What a forward compares and computes with sizes: each place may say one number, or what it says stays."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from types import CodeType
from typing import Any

from ..fixes import Input, Live, Op
from ..slim.call_sites import Spot, can_be_written
from ..slim.size_expressions import leaves
from .record import Equation, Note, Record

COMPARED = 'compared in size in {}'
BOTH = 'one line computes with a width and with a size of the input in {}'


def place_of(spot: Spot) -> tuple[Any, CodeType, int]:
    """Return what the runs of one line of a module have in common."""
    return spot.module, spot.code, spot.instruction


def settle_(record: Record) -> None:
    """Write down which comparisons must come out as they did, and freeze the widths of lines that have two answers."""
    runs: dict[Hashable, list[Equation]] = defaultdict(list)
    for found in record.compared:
        if found.spot is not None:
            runs[place_of(found.spot)].append(found)
    for place in runs.values():
        wide = [found for found in place if leaves(found.expression, Live)]
        if all(map(_was_equal, wide)):
            continue  # that is an equality; of tuples, what comes behind may differ
        apart = len({found.target for found in wide}) > 1 or len(wide) < len(place)
        if apart or any(leaves(found.expression, Input) for found in wide):
            _freeze_(record, wide, COMPARED)
        else:
            record.constants += wide
            record.notes.add(Note.WIDTH_COMPUTED)
    shared = [found for found in record.constants if found.spot and place_of(found.spot) in record.with_inputs]
    _freeze_(record, (found for found in shared if can_be_written(found.spot)), BOTH)


def _was_equal(found: Equation) -> bool:
    return bool(found.target) and isinstance(found.expression, Op) and found.expression.symbol == '=='


def _freeze_(record: Record, equations: Iterable[Equation], why: str) -> None:
    for found in equations:
        for width in leaves(found.expression, Live):
            record.table.freeze(record.axes[width.axis], why.format(found.module or 'the model itself'))
