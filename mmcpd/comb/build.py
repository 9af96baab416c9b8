"""Turn the equations of a trace into groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..names import match
from .atoms import Row
from .expressions import leaves
from .groups import Comb, Frozen, Group, Member, SizeRule
from .source import site
from .trace import Equation, Term, Trace

ROLES = ('free', 'stat', 'affine', 'in', 'out')
IGNORED = 'ignored by the user'
ALONE = 'coupled to all other channels of its tensors: one unit, which cannot go'


class _Rows:
    """Look up atoms: which tensor, dimension and row each one is."""

    def __init__(self, trace: Trace) -> None:
        self.rows = trace.table.rows
        starts = np.array([r.start for r in self.rows], np.int64)
        self.row_of = np.repeat(np.arange(len(self.rows)), [r.size for r in self.rows])
        self.offset = np.arange(trace.table.size) - starts[self.row_of] if self.rows else np.empty(0, np.int64)
        self.role = np.zeros(trace.table.size, np.int8)
        for atoms, role in trace.roles:
            self.role[atoms[atoms >= 0]] = ROLES.index(role)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number]


def build(model: nn.Module, trace: Trace, ignore: Sequence[str], faults: Mapping[str, str]) -> Comb:
    """Solve the equations and name the groups.

    Args:
        model: the model that was traced.
        trace: what the run said.
        ignore: patterns of group names that the user freezes.
        faults: group name -> reason; what a trial found wrong.

    Raises:
        ValueError: if a pattern of `ignore` matches no group.
    """
    rows = _Rows(trace)
    component, why = trace.table.solve()
    _require_producer(trace, rows, component, why)
    groups, unit_of = _groups(trace, rows, component, why)
    alone = {group.name: ALONE for group in groups if group.units == 1}
    freeze = alone | _ignored(groups, ignore) | dict(faults)
    for group in groups:
        if group.name in freeze:
            trace.table.reasons.append(freeze[group.name])
            member = group.members[0]
            row = next(r for r in rows.rows if r.tensor == member.tensor and r.dim == member.dim)
            why[component[row.start + member.index.numpy().flatten()]] = len(trace.table.reasons) - 1
    if freeze:
        groups, unit_of = _groups(trace, rows, component, why)
    return _assemble(model, trace, rows, component, why, groups, unit_of)


def coupled_by_groups(trace: Trace) -> frozenset[str]:
    """Return the modules whose convolution groups all hang together, as behind a channel shuffle.

    None of their groups can go whole; the same channel of each group can.
    """
    if not trace.grouped:
        return frozenset()
    component, why = trace.table.solve()
    found = set()
    for path, rows in trace.grouped:
        mine = component[rows]
        if (mine == mine[0]).all() and why[mine[0]] < 0:
            found.add(path)
    return frozenset(found)


def _ignored(groups: list[Group], ignore: Sequence[str]) -> dict[str, str]:
    return dict.fromkeys(match(ignore, [g.name for g in groups]), IGNORED)


def _require_producer(trace: Trace, rows: _Rows, component: np.ndarray, why: np.ndarray) -> None:
    """Freeze what no weight produces: kernel sizes, tokens, tables, and parameters that the run never met."""
    produced = np.zeros(len(why), bool)
    produced[component[rows.role == ROLES.index('out')]] = True
    lonely = ~produced & (why < 0)
    if lonely.any():
        trace.table.reasons.append('not a channel of any weight in this forward pass')
        why[lonely] = len(trace.table.reasons) - 1


def _groups(trace: Trace, rows: _Rows, component: np.ndarray, why: np.ndarray) -> tuple[list[Group], np.ndarray]:
    """Return the groups, and for each atom its unit's number or -1."""
    unit_of = np.full(trace.table.size, -1, np.int64)
    free = np.flatnonzero(why[component] < 0)
    if not len(free):
        return [], unit_of
    free = free[np.argsort(component[free], kind='stable')]  # by component, then by atom
    starts = np.flatnonzero(np.diff(component[free], prepend=-1))
    lengths = np.diff(starts, append=len(free))
    # Units whose atoms lie in the same (tensor, dim, role) pattern form a group; a random number stands for each
    # pattern element, and their sum for the pattern.
    codes = np.random.default_rng(0).integers(1, 2**62, len(rows.rows) * len(ROLES), dtype=np.uint64)
    marks = codes[rows.row_of[free] * len(ROLES) + rows.role[free]]
    signatures = np.stack([np.add.reduceat(marks, starts), lengths.astype(np.uint64)], axis=1)
    _, which = np.unique(signatures, axis=0, return_inverse=True)
    order = _producer_order(trace, rows)
    found = []
    for units in _by_value(which.ravel()):
        atoms = free[starts[units][:, None] + np.arange(lengths[units[0]])]  # (units, atoms of a unit)
        atoms = atoms[np.argsort(atoms[:, 0], kind='stable')]
        pattern = rows.row_of[atoms[0]]
        if not (rows.row_of[atoms] == pattern).all():
            raise RuntimeError('two patterns of tensors share one signature; change the seed of the codes')
        producers = dict.fromkeys(pattern[rows.role[atoms[0]] == ROLES.index('out')].tolist())
        first = min(producers, key=lambda r: order.get(r, len(order)))
        found.append((order.get(first, len(order)), int(atoms[0, 0]), first, atoms))
    found.sort(key=lambda f: f[:2])
    gate_rows = _gates(trace)
    groups: list[Group] = []
    names: dict[str, int] = {}
    number = 0
    for _, _, first, atoms in found:
        path = rows[first].tensor.rsplit('.', 1)[0] if '.' in rows[first].tensor else rows[first].tensor
        if rows[first].tensor.endswith('in_proj_weight'):
            path = rows[first].tensor[: -len('_weight')]
        names[path] = names.get(path, 0) + 1
        name = path if names[path] == 1 else f'{path}#{names[path]}'
        members = _members(rows, atoms)
        cut = tuple(m for m in members if m.role == 'in') + _members(rows, atoms, gate_rows)
        groups.append(Group(name, members, len(atoms), cut or tuple(m for m in members if m.role == 'out')))
        unit_of[atoms] = np.arange(number, number + len(atoms))[:, None]
        number += len(atoms)
    return groups, unit_of


