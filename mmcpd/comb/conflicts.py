"""Couple widths that share one attribute, or one source line that runs twice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ..coupling import Coupling
from ..errors import SlimError
from ..example import Example
from ..fixes import Attr, Equality, Expression, Live
from ..slim.attention import replacement
from ..slim.mask import Site
from ..slim.size_expressions import leaves, may_change, show
from ..slim.slimming import SizeConflict, modules_outside, planned_sizes
from .grouping import group
from .record import Record

COMPARED = 'the forward compares {} with {}, which never changes'
DRAWS = 6  # of the number of kept units in each group; two that should differ agree by chance in few of them


def couple_conflicts_(model: nn.Module, record: Record, example: Example) -> None:
    """Make widths equal that could not differ later, in place; channels that share a line with others are frozen.

    A keep that removes other numbers of units from each group shows them, without running anything.
    """
    _separate_statistics_(record)
    modules = modules_outside(model, [path for path, module in model.named_modules() if replacement(module)])
    # Each round merges at least one pair of widths, so that the loop ends.
    while (record.sizes or record.equalities) and sum(
        _couple_(record, pair.left, pair.right) for pair in _conflicts(modules, group(model, record, example))
    ):
        pass


def _conflicts(modules: dict[str, nn.Module], coupling: Coupling) -> Iterator[Equality]:
    """Yield the sizes that would have to be equal, seen with random numbers of kept units."""
    random = np.random.default_rng(0)
    for _ in range(DRAWS if coupling.groups else 0):
        keep = {g.name: torch.arange(g.units) < int(random.integers(1, g.units)) for g in coupling.groups}
        try:
            planned_sizes(modules, coupling, coupling.live(keep).tolist())
        except SizeConflict as conflict:
            yield from conflict.missing
        except SlimError:
            pass  # no coupling helps: the trial names and freezes it


def _couple_(record: Record, left: Expression, right: Expression) -> bool:
    """Make two sizes equal; say whether they are widths of one length, or one is and the other never changes."""
    for width, size in ((left, right), (right, left)):
        if leaves(width, Live) and not leaves(width, Attr) and not may_change(size):
            for each in leaves(width, Live):
                record.table.freeze(record.axes[each.axis], COMPARED.format(show(width), show(size)))
            return True
    if not (isinstance(left, Live) and isinstance(right, Live)):
        return False
    one, other = record.axes[left.axis], record.axes[right.axis]
    if len(one) == len(other):
        record.table.equate(one, other, 'one size with a fixed width')
    return len(one) == len(other)


def _separate_statistics_(record: Record) -> None:
    """See to it that each line takes its statistic of one length over one set of channels."""
    first: dict[Site, int | None] = {}
    for seen in record.statistics:
        other = first.setdefault(seen.site, seen.axis)
        if other == seen.axis:
            continue
        if other is not None and seen.axis is not None:
            _couple_(record, Live(other), Live(seen.axis))
            continue
        axis = record.axes[other if other is not None else seen.axis]  # type: ignore[index]
        where = seen.site.place.module or 'the model itself'
        reason = f'one line takes a statistic over channels and over {seen.site.width} other positions in {where}'
        record.table.freeze(axis, reason)
