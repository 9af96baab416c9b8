"""Solve the equations of a record, and name the groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import nn

from ..cost import CostModel, Term
from ..coupling import Coupling, Frozen, Group, LayerKind, Member, Role, TensorInfo, Widths
from ..example import Example
from ..names import match
from ..slim.mask import named_tensors
from .fixing import fixes_of, freeze_unscaled
from .record import ROLES, Lookup, Record

Shapes = dict[str, tuple[int, ...]]
OUTPUT = 'model output'
IGNORED = 'ignored by the user'
UNREAD = 'nothing that ran reads it: it goes into an output that `forward=` drops, or where combing does not see it'
SINGLE = 'all channels are coupled into a single unit; a group needs two or more'


def group(
    model: nn.Module,
    record: Record,
    example: Example,
    ignore: Sequence[str] = (),
    faults: Mapping[str, str] | None = None,
) -> Coupling:
    """Solve the equations of an observed model and name the groups.

    Groups that a pattern of `ignore` matches, or that stand in `faults` (name -> reason, of a trial), are frozen.

    Raises:
        ValueError: if a pattern of `ignore` matches no group.
    """
    rows, parameters = Lookup(record), dict(model.named_parameters()).keys()
    freeze_unscaled(model, record)
    component, why = record.table.solve()
    _require_producer(record, rows, component, why)
    _require_reader(record, component, why)
    groups, unit_of = _groups(record, rows, component, why, parameters)
    single = {found.name: SINGLE for found in groups if found.units == 1}
    freeze = single | dict.fromkeys(match(ignore, [found.name for found in groups]), IGNORED) | dict(faults or {})
    for found in groups:
        if found.name in freeze:
            record.table.reasons.append(freeze[found.name])
            member = found.members[0]
            row = next(r for r in rows.rows if r.tensor == member.tensor and r.dim == member.dim)
            why[component[row.start + member.index.numpy().flatten()]] = len(record.table.reasons) - 1
    if freeze:
        groups, unit_of = _groups(record, rows, component, why, parameters)
    return _assembled(model, record, rows, groups, unit_of, component, why, example)


def coupled_by_groups(record: Record) -> frozenset[str]:
    """Return the modules whose convolution groups are all coupled, as behind a channel shuffle.

    None of their groups can go whole; the same channel of each group can.
    """
    if not record.grouped:
        return frozenset()
    component, why = record.table.solve()
    return frozenset(
        convolution.module
        for convolution, components in ((c, component[c.rows]) for c in record.grouped)
        if (components == components[0]).all() and why[components[0]] < 0
    )


def frozen_by_groups(record: Record) -> frozenset[str]:
    """Return the modules whose convolution groups are all frozen: the same channel of each group may still go."""
    if not record.grouped:
        return frozenset()
    component, why = record.table.solve()
    return frozenset(c.module for c in record.grouped if (why[component[c.rows]] >= 0).all())


def heads_of(record: Record) -> np.ndarray:
    """Mark the atoms that are channels of attention heads, `(atoms,)` bool: only there whole heads can go."""
    component, _ = record.table.solve()
    atoms = np.concatenate([np.empty(0, np.int64), *record.batched])
    return np.isin(component, component[atoms[atoms >= 0]])


def _require_producer(record: Record, rows: Lookup, component: np.ndarray, why: np.ndarray) -> None:
    """Freeze what no weight produces: kernel sizes, tokens, tables, and parameters that the run never met."""
    produced = np.zeros(len(why), bool)
    produced[component[rows.role == ROLES.index(Role.PRODUCER)]] = True
    unmade = ~produced & (why < 0)
    if unmade.any():
        record.table.reasons.append('no layer that ran produces it: a position, a table or an unused part')
        why[unmade] = len(record.table.reasons) - 1


def _require_reader(record: Record, component: np.ndarray, why: np.ndarray) -> None:
    """Freeze what nothing reads: something that was not seen may."""
    read = np.zeros(len(why), bool)
    for atoms in record.summed:
        read[component[atoms[atoms >= 0]]] = True
    unread = ~read & (why < 0)
    if unread.any():
        record.table.reasons.append(UNREAD)
        why[unread] = len(record.table.reasons) - 1


def _groups(
    record: Record, rows: Lookup, component: np.ndarray, why: np.ndarray, parameters: Collection[str]
) -> tuple[list[Group], np.ndarray]:
    """Return the groups, and for each atom its unit's number or -1."""
    unit_of = np.full(record.table.size, -1, np.int64)
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
    order = _producer_order(record, rows)
    found = []
    for units in _by_value(which.ravel()):
        atoms = free[starts[units][:, None] + np.arange(lengths[units[0]])]  # (units, atoms of a unit)
        atoms = atoms[np.argsort(atoms[:, 0], kind='stable')]
        pattern = rows.row_of[atoms[0]]
        if not (rows.row_of[atoms] == pattern).all():
            raise RuntimeError('two patterns of tensors share one signature; change the seed of the codes')
        producers = dict.fromkeys(pattern[rows.role[atoms[0]] == ROLES.index(Role.PRODUCER)].tolist())
        first = min(producers, key=lambda r: order.get(r, len(order)))
        found.append((order.get(first, len(order)), int(atoms[0, 0]), first, atoms))
    found.sort(key=lambda f: f[:2])
    gate_rows = _gates(record)
    groups: list[Group] = []
    names: dict[str, int] = {}
    number = 0
    for _, _, first, atoms in found:
        tensor = rows.rows[first].tensor
        packed = tensor.endswith('in_proj_weight')
        path = tensor.removesuffix('_weight') if packed else tensor.rpartition('.')[0] or tensor
        names[path] = names.get(path, 0) + 1
        name = path if names[path] == 1 else f'{path}#{names[path]}'
        members = _members(rows, atoms)
        groups.append(Group(name, members, len(atoms), _cut(members, _members(rows, atoms, gate_rows), parameters)))
        unit_of[atoms] = np.arange(number, number + len(atoms))[:, None]
        number += len(atoms)
    return groups, unit_of


