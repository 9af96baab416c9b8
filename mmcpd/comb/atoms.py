"""Atoms and the equations between them: the data that combing is made of.

Every index of every dimension (longer than one) of every parameter and buffer is one **atom**, an integer. A running
tensor carries, for each dimension, either nothing or an `Axis`: the atoms that its positions come from. Operations
state that two axes are the same (`equate`) or that an axis may not change (`freeze`); `solve` then takes all equations
at once and returns the connected components.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

FIXED = -1  # a position that comes from no atom: padding, or an activation without channels


@dataclass(frozen=True, eq=False)
class Axis:
    """The atoms along one dimension of a running tensor."""

    atoms: np.ndarray  # `(n,)` int64, `FIXED` where a position comes from no atom
    # Whether the values at a removed position are zero in the masked model. A sum over such an axis does not notice
    # that a position is gone; a sum over any other axis does.
    zero: bool = True
    weight: bool = False  # whether the tensor is made of parameters alone, not of activations
    # The atoms at every position of the tensor, int32 and broadcastable to its shape, where they differ along other
    # dimensions too (over heads, say); they are tied to `atoms`, which stands for all of them.
    full: Tensor | None = None

    def __len__(self) -> int:
        return len(self.atoms)

    def activation(self, zero: bool) -> Axis:
        """Return the same atoms as an axis of an activation."""
        return self if zero == self.zero and not self.weight else Axis(self.atoms, zero, full=self.full)

    def without_full(self) -> Axis:
        """Return the same atoms without those along other dimensions: for an output that has not the same ones."""
        return self if self.full is None else Axis(self.atoms, self.zero, self.weight)

    def fitting(self, shape: torch.Size) -> Axis:
        """Return the axis, without `full` where that does not fit a tensor's shape."""
        full = self.full
        if full is None or (
            full.dim() == len(shape) and all(a in (1, b) for a, b in zip(full.shape, shape, strict=True))
        ):
            return self
        return self.without_full()

    def all_atoms(self) -> np.ndarray:
        """Return all atoms that the axis stands for."""
        return self.atoms if self.full is None else np.unique(self.full.numpy()).astype(np.int64)


Axes = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Row:
    """One dimension of one parameter or buffer, and where its atoms begin."""

    tensor: str
    dim: int
    size: int
    start: int


@dataclass
class AtomTable:
    """All atoms of a model, the equations between them and the reasons why some may not be pruned."""

    rows: list[Row] = field(default_factory=list)
    size: int = 0
    reasons: list[str] = field(default_factory=list)  # in the order in which they were met
    _left: list[np.ndarray] = field(default_factory=list)
    _right: list[np.ndarray] = field(default_factory=list)
    _frozen: list[tuple[np.ndarray, int]] = field(default_factory=list)

    def add(self, name: str, tensor: Tensor) -> Axes:
        """Make the atoms of one parameter or buffer; dimensions of length one carry none."""
        axes: list[Axis | None] = []
        for dim, size in enumerate(tensor.shape):
            if size <= 1:
                axes.append(None)
                continue
            self.rows.append(Row(name, dim, size, self.size))
            axes.append(Axis(np.arange(self.size, self.size + size), weight=True))
            self.size += size
        return tuple(axes)

    def is_vector(self, name: str) -> bool:
        """Say whether a parameter or buffer has one dimension that is longer than one."""
        return sum(row.tensor == name for row in self.rows) == 1

    def equate(self, left: np.ndarray, right: np.ndarray, reason: str) -> None:
        """State that two vectors of atoms are the same; an atom that meets `FIXED` is frozen for `reason`."""
        if left is right:
            return
        one, other = left == FIXED, right == FIXED
        if one.any() or other.any():
            self.freeze(left[other], reason)
            self.freeze(right[one], reason)
            both = ~(one | other)
            left, right = left[both], right[both]
        self._left.append(left)
        self._right.append(right)

    def freeze(self, atoms: np.ndarray, reason: str) -> None:
        """State that these atoms may not be pruned."""
        atoms = atoms[atoms != FIXED]
        if not len(atoms):
            return
        if not self.reasons or self.reasons[-1] != reason:
            self.reasons.append(reason)
        self._frozen.append((atoms, len(self.reasons) - 1))

    def free_tensors(self, names: Set[str]) -> set[str]:
        """Return which of some tensors share an atom with any other tensor that is not frozen."""
        component, why = self.solve()
        parts = {row: component[row.start : row.start + row.size] for row in self.rows}
        elsewhere = np.concatenate([np.empty(0, np.int64), *(p for row, p in parts.items() if row.tensor not in names)])
        free = np.setdiff1d(elsewhere, np.flatnonzero(why >= 0))
        return {row.tensor for row, part in parts.items() if row.tensor in names and np.isin(part, free).any()}

    def says(self, reason: str) -> bool:
        """Say whether any atom is frozen for a reason."""
        return any(len(atoms) and self.reasons[number] == reason for atoms, number in self._frozen)

    def resolve_(self, stands: np.ndarray, size: int) -> None:
        """Let `stands[atom]` stand for each atom in all equations, of `size` atoms then; `FIXED` says nothing."""
        pairs = [(stands[left], stands[right]) for left, right in zip(self._left, self._right, strict=True)]
        both = [(left >= 0) & (right >= 0) for left, right in pairs]
        self._left = [left[known] for (left, _), known in zip(pairs, both, strict=True)]
        self._right = [right[known] for (_, right), known in zip(pairs, both, strict=True)]
        frozen = [(stands[atoms], reason) for atoms, reason in self._frozen]
        self._frozen = [(atoms[atoms >= 0], reason) for atoms, reason in frozen]
        self.size = size

    def solve(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the component of each atom, and for each component the index of its reason, or -1 where it is free."""
        left = np.concatenate([np.empty(0, np.int64), *self._left])
        right = np.concatenate([np.empty(0, np.int64), *self._right])
        graph = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.size, self.size))
        count, component = connected_components(graph, directed=False)
        why = np.full(count, -1, np.int64)
        for atoms, reason in reversed(self._frozen):  # the reason that was met first is written last
            why[component[atoms]] = reason
        return component, why


def along(axis: Axis, dim: int, shape: torch.Size) -> Tensor:
    """View the atoms of one axis as an int32 tensor of `shape`, with stride 0 wherever they do not vary."""
    if axis.full is not None:
        return axis.full.expand(shape)
    view = [1] * len(shape)
    view[dim] = len(axis)
    return torch.from_numpy(axis.atoms.astype(np.int32)).reshape(view).expand(shape)
