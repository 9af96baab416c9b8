"""What one run says about a model: the record, which grouping solves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, NamedTuple

import numpy as np

from ..compat import StrEnum
from ..cost import Term
from ..coupling import OperationAt, Role
from ..fixes import ComputedChannels, Equality, Expression, Live
from ..slim.call_sites import Spot
from ..slim.mask import Site
from .atoms import AtomTable

ROLES = (Role.FREE, Role.STATISTIC, Role.AFFINE, Role.CONSUMER, Role.PRODUCER)


class Note(StrEnum):
    """What a forward did that slicing alone may not reproduce."""

    WIDTH_READ = 'it read the width of a tensor'
    WIDTH_COMPUTED = 'it computed with a width'
    CACHED = 'it stored a tensor of a dense width on a module'
    OWN_BACKWARD = 'it ran an autograd.Function, whose backward is not seen'
    OVERWRITTEN = 'it wrote into a tensor whose views still count as zero where a unit is removed'


class RoleOf(NamedTuple):
    """What rows do for their units."""

    atoms: np.ndarray
    role: Role


class BiasRows(NamedTuple):
    """The rows of a weight beside those of its bias."""

    weight: np.ndarray
    bias: np.ndarray


class GroupedConvolution(NamedTuple):
    """A convolution that loses whole convolution groups, and the rows of its weight."""

    module: str
    rows: np.ndarray


class ScaledQuery(NamedTuple):
    """A query that an attention divides by the square root of its own width."""

    query: np.ndarray  # atoms of the query's producer, all heads
    axis: int  # the width of one head
    module: str
    spot: Spot | None = None  # the call that divides


class SeenStatistic(NamedTuple):
    """A statistic over the axis of this number, or over one without channels (None); see `fixes.Statistic`."""

    site: Site
    axis: int | None


class Equation(NamedTuple):
    """A size that a forward asked for, and what it must be: the live count of an axis, or a number."""

    expression: Expression
    target: Live | int
    module: str
    spot: Spot | None
    inferable: bool = False  # torch could work it out from the others


@dataclass
class Record:
    """All that one run says about a model; axes are named by their numbers in `axes`."""

    table: AtomTable = field(default_factory=AtomTable)
    axes: list[np.ndarray] = field(default_factory=list)  # atoms
    macs: list[Term] = field(default_factory=list)
    elements: list[Term] = field(default_factory=list)  # of the outputs of convolutions and matrix products
    statistics: list[SeenStatistic] = field(default_factory=list)
    squeezed: list[int] = field(default_factory=list)  # axes that go where their width is one
    scales: list[ScaledQuery] = field(default_factory=list)
    sizes: list[Equation] = field(default_factory=list)
    constants: list[Equation] = field(default_factory=list)  # widths that became a factor, and must stay what they were
    equalities: list[Equality] = field(default_factory=list)  # that the forward found
    compared: list[Equation] = field(default_factory=list)  # comparisons that can be written, and how they came out
    with_inputs: set[Hashable] = field(default_factory=set)  # places where it computed with a size of the input alone
    # What `int(size)` made of widths, by place; -1 of a size of the input.
    casts: dict[tuple[Any, CodeType, int], set[int]] = field(default_factory=dict)
    roles: list[RoleOf] = field(default_factory=list)
    read: dict[bytes, np.ndarray] = field(default_factory=dict)  # atoms that more than a movement of data read
    gates: list[np.ndarray] = field(default_factory=list)  # producers' rows at products of two activations
    directions: list[np.ndarray] = field(default_factory=list)  # rows that are divided by their norm
    divisors: set[str] = field(default_factory=set)  # vectors whose zeros a forward would divide by
    pictures: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # see `Policy`
    summed: list[np.ndarray] = field(default_factory=list)  # what a product or a statistic goes over
    batched: list[np.ndarray] = field(default_factory=list)  # channels of products of activations, head by head
    grouped: list[GroupedConvolution] = field(default_factory=list)
    biases: list[BiasRows] = field(default_factory=list)
    operations: set[str] = field(default_factory=set)  # that channels went through
    notes: set[Note] = field(default_factory=set)
    unsupported: Counter[OperationAt] = field(default_factory=Counter)
    unread: frozenset[str] = frozenset()  # parameters and buffers that no operation read
    plain: frozenset[str] = frozenset()  # tensors beside these two that channels met
    foreign: set[int] = field(default_factory=set)  # numbers of channels that met as many which no layer produces
    computed: dict[str, set[ComputedChannels]] = field(default_factory=dict)  # by modules without a weight
    unused: tuple[str, ...] = ()  # layers that never ran, and single tensors that nothing read
    _numbers: dict[bytes, int] = field(default_factory=dict)

    def number(self, atoms: np.ndarray) -> int:
        """Return the number of an axis with these atoms."""
        key = atoms.tobytes()
        if key not in self._numbers:
            self._numbers[key] = len(self.axes)
            self.axes.append(atoms)
        return self._numbers[key]

    def renumber_(self, axes: list[np.ndarray]) -> None:
        """Let other atoms have the numbers of the axes, in their order; of equal ones the first number counts."""
        self.axes = axes
        self._numbers = {atoms.tobytes(): number for number, atoms in reversed(list(enumerate(axes)))}


class Lookup:
    """Look up atoms: which tensor, dimension and row each one is."""

    def __init__(self, record: Record) -> None:
        self.rows = record.table.rows
        starts = np.array([r.start for r in self.rows], np.int64)
        self.row_of = np.repeat(np.arange(len(self.rows)), [r.size for r in self.rows])
        self.offset = np.arange(record.table.size) - starts[self.row_of] if self.rows else np.empty(0, np.int64)
        self.role = np.zeros(record.table.size, np.int8)
        for made in record.roles:
            self.role[made.atoms[made.atoms >= 0]] = ROLES.index(made.role)
