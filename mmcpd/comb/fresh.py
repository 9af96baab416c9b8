"""Tensors that a forward makes anew, as the first state of a recurrence: `torch.zeros(n, self.hidden)`.

No weight is in them, but where they meet channels they must be as wide. So each size that could be a width has atoms of
its own while the model runs; afterwards atoms of the tensors that they were made equal to stand for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ..fixes import Expression, Input, Live, Op
from ..slim.call_sites import Spot, can_be_written
from ..slim.mask import Site
from ..slim.size_expressions import leaves, may_change
from .atoms import FIXED, Axis
from .record import BiasRows, Equation, Record, RoleOf, SeenStatistic
from .size_equations import Sizes, equation, handles, sizes_of
from .trace import Run
from .traced_int import TracedInt, as_int, of_run


@dataclass(frozen=True)
class Factory:
    """A function that makes a tensor: where its sizes are, and whether it is filled with zeros."""

    position: int
    zero: bool = False


FACTORIES = {
    'zeros': Factory(0, True), 'ones': Factory(0), 'empty': Factory(0), 'full': Factory(0), 'eye': Factory(0),
    'rand': Factory(0), 'randn': Factory(0),
    'new_zeros': Factory(1, True), 'new_ones': Factory(1), 'new_empty': Factory(1), 'new_full': Factory(1),
}  # fmt: skip
LONGEST = 1 << 16  # what is longer holds positions


def factory(run: Run, name: str, args: Any, out: Tensor) -> None:
    """Give each size of a new tensor that could be a width atoms of its own."""
    made = FACTORIES[name]
    sizes = sizes_of(args, made.position)
    if name == 'eye':
        _square(run, sizes, out)
    elif len(sizes.values) == out.dim():
        run.set(out, [_own(run, sizes, i, made.zero) for i in range(out.dim())])


def _square(run: Run, sizes: Sizes, out: Tensor) -> None:
    """Let the rows and the columns of an identity be the same units."""
    if out.shape[0] != out.shape[1]:
        return
    axes = [_own(run, sizes, i, False) for i in range(len(sizes.values))]
    for axis in axes[1:]:
        run.equate(axes[0], axis, 'an identity')
    run.set(out, [axes[0], axes[0]])


@handles('expand', 'broadcast_to', 'repeat')
def _spread(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    """Give a width over which one value is repeated atoms of its own: `gate.expand(-1, self.channels, -1, -1)`."""
    sizes, source, axes = sizes_of(args, 1), args[0].shape, list(run.axes(out))
    for i, size in enumerate(sizes.values):
        at = i - len(sizes.values)
        if axes[i] is None and as_int(size) == out.shape[i] and (-at > len(source) or source[at] == 1):
            axes[i] = _own(run, sizes, i, False)
    run.set(out, axes)


def _own(run: Run, sizes: Sizes, i: int, zero: bool) -> Axis | None:
    value, where = of_run(sizes.values[i], run), sizes.place(i)
    if not 1 < as_int(value) < LONGEST or not _could_be_width(value, where):
        return None
    axis = run.new_axis(as_int(value), zero)
    equation(run, value, axis.atoms, where)
    return axis


def _could_be_width(value: int, where: Spot | None) -> bool:
    """Say whether a size follows from attributes or widths, or is a number that can be replaced in the source."""
    if isinstance(value, TracedInt) and leaves(value.expression, Input):
        return False
    if isinstance(value, TracedInt) and may_change(value.expression):
        return True
    return can_be_written(where)


# -- after the run -----------------------------------------------------------------------------------------------------
def resolve_(record: Record, real: int) -> None:
    """Let atoms of parameters and buffers, the first `real`, stand for all others; `FIXED` where none is the same."""
    table = record.table
    if table.size == real:
        return
    component, _ = table.solve()
    first = np.full(len(component), FIXED, np.int64)
    first[component[:real][::-1]] = np.arange(real)[::-1]
    stands = np.append(np.where(np.arange(table.size) < real, np.arange(table.size), first[component]), FIXED)
    made = np.append(np.where(np.arange(table.size) < real, np.arange(table.size), FIXED), FIXED)
    table.resolve_(stands, real)
    fixed = {number for number, atoms in enumerate(record.axes) if (stands[atoms] == FIXED).all()}
    _resolve_axes_(record, fixed, lambda atoms: stands[atoms])
    record.roles = [RoleOf(made[found.atoms], found.role) for found in record.roles]
    record.biases = [BiasRows(made[pair.weight], made[pair.bias]) for pair in record.biases]
    record.gates = [made[atoms] for atoms in record.gates]
    record.summed = [stands[atoms] for atoms in record.summed]
    record.batched = [stands[atoms] for atoms in record.batched]
    record.read = {(new := stands[atoms]).tobytes(): new for atoms in record.read.values()}
    record.scales = [found._replace(query=stands[found.query]) for found in record.scales]
    record.grouped = [found._replace(rows=stands[found.rows]) for found in record.grouped]


def _resolve_axes_(record: Record, fixed: set[int], stand: Callable[[np.ndarray], np.ndarray]) -> None:
    """Resolve the axes of a record, and let those that no tensor's atoms stand for be sizes of the input."""
    old = record.axes

    def plain(expr: Expression) -> Expression:
        if isinstance(expr, Op):
            return Op(expr.symbol, plain(expr.left), plain(expr.right))
        return Input(len(old[expr.axis])) if isinstance(expr, Live) and expr.axis in fixed else expr

    def resolved(found: Equation) -> Equation:
        target = found.target
        if isinstance(target, Live) and target.axis in fixed:
            target = len(old[target.axis])
        return found._replace(expression=plain(found.expression), target=target)

    record.renumber_([stand(atoms) for atoms in old])
    record.sizes = [
        found for found in map(resolved, record.sizes) if isinstance(found.target, Live) or may_change(found.expression)
    ]
    record.constants = [found for found in map(resolved, record.constants) if may_change(found.expression)]
    pairs = [type(pair)(plain(pair.left), plain(pair.right)) for pair in record.equalities]
    record.equalities = [pair for pair in pairs if leaves(pair.left, Live) or leaves(pair.right, Live)]
    record.statistics = [
        SeenStatistic(Site(*found.site), None) if found.axis in fixed else found for found in record.statistics
    ]
