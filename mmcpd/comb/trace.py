"""A run: where it is, and what a rule may do while it goes on; what it says about the model is a `Record`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..cost import Term
from ..coupling import OperationAt, Role
from ..fixes import CodePlace, Live
from ..slim.call_sites import Spot, code_place, in_own_function
from ..slim.mask import LAST_DIMENSION, REDUCTIONS, SOFTMAXES, Site
from .atoms import Axes, Axis, Row
from .record import BiasRows, Note, Record, RoleOf, ScaledQuery, SeenStatistic
from .storages import Storages
from .unused import Ran

AXES = '_mmcpd_axes'  # the attribute of a running tensor that holds its axes
INPUT = '_mmcpd_input'  # the attribute of one that was made of the model's inputs alone


class Policy(NamedTuple):
    """What is given up where there is a choice."""

    whole_heads: np.ndarray | None = None  # `(atoms,)` bool: those of heads that go whole; None: heads become narrower
    narrowed: frozenset[str] = frozenset()  # paths of the grouped convolutions that lose channels inside each group
    leave_unused: bool = False  # whether the channels go that a layer which never ran may use
    divisors: frozenset[str] = frozenset()  # parameters and buffers that are not zero where masked
    pictures: np.ndarray | None = None  # `(atoms,)` int: of those that a view lays out as pictures, how many channels
    transparent: frozenset[CodeType] = frozenset()  # code in which `int(width)` stays a width


@dataclass
class Cursor:
    """Where a run is; no rule needs to know more than `Run` tells of it."""

    paths: dict[nn.Module | None, str]  # of each module
    path: list[str] = field(default_factory=lambda: [''])  # of the running modules, the innermost last
    widths: list[set[int]] = field(default_factory=lambda: [set()])  # of channels that they met
    function: str = ''  # the Python function that runs, as its caller sees it
    padded: int = 0  # how many dimensions, the last ones, it pads
    pairs: Sequence[int] = ()  # the dimensions of its output that are pairs (see `pairs_of`)
    names: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # one of the atoms tied to each


class Call(NamedTuple):
    """One operation as the dispatcher saw it, its arguments by their names in the schema."""

    op: str  # 'add', 'convolution', ...: in-place and out-of-place forms share a name
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    out: Any

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments, lists included."""
        return _tensors(self.named.values())

    def outputs(self) -> list[Tensor]:
        """Return every tensor that came out."""
        return _tensors([self.out])


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    flat = (v for value in values for v in (value if isinstance(value, (list, tuple)) else [value]))
    return [v for v in flat if isinstance(v, Tensor)]


def _fit(axes: Axes, shape: torch.Size) -> bool:
    """Say whether axes are those of a tensor of this shape; not where it was resized in place since."""
    return len(axes) == len(shape) and all(axis is None or len(axis) == n for axis, n in zip(axes, shape, strict=True))