def _by_value(labels: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each value."""
    order = np.argsort(labels, kind='stable')
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _producer_order(trace: Trace, rows: _Rows) -> dict[int, int]:
    order: dict[int, int] = {}
    for atoms, role in trace.roles:
        real = atoms[atoms >= 0]
        if role == 'out' and len(real):
            order.setdefault(int(rows.row_of[real[0]]), len(order))
    return order


def _gates(trace: Trace) -> np.ndarray:
    """Mark the rows, weight and bias, that produce one factor of a product of two activations."""
    marked = np.zeros(trace.table.size, bool)
    for atoms in trace.gates:
        marked[atoms[atoms >= 0]] = True
    for weight, bias in trace.biases:
        both = (weight >= 0) & (bias >= 0)
        marked[bias[both]] |= marked[weight[both]]
    return marked


def _members(rows: _Rows, atoms: np.ndarray, marked: np.ndarray | None = None) -> tuple[Member, ...]:
    """Split the atoms of all units, (units, n), by tensor and dimension; only those marked, where `marked` is given."""
    members = []
    pattern = rows.row_of[atoms[0]]
    for row in dict.fromkeys(pattern.tolist()):
        columns = atoms[:, pattern == row]
        if marked is not None:
            chosen = marked[columns]
            if not chosen.any():
                continue
            counts = chosen.sum(axis=1)
            if (counts != counts[0]).any():  # not the same in every unit: the whole member is the gate
                chosen[:] = True
                counts[:] = columns.shape[1]
            columns = columns[chosen].reshape(len(atoms), -1)
        index = torch.from_numpy(rows.offset[columns].copy())
        members.append(Member(rows[row].tensor, rows[row].dim, index, ROLES[int(rows.role[columns[0, 0]])]))
    return tuple(members)


class _AxisBook:
    """Number the axes that costs, norms and sizes refer to, each once."""

    def __init__(self, unit_of: np.ndarray) -> None:
        self.unit_of, self.axes = unit_of, list[np.ndarray]()
        self.known: dict[bytes, int] = {}

    def number(self, atoms: np.ndarray) -> int:
        units = np.where(atoms >= 0, self.unit_of[atoms], -1)
        key = units.tobytes()
        if key not in self.known:
            self.known[key] = len(self.axes)
            self.axes.append(units)
        return self.known[key]

    def terms(self, terms: list[Term]) -> list[tuple[int, tuple[int, ...]]]:
        return [(t.constant, tuple(self.number(a) for a in t.axes)) for t in terms]

    def expression(self, expr: Any) -> Any:
        if not isinstance(expr, tuple):
            return expr
        if expr[0] in ('attr', 'input'):
            return expr
        if expr[0] == 'live':
            return ('live', self.number(expr[1]))
        return (expr[0], self.expression(expr[1]), self.expression(expr[2]))


def _assemble(
    model: nn.Module,
    trace: Trace,
    rows: _Rows,
    component: np.ndarray,
    why: np.ndarray,
    groups: list[Group],
    unit_of: np.ndarray,
) -> Comb:
    book = _AxisBook(unit_of)
    parameters = dict(model.named_parameters())
    shapes = {n: tuple(t.shape) for n, t in [*parameters.items(), *model.named_buffers()]}
    by_dim = {(r.tensor, r.dim): np.arange(r.start, r.start + r.size) for r in rows.rows}
    params = []
    for name in parameters:
        axes = tuple(by_dim[name, d] for d, s in enumerate(shapes[name]) if s > 1)
        params.append(Term(1, axes))
    equal = {repr(e): e for e in ((book.expression(left), book.expression(right)) for left, right in trace.equal)}
    norms = {(site.module, book.number(site.axis), site.dim): None for site in trace.norms}
    return Comb(
        groups=groups,
        frozen=_frozen(trace, rows, component, why),
        unsupported=dict(trace.unsupported),
        axes=book.axes,
        macs=book.terms(trace.macs),
        memory=book.terms(trace.memory),
        params=book.terms(params),
        norms=[n for n in norms if (book.axes[n[1]] >= 0).any()],
        scales=_scales(trace, rows, book),
        sizes=_sizes(model, trace, trace.sizes, book),
        numbers=[rule for rule in _sizes(model, trace, trace.numbers, book) if rule.site is not None],
        equal=list(equal.values()),
        shapes=shapes,
        parameters=tuple(parameters),
    )


def _sizes(model: nn.Module, trace: Trace, equations: list[Equation], book: _AxisBook) -> list[SizeRule]:
    """Translate the equations, each once, with their place in the source: for where attributes cannot satisfy all."""
    modules = dict(model.named_modules())
    found: dict[str, SizeRule] = {}
    for equation in equations:
        expr, target = book.expression(equation.expression), equation.target
        by_attributes = bool(leaves(expr, 'attr')) and not leaves(expr, 'live')
        constant = isinstance(target, int)
        number = target if isinstance(target, int) else book.number(target)
        widths = [leaf[1] for leaf in leaves(expr, 'live')] + ([] if constant else [number])
        if not by_attributes and not any((book.axes[w] >= 0).any() for w in widths):
            continue
        key = repr(
            (
                expr,
                number,
                constant,
                equation.module,
                equation.place and (equation.place.instruction, equation.place.index),
            )
        )
        if key not in found:
            place = equation.place
            path = equation.module if place is None else trace.paths.get(id(place.module), equation.module)
            where = None if place is None else site(modules[path], path, place)
            found[key] = SizeRule(expr, number, constant, where)
    return list(found.values())


def _scales(trace: Trace, rows: _Rows, book: _AxisBook) -> list[tuple[list[tuple[str, int, list[int]]], int, str]]:
    found: dict[str, Any] = {}
    if not trace.scales:
        return []
    bias_of = {int(w): int(b) for ws, bs in trace.biases for w, b in zip(ws, bs, strict=True) if w >= 0 and b >= 0}
    for scale in trace.scales:
        axis = book.number(scale.width)
        if not (book.axes[axis] >= 0).any():
            continue
        # The label names one head; the rows of all heads are tied to it, in the same tensor and piece of it.
        atoms = scale.query[scale.query >= 0]
        every = [*atoms.tolist(), *(bias_of[a] for a in atoms.tolist() if a in bias_of)]
        pieces: dict[tuple[str, int], list[int]] = {}
        for atom in every:
            row = rows[int(rows.row_of[atom])]
            pieces.setdefault((row.tensor, row.dim), []).append(int(rows.offset[atom]))
        key = repr((sorted(pieces.items()), axis))
        found[key] = ([(t, d, i) for (t, d), i in pieces.items()], axis, scale.module)
    return list(found.values())


def _frozen(trace: Trace, rows: _Rows, component: np.ndarray, why: np.ndarray) -> list[Frozen]:
    found = []
    reason = why[component]
    for row in rows.rows:
        mine = reason[row.start : row.start + row.size]
        for number in np.unique(mine[mine >= 0]):
            found.append(Frozen(row.tensor, row.dim, int((mine == number).sum()), trace.table.reasons[int(number)]))
    return found


def default_forward(model: nn.Module, *inputs: Any) -> Any:
    """Call the model on its inputs."""
    return model(*inputs)
