"""The cost of the slimmed model as a closed formula of a keep: no forward pass, exact at every moment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_array

COSTS = ('macs', 'params', 'memory')
BYTES = 4  # of one activation, in float32


@dataclass(frozen=True)
class Cost:
    """What a model costs at the example input.

    Attributes:
        macs: multiply-accumulates of convolutions, matrix products and attentions.
        params: parameter elements.
        memory: bytes (float32) of the outputs of those operations.
    """

    macs: int
    params: int
    memory: int

    def __getitem__(self, metric: str) -> int:
        return int(getattr(self, metric))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.params - other.params, self.memory - other.memory)


@dataclass(frozen=True)
class Term:
    """A product `constant * live(axis) * live(axis) ...`; axes are named by their numbers."""

    constant: int
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CostModel:
    """Sums of products of live counts, one sum a metric."""

    units: int  # of all groups
    axes: tuple[np.ndarray, ...]  # the unit of each position of each axis, `(n,)` int64, -1 where it is fixed
    macs: tuple[Term, ...]
    params: tuple[Term, ...]  # parameter elements
    elements: tuple[Term, ...]  # of stored activations

    def live(self, kept: np.ndarray) -> np.ndarray:
        """Return the number of kept positions of each axis, `(axes,)` int64, for a boolean vector over all units."""
        matrix, fixed, which = self._counts
        return (matrix @ kept.astype(np.int64) + fixed)[which]

    def __call__(self, kept: np.ndarray) -> Cost:
        """Return the cost for a boolean vector over all units."""
        live = np.append(self.live(kept), 1)  # a dummy axis that is always 1 pads the terms
        macs, params, elements = (
            int((constants * live[factors].prod(axis=1)).sum()) for constants, factors in self._formulas
        )
        return Cost(macs, params, BYTES * elements)

    @cached_property
    def _counts(self) -> tuple[csr_array, np.ndarray, np.ndarray]:
        """Count the units and the fixed positions of the axes that differ, and say which of them each axis is."""
        distinct = {axis.tobytes(): axis for axis in self.axes}
        number = {key: i for i, key in enumerate(distinct)}
        axes = list(distinct.values())
        row = np.repeat(np.arange(len(axes)), [int((a >= 0).sum()) for a in axes])
        column = np.concatenate([np.empty(0, np.int64), *(a[a >= 0] for a in axes)])
        matrix = csr_array((np.ones(len(row), np.int64), (row, column)), shape=(len(axes), self.units))
        fixed = np.array([int((a < 0).sum()) for a in axes], np.int64)
        return matrix, fixed, np.array([number[axis.tobytes()] for axis in self.axes], np.int64)

    @cached_property
    def _formulas(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        return tuple(_formula(terms, len(self.axes)) for terms in (self.macs, self.params, self.elements))


def _formula(terms: tuple[Term, ...], dummy: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the constants `(terms,)` and the axes `(terms, most)` of a sum, like terms merged."""
    merged: dict[tuple[int, ...], int] = {}
    for term in terms:
        key = tuple(sorted(term.axes))
        merged[key] = merged.get(key, 0) + term.constant
    factors = np.full((len(merged), max(map(len, merged), default=0)), dummy, np.int64)
    for i, axes in enumerate(merged):
        factors[i, : len(axes)] = axes
    return np.fromiter(merged.values(), np.int64, len(merged)), factors