class Run:
    """What a rule may say about the operation that runs; it ends in a `Record`."""

    def __init__(self, policy: Policy, cursor: Cursor, ran: Ran) -> None:
        self.policy, self.record, self.cursor, self.ran = policy, Record(), cursor, ran
        self.real = 0  # atoms of parameters and buffers; those of tensors that the forward makes come behind them
        self.counts = True  # whether what runs now is part of the model's cost
        self.storages = Storages()

    # -- where it is -------------------------------------------------------------------------------------------------
    @property
    def module(self) -> str:
        """The path of the module that is running."""
        return self.cursor.path[-1]

    @property
    def where(self) -> str:
        """The same for messages."""
        return self.module or 'the model itself'

    # -- axes of running tensors -------------------------------------------------------------------------------------
    def axes(self, tensor: Tensor) -> Axes:
        found: Axes | None = getattr(tensor, AXES, None) or self.storages.find(tensor)
        return found if found and _fit(found, tensor.shape) else (None,) * tensor.dim()

    def set(self, tensor: Tensor, axes: Sequence[Axis | None]) -> None:
        assert len(axes) == tensor.dim(), (len(axes), tensor.shape)
        fitting = tuple(axis and axis.fitting(tensor.shape) for axis in axes)
        setattr(tensor, AXES, fitting)
        if any(fitting):
            self.storages.note(tensor, fitting)

    def is_bare(self, tensor: Any) -> bool:
        """Say whether a tensor holds nothing that is known: written over, it is what was written."""
        return (
            isinstance(tensor, Tensor)
            and not any(self.axes(tensor))
            and not hasattr(tensor, INPUT)
            and not self.storages.has_views(tensor)
        )

    def of_weights(self, tensor: Tensor) -> bool:
        """Say whether a tensor is made of parameters and buffers alone, or a number."""
        axes = [axis for axis in self.axes(tensor) if axis is not None]
        return all(axis.weight for axis in axes) if axes else tensor.numel() == 1

    def origin(self, tensor: Tensor) -> str:
        """Say whose the channels of a tensor are that no layer produces."""
        return "the model's input channels" if hasattr(tensor, INPUT) else 'channels that no layer produces'

    # -- equations ---------------------------------------------------------------------------------------------------
    def equate(self, left: Axis | None, right: Axis | None, what: str) -> None:
        """Make two axes equal; an axis that meets nothing, or one of another length, is frozen."""
        if left is not None and right is not None and len(left) != len(right):
            for axis in (left, right):
                self.freeze(axis, f'{what} of {len(left)} with {len(right)} channels in {self.where}')
        elif left is not None and right is not None:
            self.record.table.equate(left.atoms, right.atoms, f'{what} with a fixed position in {self.where}')
        else:
            self.record.foreign.update(len(axis) for axis in (left, right) if axis is not None)
            self.freeze(left or right, f'{what} with channels that no layer produces in {self.where}')

    def new_axis(self, size: int, zero: bool) -> Axis:
        """Make an axis of a tensor that the forward made anew; see `mmcpd.comb.fresh`."""
        table = self.record.table
        table.size += size
        return Axis(np.arange(table.size - size, table.size), zero)

    def layered(self, tensor: Tensor) -> bool:
        """Say whether a tensor has channels of a parameter or buffer, not of what the forward made anew alone."""
        atoms = [axis.atoms for axis in self.axes(tensor) if axis is not None]
        return any(bool(((each >= 0) & (each < self.real)).any()) for each in atoms)

    def depth(self, axis: Axis) -> int:
        """Return the dimension of the parameter that the atoms of an axis come from; positions lie behind channels."""
        row = self._row(axis)
        return 0 if row is None else row.dim

    def tensor_of(self, axis: Axis) -> str:
        """Return the name of the parameter or buffer that the last of an axis's atoms comes from, '' of others."""
        row = self._row(axis)
        return '' if row is None else row.tensor

    def _row(self, axis: Axis) -> Row | None:
        rows, atom = self.record.table.rows, int(axis.atoms.max())
        found = bisect_right(rows, atom, key=lambda row: row.start) - 1
        return rows[found] if 0 <= atom < self.real else None

    def freeze(self, axis: Axis | None, reason: str) -> None:
        if axis is not None:
            self.record.table.freeze(axis.atoms, reason)

    def freeze_each(self, axes: Sequence[Axis | None], what: str) -> None:
        for axis in axes:
            self.freeze(axis, f'{what} in {self.where}')

    def freeze_space(self, x: Tensor, space: int) -> None:
        """Freeze the last dimensions; what a view laid out along one is noted, for a run that takes its channels."""
        axes = self.axes(x)[x.dim() - space :]
        for axis in axes:
            if axis is not None and not axis.weight and axis.full is not None and x.dim() > space:
                atoms = axis.all_atoms()
                self.record.pictures[atoms[(atoms >= 0) & (atoms < self.real)]] = x.shape[-space - 1]
        self.freeze_each(axes, 'a spatial dimension')

    def freeze_all(self, tensor: Tensor, reason: str) -> None:
        for axis in self.axes(tensor):
            self.freeze(axis, reason)

    def tie(self, atoms: np.ndarray) -> None:
        """Make all columns of `(n, k)` atoms equal, row by row; fixed positions are passed over."""
        first = atoms.max(axis=1, keepdims=True)  # an atom wherever the row has one
        other = (atoms >= 0) & (atoms != first)
        pairs = np.stack([atoms[other], np.broadcast_to(first, atoms.shape)[other]])
        if pairs.size:
            names, table = self._names(), self.record.table
            left, right = np.divmod(np.unique(pairs[0] * table.size + pairs[1]), table.size)  # over windows each is met
            table.equate(left, right, '')
            names[left] = names[right]

    def _names(self) -> np.ndarray:
        """Return the names of all atoms that there are by now."""
        names, size = self.cursor.names, self.record.table.size
        if len(names) < size:
            self.cursor.names = np.concatenate([names, np.arange(len(names), size)])
        return self.cursor.names

    def tied_names(self, atoms: Tensor) -> Tensor:
        """Return one name for atoms that were tied, as int32; `FIXED` stays."""
        if not len(self.cursor.names):
            return atoms
        names = torch.from_numpy(self._names().astype(np.int32))
        return torch.where(atoms >= 0, names[atoms.clamp(min=0)], atoms)

    # -- what else the record holds ----------------------------------------------------------------------------------
    def role(self, axis: Axis | None, role: Role) -> None:
        if axis is not None:
            self.record.roles.append(RoleOf(axis.atoms, role))

    def beside(self, weight: Axis, bias: Axis) -> None:
        """Note which bias belongs to which rows of a weight."""
        self.record.biases.append(BiasRows(weight.atoms, bias.atoms))

    def sums(self, axis: Axis | None) -> None:
        """Note that an operation goes over all channels of an axis: whoever does reads them."""
        if axis is not None:
            self.record.summed.append(axis.atoms)

    def directions(self, axis: Axis) -> bool:
        """Note rows that are divided by their norm; say whether they are those of a parameter, which can be noted."""
        held = any(row.size == len(axis) and row.start == axis.atoms[0] for row in self.record.table.rows)
        if whole := held and bool((np.diff(axis.atoms) == 1).all()):
            self.record.directions.append(axis.atoms)
        return whole

    def never_zero(self, tensor: Tensor) -> None:
        """Note the vectors (a scale, a variance) that an operation cannot take zeros of: the layer before is masked.

        What is computed from activations is zero by itself: a statistic leaves it out, or the trial tells.
        """
        for axis in self.axes(tensor):
            if axis is not None and axis.zero and axis.weight:
                names = self._held(axis)
                if all(self.record.table.is_vector(name) for name in names):
                    self.record.divisors |= names

    def _held(self, axis: Axis) -> frozenset[str]:
        """Return the names of the parameters and buffers that the atoms of an axis belong to."""
        rows, atoms = self.record.table.rows, axis.all_atoms()
        held = atoms[(atoms >= 0) & (atoms < self.real)]
        return frozenset(rows[bisect_right(rows, atom, key=lambda row: row.start) - 1].tensor for atom in held)

    def gate(self, axis: Axis) -> None:
        """Note the producer of one factor of a product of two activations."""
        self.record.gates.append(axis.all_atoms())

    def statistic(self, axis: Axis | None, dim: int, width: int) -> None:
        """Note a statistic over `width` positions of `dim`, which counts from the end; without channels too."""
        module, place = code_place()
        path = self.cursor.paths.get(module, self.module)  # also where it was called without its hooks
        place = CodePlace(path, place.function, place.instructions)
        if axis is not None and in_own_function():  # also where its `apply` was taken from it before the run
            self.record.notes.add(Note.OWN_BACKWARD)
        number = None if axis is None else self.record.number(axis.atoms)
        self.record.statistics.append(SeenStatistic(Site(place, dim, width), number))

    def over_kept(self, axis: Axis | None, dim: int, width: int, what: str) -> None:
        """Note a statistic that masking can take over the kept channels; freeze one that it cannot.

        It can where a module's method, or what that calls, calls the function itself, and does not go through another
        one of torch that calls it.
        """
        function = self.cursor.function
        known = function in REDUCTIONS | SOFTMAXES or (function in LAST_DIMENSION and dim == -1)
        if known and code_place()[0] is not None:
            self.statistic(axis, dim, width)
        else:
            self.freeze(axis, f'{what} over channels in {self.where}')

    def reads(self, tensors: Iterable[Tensor], *, weights: bool = True) -> None:
        """Note that an operation computes with these tensors, with or without those made of weights alone."""
        for axis in (axis for tensor in tensors for axis in self.axes(tensor)):
            if axis is not None and (weights or not axis.weight):
                atoms = axis.all_atoms()
                self.record.read.setdefault(atoms.tobytes(), atoms)

    def scaled(self, query: Axis, place: Spot | None = None) -> None:
        """Note that an attention divides by the square root of this query's width."""
        atoms = query.all_atoms()
        self.record.scales.append(ScaledQuery(atoms, self.record.number(query.atoms), self.module, place))

    def unsupported(self, op: str) -> None:
        self.record.unsupported[OperationAt(op, self.where)] += 1

    def cost(self, sizes: Sequence[int], axes: Sequence[Axis | None]) -> None:
        """Count as many multiply-accumulates as the product of these sizes."""
        if self.counts:
            self.record.macs.append(self._term(sizes, axes))

    def output(self, tensor: Tensor, axes: Sequence[Axis | None]) -> None:
        """Set the axes of an output that is stored for the backward pass, and count its elements."""
        self.set(tensor, axes)
        if self.counts:
            self.record.elements.append(self._term(tensor.shape, axes))

    def _term(self, sizes: Sequence[int], axes: Sequence[Axis | None]) -> Term:
        constant = math.prod(size for size, axis in zip(sizes, axes, strict=True) if axis is None)
        return Term(constant, tuple(self.record.number(a.atoms) for a in axes if a is not None))

    # -- sizes -------------------------------------------------------------------------------------------------------
    def width(self, axis: Axis) -> Live:
        """Return the live count of an axis as an expression, and note that it was read."""
        self.record.notes.add(Note.WIDTH_READ)
        return Live(self.record.number(axis.atoms))

    def atoms_of(self, width: Live) -> np.ndarray:
        return self.record.axes[width.axis]
