"""Calls whose sizes no expression names: they are those of another tensor (`x.expand_as(y)`), or lie in strides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .atoms import Axis
from .size_equations import handles
from .trace import Run


@handles('view_as', 'reshape_as')
def _view_as(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    """Couple the channels of a view with those of the tensor whose sizes it has."""
    for axis, other in zip(run.axes(out), run.axes(args[1]), strict=True):
        if axis is not None or other is not None:
            run.equate(axis, other, run.cursor.function)


@handles('expand_as')
def _expand_as(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    _broadcast(run, args[:2], [out])


@handles('broadcast_tensors')
def _broadcast_tensors(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    _broadcast(run, args, out)


@handles('as_strided', 'as_strided_')
def _as_strided(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    run.freeze_all(out, f'its sizes and strides stand in {run.cursor.function} in {run.where}')


def _broadcast(run: Run, tensors: Sequence[Tensor], outs: Sequence[Tensor]) -> None:
    """Couple the channels of tensors that take one shape; what has one value there becomes as wide as they are."""
    shape = outs[0].shape
    axes: list[list[Axis | None]] = [[*[None] * (len(shape) - t.dim()), *run.axes(t)] for t in tensors]
    sizes = [[1] * (len(shape) - t.dim()) + list(t.shape) for t in tensors]
    for place, size in enumerate(shape):
        first = next((each[place] for each in axes if each[place] is not None), None)
        for own, its in zip(axes, sizes, strict=True):
            if first is not None and its[place] == size:
                run.equate(own[place], first, run.cursor.function)
            elif first is not None:
                own[place] = Axis(first.atoms, zero=False)
    for out, found in zip(outs, axes, strict=False):
        run.set(out, found)