def _cut(members: tuple[Member, ...], gates: tuple[Member, ...], parameters: Collection[str]) -> tuple[Member, ...]:
    """Return where a gate's gradient is read: at the consumers, or behind the producers where a consumer has none."""
    cut = tuple(m for m in members if m.role is Role.CONSUMER) + gates
    if cut and all(member.tensor in parameters for member in cut):
        return cut
    made = [[m for m in members if m.role is role and m.tensor in parameters] for role in (Role.AFFINE, Role.PRODUCER)]
    return tuple(made[0] or made[1])  # before a norm it would be noise


def _by_value(labels: np.ndarray) -> list[np.ndarray]:
    """Return the positions of each value."""
    order = np.argsort(labels, kind='stable')
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _producer_order(record: Record, rows: Lookup) -> dict[int, int]:
    order: dict[int, int] = {}
    for made in record.roles:
        real = made.atoms[made.atoms >= 0]
        if made.role is Role.PRODUCER and len(real):
            order.setdefault(int(rows.row_of[real[0]]), len(order))
    return order


def _gates(record: Record) -> np.ndarray:
    """Mark the rows, weight and bias, that produce one factor of a product of two activations."""
    marked = np.zeros(record.table.size, bool)
    for atoms in record.gates:
        marked[atoms[atoms >= 0]] = True
    for pair in record.biases:
        both = (pair.weight >= 0) & (pair.bias >= 0)
        marked[pair.bias[both]] |= marked[pair.weight[both]]
    return marked


def _members(rows: Lookup, atoms: np.ndarray, marked: np.ndarray | None = None) -> tuple[Member, ...]:
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
        members.append(Member(rows.rows[row].tensor, rows.rows[row].dim, index, ROLES[int(rows.role[columns[0, 0]])]))
    return tuple(members)


def _assembled(
    model: nn.Module,
    record: Record,
    rows: Lookup,
    groups: list[Group],
    unit_of: np.ndarray,
    component: np.ndarray,
    why: np.ndarray,
    example: Example,
) -> Coupling:
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    by_dim = {(r.tensor, r.dim): np.arange(r.start, r.start + r.size) for r in rows.rows}
    params = [
        Term(1, tuple(record.number(by_dim[name, dim]) for dim, size in enumerate(parameter.shape) if size > 1))
        for name, parameter in parameters.items()
    ]
    axes = tuple(np.where(atoms >= 0, unit_of[atoms], -1) for atoms in record.axes)
    live = [bool((units >= 0).any()) for units in axes]
    return Coupling(
        groups=tuple(groups),
        frozen=tuple(_frozen(record, rows, component, why)),
        unsupported=dict(record.unsupported),
        cost_model=CostModel(
            sum(found.units for found in groups), axes, tuple(record.macs), tuple(params), tuple(record.elements)
        ),
        fixes=fixes_of(model, record, rows, live),
        tensors={name: TensorInfo(shape, name in parameters) for name, shape in shapes.items()},
        widths=_widths(record, rows, unit_of, component, why, shapes),
        example=example,
        unused=record.unused,
    )


def _widths(
    record: Record, rows: Lookup, unit_of: np.ndarray, component: np.ndarray, why: np.ndarray, shapes: Shapes
) -> tuple[Widths, ...]:
    """Count the channels that each kind of layer produces, and those that norms scale."""
    atoms = np.concatenate([np.empty(0, np.int64), *record.batched])
    heads = np.isin(component, component[atoms[atoms >= 0]])
    reason = why[component]
    outputs = (reason >= 0) & (np.array([*record.table.reasons, ''])[reason] == OUTPUT)
    counted: Counter[LayerKind] = Counter()
    free: Counter[LayerKind] = Counter()
    for row in (row for row in rows.rows if not row.tensor.endswith('bias')):
        own = slice(row.start, row.start + row.size)
        layer = LayerKind.LINEAR if len(shapes[row.tensor]) == 2 else LayerKind.CONVOLUTION
        made = (rows.role[own] == ROLES.index(Role.PRODUCER)) & ~outputs[own]
        scaled = rows.role[own] == ROLES.index(Role.AFFINE)
        parts = {LayerKind.ATTENTION: made & heads[own], layer: made & ~heads[own], LayerKind.NORM: scaled}
        for kind, part in parts.items():
            counted[kind] += int(part.sum())
            free[kind] += int((part & (unit_of[own] >= 0)).sum())
    return tuple(Widths(kind, free[kind], counted[kind]) for kind in LayerKind if counted[kind])


def _frozen(record: Record, rows: Lookup, component: np.ndarray, why: np.ndarray) -> list[Frozen]:
    reason = why[component]
    return [
        Frozen(row.tensor, row.dim, int(count), record.table.reasons[number])
        for row in rows.rows
        for number, count in zip(*np.unique(reason[row.start : row.start + row.size], return_counts=True), strict=True)
        if number >= 0
    ]
