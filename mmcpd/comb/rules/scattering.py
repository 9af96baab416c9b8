"""Operations that write into a tensor at the places that an index says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..atoms import Axis, along
from ..trace import Call, Run
from .movement import place, some


def scatter(run: Run, call: Call) -> None:
    # scatter(self, dim, index, src | value), scatter_add, scatter_reduce(..., reduce), index_add(self, dim, index,
    # source), index_copy, index_fill(self, dim, index, value): the other dimensions meet position by position
    into: Tensor = call.named['self']
    dim, index = call.named['dim'] % max(into.dim(), 1), call.named['index']
    source = call.named.get('src', call.named.get('source'))
    parts = [into, *(t for t in (index, source) if isinstance(t, Tensor) and t.dim() == into.dim() > 1)]
    if index.dim() != into.dim() or into.dim() == 1:
        run.freeze_all(index, f'channels in an index ({call.op}) in {run.where}')
    result: list[Axis | None] = []
    for d, size in enumerate(into.shape):
        met = [run.axes(part)[d] for part in parts]
        if d == dim or any(part.shape[d] != size for part in parts):
            for axis in met:
                run.freeze(axis, f'written to by a fixed index ({call.op}) in {run.where}')
            result.append(None)
            continue
        bare = any(a is None and p.shape[d] > 1 and p.stride(d) != 0 for a, p in zip(met, parts, strict=True))
        result.append(_joined(run, call, met, bare, [into, source]))
    run.set(call.out, result)


def _joined(
    run: Run, call: Call, met: Sequence[Axis | None], bare: bool, values: Sequence[Tensor | None]
) -> Axis | None:
    """Make axes equal that meet, and return that of the result; it is zero where all that is written is."""
    known = [axis for axis in met if axis is not None]
    for axis in known[1:]:
        run.equate(known[0], axis, call.op)
    if not known or bare:
        run.equate(known[0] if known else None, None, call.op)
        return None
    written = [axis for axis in (met[0], met[-1] if values[1] is not None else None) if axis is not None]
    zero = all(axis.zero for axis in written) and (len(written) == 2 or _is_zero(call.named.get('value')))
    return Axis(known[0].atoms, zero)


def _is_zero(value: object) -> bool:
    return isinstance(value, (int, float, Tensor)) and float(value) == 0


def index_put(run: Run, call: Call) -> None:
    # index_put(self, indices, values, accumulate): values broadcast to self[indices]
    into, indices, values = call.named['self'], call.named['indices'], call.named['values']
    picked = _picked_dims(indices)
    result = list(run.axes(into))
    for index in (i for i in indices if i is not None):
        run.freeze_all(index, f'channels in an index ({call.op}) in {run.where}')
    given = run.axes(values)
    met: set[int] = set()
    for d, axis in enumerate(run.axes(into)):
        if d in picked:
            run.freeze(axis, f'written to by a fixed index ({call.op}) in {run.where}')
            result[d] = None
        elif axis is not None:
            labels = torch.ops.aten.index(along(axis, d, into.shape), [i if i is None else some(i) for i in indices])
            found: list[Axis | None] = [None] * labels.dim()
            if labels.numel():
                place(run, call, axis, labels, found)
            back = next((b for b in range(1, labels.dim() + 1) if found[-b] is not None), 0)
            met.add(back)
            result[d] = _overwritten(run, call, axis, found[-back], values, back) if back else axis
    for back, own in enumerate(reversed(given), 1):
        if back not in met:
            run.freeze(own, f'written to by a fixed index ({call.op}) in {run.where}')
    run.set(call.out, result)


def _overwritten(run: Run, call: Call, axis: Axis, found: Axis | None, values: Tensor, back: int) -> Axis | None:
    """Return the axis of what values were written into; a value for all channels is one that is zero nowhere."""
    own = run.axes(values)[-back] if values.dim() >= back else None
    if values.dim() >= back and values.shape[-back] > 1 and (own is not None or values.stride(-back)):
        run.equate(found, own, call.op)
        if own is None:
            return None
    zero = own.zero if own is not None else not values.dim() and _is_zero(values)
    return axis.activation(axis.zero and zero)


def _picked_dims(indices: Sequence[Tensor | None]) -> set[int]:
    """Return the dimensions that indices pick; a mask of booleans covers as many as it has."""
    picked: set[int] = set()
    dim = 0
    for index in indices:
        span = index.dim() if index is not None and index.dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            picked.update(range(dim, dim + span))
        dim += span
    return picked
