"""The cost of the slimmed model as a closed formula of a keep: no forward pass, exact at every moment."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from math import inf

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
        latency: predicted milliseconds of the exported file, 0 where no layer was timed (`mmcpd.deploy.with_latency`).
    """

    macs: int
    params: int
    memory: int
    latency: float = 0.0

    def __getitem__(self, metric: str) -> int:
        """Return one of `COSTS`, the whole numbers; latency is none, and would be cut to whole milliseconds."""
        if metric not in COSTS:
            raise KeyError(metric)
        return int(getattr(self, metric))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(
            self.macs - other.macs,
            self.params - other.params,
            self.memory - other.memory,
            self.latency - other.latency,
        )


@dataclass(frozen=True)
class Term:
    """A product `constant * live(axis) * live(axis) ...`; axes are named by their numbers."""

    constant: int
    axes: tuple[int, ...]


@dataclass(frozen=True)
class WidthGrid:
    """The widths at which a layer was timed, ascending and the dense one last, and the width of its kernel's steps.

    Between two multiples of `step` a narrower layer is not faster.
    """

    points: tuple[int, ...]
    step: int


@dataclass(frozen=True)
class StepTable:
    """The times of one layer in milliseconds over its live widths, row by row, on a grid of one to a few widths.

    The time at a width is that of the fastest layer which is at least so wide, as units that buy no time are kept.

    Example:
        >>> table = StepTable((WidthGrid((8, 16, 32), 8),), (1.0, 2.0, 4.0))
        >>> [table((width,)) for width in (32, 25, 24, 17, 16, 3)]
        [4.0, 4.0, 3.0, 3.0, 2.0, 1.0]
    """

    grids: tuple[WidthGrid, ...]
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        shape = [len(grid.points) for grid in self.grids]
        ascending = all(grid.step > 0 and list(grid.points) == sorted({*grid.points}) for grid in self.grids)
        if (
            not ascending
            or 0 in shape
            or len(self.times) != np.prod(shape)
            or not all(0 <= t < inf for t in self.times)
        ):
            raise ValueError(f'a table of {len(self.times)} times does not fit a grid of {shape} ascending widths')

    def __call__(self, widths: tuple[int, ...]) -> float:
        """Return milliseconds at these widths, one a grid, each at most the dense one."""
        at = tuple(max(0, -(-width // grid.step) - 1) for width, grid in zip(widths, self.grids, strict=True))
        return float(self._steps[at])

    @cached_property
    def _steps(self) -> np.ndarray:
        """The time at each multiple of the steps: linear between the points, nowhere above that of a wider layer."""
        values = np.reshape(self.times, [len(grid.points) for grid in self.grids])
        for axis, grid in enumerate(self.grids):
            ends = np.arange(grid.step, grid.points[-1] + grid.step, grid.step)
            values = np.apply_along_axis(partial(_interpolated, ends, grid.points), axis, values)
        for axis in range(values.ndim):
            values = np.flip(np.minimum.accumulate(np.flip(values, axis), axis), axis)
        return values


def _interpolated(widths: np.ndarray, points: tuple[int, ...], times: np.ndarray) -> np.ndarray:
    return np.interp(widths, points, times)


@dataclass(frozen=True)
class TimedLayer:
    """A layer's times, and the numbers of the axes that are its live widths."""

    table: StepTable
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predict the latency of the exported model: the times of its layers, and a rest that follows the activations.

    The rest is what the dense file takes beyond its layers alone: norms, activations, movement of data. Where the
    layers one by one take longer than the whole file, all are scaled to it.
    """

    dense: float  # measured milliseconds of the whole dense file
    layers: tuple[TimedLayer, ...]

    def __call__(self, live: np.ndarray, elements: float) -> float:
        """Return milliseconds for live counts, `(axes,)` int64, and this share of the dense model's activations."""
        whole = sum(self._dense_times)
        timed = sum(layer.table(tuple(int(live[axis]) for axis in layer.axes)) for layer in self.layers)
        return self.dense / max(whole, self.dense) * (timed + max(0.0, self.dense - whole) * elements)

    @cached_property
    def _dense_times(self) -> list[float]:
        return [layer.table(tuple(grid.points[-1] for grid in layer.table.grids)) for layer in self.layers]


@dataclass(frozen=True, eq=False)
class CostModel:
    """Sums of products of live counts, one sum a metric; and times of layers, where they were measured."""

    units: int  # of all groups
    axes: tuple[np.ndarray, ...]  # the unit of each position of each axis, `(n,)` int64, -1 where it is fixed
    macs: tuple[Term, ...]
    params: tuple[Term, ...]  # parameter elements
    elements: tuple[Term, ...]  # of stored activations
    latency: LatencyModel | None = None

    def live(self, kept: np.ndarray) -> np.ndarray:
        """Return the number of kept positions of each axis, `(axes,)` int64, for a boolean vector over all units."""
        matrix, fixed, which = self._counts
        return (matrix @ kept.astype(np.int64) + fixed)[which]

    def __call__(self, kept: np.ndarray) -> Cost:
        """Return the cost for a boolean vector over all units."""
        live = self.live(kept)
        macs, params, elements = self._sums(live)
        return Cost(macs, params, BYTES * elements, 0.0 if self.latency is None else self._milliseconds(live))

    def _milliseconds(self, live: np.ndarray) -> float:
        """Return the latency for live counts, `(axes,)` int64; the activations go down in the steps of the layers."""
        assert self.latency is not None
        stepped = np.minimum(-(-live // self._steps) * self._steps, self._dense)
        return self.latency(live, self._sums(stepped)[2] / max(1, self._sums(self._dense)[2]))

    @cached_property
    def _dense(self) -> np.ndarray:
        return np.array([len(axis) for axis in self.axes], np.int64)

    @cached_property
    def _steps(self) -> np.ndarray:
        """Return the widest step of the layers at each axis, `(axes,)` int64."""
        which = self._counts[2]
        steps = np.ones(len(which), np.int64)
        for layer in self.latency.layers if self.latency else ():
            for axis, grid in zip(layer.axes, layer.table.grids, strict=True):
                steps[which[axis]] = max(steps[which[axis]], grid.step)
        return steps[which]

    def _sums(self, live: np.ndarray) -> list[int]:
        """Return MACs, parameters and elements for live counts, `(axes,)` int64."""
        live = np.append(live, 1)  # a dummy axis that is always 1 pads the terms
        return [int((constants * live[factors].prod(axis=1)).sum()) for constants, factors in self._formulas]

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
