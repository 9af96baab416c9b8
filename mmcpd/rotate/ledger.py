"""Which rows and columns of parameters meet in a forward: the bookkeeping of one observed run.

Every row (index of the first dimension) and every column (of the second) of every parameter has a number. A running
tensor that turns as rows turn, as the output of a layer does, carries at each position the number of its row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .report import HeadKind, SkippedHeads

ZERO, UNKNOWN = 0, -1  # a position that is zero whatever the rows are; one that no row makes
FREE = -1  # in a table: nothing yet


@dataclass(frozen=True, eq=False)
class Rows:
    """The row at each position of a running tensor.

    Attributes:
        numbers: int32, the tensor's shape; None where they can be followed no further.
        weight: it is a parameter or a view of one.
        lost: what was done to the tensor so that it no longer turns as its rows do, '' if nothing.
    """

    numbers: Tensor | None
    weight: bool = False
    lost: str = ''


class Position(NamedTuple):
    """Row `row` (`dim` 0) or column `row` (`dim` 1) of a parameter."""

    tensor: str
    dim: int
    row: int


@dataclass(frozen=True, eq=False)
class Space:
    """Rows that share a basis, `(width,)`, as one product of activations met them."""

    rows: np.ndarray
    kind: HeadKind
    attention: str


class Ledger:
    """Number the rows and columns of a model, and keep what a run says about them."""

    def __init__(self, model: nn.Module) -> None:
        self.spaces: list[Space] = []
        self.skipped: dict[SkippedHeads, None] = {}  # in the order in which they were met
        self.names: list[str] = []
        self.starts: dict[str, int] = {}
        self.sizes: dict[str, tuple[int, int]] = {}  # rows, columns
        total = 1
        for name, parameter in model.named_parameters():
            if parameter.dim() and parameter.device.type != 'meta':
                rows, columns = parameter.shape[0], parameter.shape[1] if parameter.dim() > 1 else 0
                self.names.append(name)
                self.starts[name], self.sizes[name] = total, (rows, columns)
                total += rows + columns
        self._first = np.array([self.starts[name] for name in self.names], np.int64)
        self.partner = np.full(total, FREE, np.int64)  # of a row: the row or column that it is multiplied with
        self.space = np.full(total, FREE, np.int64)
        self.bias = np.full(total, FREE, np.int64)  # of a row: that of its bias, ZERO where it has none
        self.owner = np.full(total, FREE, np.int64)  # of a bias: its row
        self._reason = np.zeros(total, np.int64)
        self._reasons = ['']

    # -- numbers -----------------------------------------------------------------------------------------------------
    def rows(self, name: str) -> Tensor:
        """Return the numbers of a parameter's rows, `(rows,)` int32."""
        return torch.arange(self.starts[name], self.starts[name] + self.sizes[name][0], dtype=torch.int32)

    def columns(self, name: str) -> np.ndarray:
        """Return the numbers of a parameter's columns."""
        start = self.starts[name] + self.sizes[name][0]
        return np.arange(start, start + self.sizes[name][1])

    def position(self, number: int) -> Position:
        """Return what a number stands for."""
        name = self.names[int(np.searchsorted(self._first, number, side='right')) - 1]
        offset, rows = number - self.starts[name], self.sizes[name][0]
        return Position(name, int(offset >= rows), int(offset - rows if offset >= rows else offset))

    # -- what a run says ---------------------------------------------------------------------------------------------
    def spoil(self, numbers: np.ndarray, reason: str) -> None:
        """Leave these alone; the first reason counts."""
        numbers = numbers[numbers > ZERO]
        fresh = numbers[self._reason[numbers] == 0]
        if len(fresh):
            self._reason[fresh] = len(self._reasons)
            self._reasons.append(reason)

    def spoil_tensors(self, numbers: np.ndarray, reason: str) -> None:
        """Leave all rows and columns of the parameters alone to which these rows belong."""
        for number in np.unique(np.searchsorted(self._first, numbers[numbers > ZERO], side='right') - 1):
            name = self.names[number]
            self.spoil(np.arange(self.starts[name], self.starts[name] + sum(self.sizes[name])), reason)

    def reason(self, numbers: np.ndarray) -> str:
        """Return why one of these is left alone, or ''."""
        found = self._reason[numbers[numbers > ZERO]]
        return self._reasons[int(found[found > 0].min())] if bool(found.any()) else ''

    def pair(self, left: np.ndarray, right: np.ndarray) -> None:
        """Note that rows are multiplied with rows or columns, position by position."""
        self._link(self.partner, left, right)
        self._link(self.partner, right, left)

    def give_bias(self, rows: np.ndarray, bias: np.ndarray) -> None:
        """Note which bias each row has, ZERO for none."""
        self._link(self.bias, rows, bias)
        has = bias > ZERO
        self._link(self.owner, bias[has], rows[has])

    def _link(self, table: np.ndarray, numbers: np.ndarray, others: np.ndarray) -> None:
        known = (numbers > ZERO) & (others >= ZERO)
        self.spoil(numbers[~known], 'it meets channels that no layer makes')
        self.spoil(others[~known], 'it meets channels that no layer makes')
        numbers, others = numbers[known], others[known]
        first = table[numbers] == FREE
        table[numbers[first]] = others[first]
        clash = table[numbers] != others
        for numbered in (numbers[clash], others[clash]):
            self.spoil(numbered, 'it is used twice: keys or values that several heads share, or a second reader')

    def add_space(self, rows: np.ndarray, kind: HeadKind, attention: str) -> None:
        """Note the rows of one head."""
        if bool((rows <= ZERO).any()):
            self.spoil(rows, 'it meets channels that no layer makes')
            return
        known = np.unique(self.space[rows])
        if len(known) == 1 and known[0] != FREE and np.array_equal(self.spaces[known[0]].rows, rows):
            return
        if known[-1] != FREE:
            self.spoil(rows, 'its channels are grouped into heads in two ways')
        self.space[rows] = len(self.spaces)
        self.spaces.append(Space(rows, kind, attention))


def numbers_in(numbers: Tensor) -> np.ndarray:
    """Return each number of a running tensor once."""
    for dim in range(numbers.dim()):  # what does not vary needs no time
        if numbers.stride(dim) == 0 and numbers.shape[dim] > 1:
            numbers = numbers.narrow(dim, 0, 1)
    return np.unique(numbers.numpy()).astype(np.int64)


def along(numbers: Tensor, dims: Iterable[int]) -> Tensor | None:
    """Return numbers without dimensions along which they are all the same, zeros passed over; None where they vary.

    Example:
        >>> along(torch.tensor([[3, 4], [3, 4], [0, 0]]), [0])
        tensor([3, 4])
        >>> along(torch.tensor([[3, 4], [5, 6]]), [0]) is None
        True
    """
    dims = tuple(dims)
    if numbers.numel() == 0:
        return None
    for dim in dims:  # what does not vary needs no time
        if numbers.stride(dim) == 0:
            numbers = numbers.narrow(dim, 0, 1)
    top = numbers.amax(dims, keepdim=True) if dims else numbers
    same = bool(((numbers == top) | (numbers == ZERO)).all()) and bool((top > ZERO).any())
    return top.squeeze(dims) if same else None
