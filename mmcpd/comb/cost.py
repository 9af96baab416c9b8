"""The cost of the slimmed model as a closed formula of `Keep`: no forward pass, exact at every moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cost:
    """What a model costs at the traced input.

    Attributes:
        macs: multiply-accumulates of convolutions, matrix products and attentions.
        params: parameter elements.
        memory: bytes (float32) of the outputs of those operations.
    """

    macs: Any
    params: Any
    memory: Any

    def __getitem__(self, metric: str) -> Any:
        return getattr(self, metric)


COSTS = ('macs', 'params', 'memory')


@dataclass(frozen=True)
class Formula:
    """A sum of products `constant * live(axis) * live(axis) ...`.

    Attributes:
        constants: `(terms,)` int64.
        factors: `(terms, most)` axis numbers, padded with the number of a dummy axis that is always 1.
    """

    constants: np.ndarray
    factors: np.ndarray

    @classmethod
    def of(cls, terms: list[tuple[int, tuple[int, ...]]], dummy: int) -> Formula:
        merged: dict[tuple[int, ...], int] = {}
        for constant, axes in terms:
            key = tuple(sorted(axes))
            merged[key] = merged.get(key, 0) + constant
        most = max((len(axes) for axes in merged), default=0)
        factors = np.full((len(merged), most), dummy, np.int64)
        for i, axes in enumerate(merged):
            factors[i, : len(axes)] = axes
        return cls(np.fromiter(merged.values(), np.int64, len(merged)), factors)

    def __call__(self, live: np.ndarray) -> int:
        """Evaluate at the live counts `(axes + 1,)`, the last of which is the dummy's 1."""
        return int((self.constants * live[self.factors].prod(axis=1)).sum())
