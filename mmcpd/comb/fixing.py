"""Say what slimming does beyond slicing: sizes, constants, statistics over channels, the scales of attentions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from torch import nn

from ..fixes import Attr, CallSite, CodePlace, Fixes, Live, QueryScale, Rows, SizeRule, Statistic, Unmasked
from ..slim.attention import replacement
from ..slim.call_sites import call_site
from ..slim.computed import computed_channels
from ..slim.places import place_name
from ..slim.size_expressions import leaves
from .atoms import FIXED, Row
from .record import Equation, Lookup, Record

UNSCALED = (
    'an attention in {} divides by the square root of the width of a query that is read elsewhere too, by a call that '
    'is not in a method of a module: give that call its scale'
)


def fixes_of(model: nn.Module, record: Record, rows: Lookup, live: Sequence[bool]) -> Fixes:
    """Return what slimming does beyond slicing; `live` says for each axis whether any of its units can go."""
    widths: dict[tuple[CodePlace, int], set[tuple[int, int | None]]] = {}
    for seen in record.statistics:
        widths.setdefault(seen.site[:2], set()).add((seen.site.width, seen.axis))
    statistics = [
        Statistic(seen.site.place, seen.axis, seen.site.dim, len(widths[seen.site[:2]]) == 1)
        for seen in record.statistics
        if seen.axis is not None and live[seen.axis]
    ]
    return Fixes(
        statistics=tuple(dict.fromkeys(statistics)),
        scales=tuple(_scales(record, rows, live)),
        sizes=tuple(_sizes(model, record.sizes, live)),
        constants=tuple(rule for rule in _sizes(model, _constants(record), live) if rule.site is not None),
        equalities=tuple(dict.fromkeys(record.equalities)),
        unmasked=tuple(Unmasked(row.tensor, row.dim) for row in _unmasked(record)),
        computed=computed_channels(model),
        squeezed=tuple(axis for axis in dict.fromkeys(record.squeezed) if live[axis]),
    )


def _unmasked(record: Record) -> Iterator[Row]:
    starts = {int(atoms[0]) for atoms in record.directions}
    return (row for row in record.table.rows if row.start in starts or row.tensor in record.divisors)


def _sizes(model: nn.Module, equations: list[Equation], live: Sequence[bool]) -> Iterator[SizeRule]:
    """Translate the equations, each once, with their place in the source: for where attributes cannot satisfy all."""
    modules = dict(model.named_modules())
    for equation in dict.fromkeys(equations):
        by_attributes = leaves(equation.expression, Attr) and not leaves(equation.expression, Live)
        widths = leaves(equation.expression, Live) + ([equation.target] if isinstance(equation.target, Live) else [])
        if by_attributes or any(live[width.axis] for width in widths):
            where = place_name(equation.module, equation.spot)
            yield SizeRule(equation.expression, equation.target, _site(modules, equation), where)


def _site(modules: Mapping[str, nn.Module], equation: Equation) -> CallSite | None:
    """Name the place of an equation in the source of the module whose method runs there."""
    if equation.spot is None:
        return None
    path = next((path for path, module in modules.items() if module is equation.spot.module), equation.module)
    return call_site(modules[path], path, equation.spot, equation.inferable)


# -- the scales of attentions ------------------------------------------------------------------------------------------
def _folding(record: Record) -> list[bool]:
    """Say of each attention whether its factor can go into its query's rows: nothing else computes with them."""
    read = np.zeros(record.table.size, bool)
    for atoms in record.read.values() if record.scales else ():
        read[atoms[atoms >= 0]] = True
    return [not read[scale.query[scale.query >= 0]].any() for scale in record.scales]


def _constants(record: Record) -> list[Equation]:
    """Return the widths that a forward computes with, those of attentions whose queries have other readers included."""
    return record.constants + [
        Equation(Live(scale.axis), len(record.axes[scale.axis]), scale.module, scale.spot)
        for scale, folds in zip(record.scales, _folding(record), strict=True)
        if not folds
    ]


def freeze_unscaled(model: nn.Module, record: Record) -> None:
    """Freeze the queries of attentions whose factor can go neither into their rows nor into the call."""
    modules = dict(model.named_modules())
    for scale, folds in zip(record.scales, _folding(record), strict=True):
        if folds or replacement(modules[scale.module]):
            continue
        if scale.spot is None or not _site(modules, Equation(0, 0, scale.module, scale.spot)):
            record.table.freeze(record.axes[scale.axis], UNSCALED.format(scale.module or 'the model itself'))


def _scales(record: Record, rows: Lookup, live: Sequence[bool]) -> Iterator[QueryScale]:
    bias_of = np.full(record.table.size, FIXED)
    for pair in record.biases if record.scales else ():
        both = (pair.weight >= 0) & (pair.bias >= 0)
        bias_of[pair.weight[both]] = pair.bias[both]
    folding = (scale for scale, folds in zip(record.scales, _folding(record), strict=True) if folds)
    for scale in {scale.query.tobytes(): scale for scale in folding}.values():
        if not live[scale.axis]:
            continue
        # The label names one head; the rows of all heads are tied to it, in the same tensor and piece of it.
        atoms, biases = scale.query[scale.query >= 0], bias_of[scale.query[scale.query >= 0]]
        pieces: dict[Row, list[int]] = {}
        for atom in [*atoms.tolist(), *biases[biases >= 0].tolist()]:
            pieces.setdefault(rows.rows[rows.row_of[atom]], []).append(int(rows.offset[atom]))
        yield QueryScale(tuple(Rows(r.tensor, r.dim, tuple(i)) for r, i in pieces.items()), scale.axis, scale.module)
