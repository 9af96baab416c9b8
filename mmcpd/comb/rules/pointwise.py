"""Element-wise operations: what meets after broadcasting is equal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..atoms import Axis
from ..trace import Call, Trace
from .table import ZERO_STAYS, rule, same, unknown


def _zero_after(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """Say whether a point-wise result is zero where a position is removed, given the axes that met there."""
    op = call.op
    if op == 'mul':
        return any(axis.zero for axis in met)
    if op in ('div', 'true_divide'):
        return bool(getattr(call.named.get('self'), 'dim', None)) and met[0].zero
    if not all(axis.zero for axis in met):
        return False
    if op in ('add', 'sub', 'rsub', 'maximum', 'minimum', 'lerp', 'addcmul'):
        scalar = call.named.get('other')
        return len(met) == operands and (isinstance(scalar, Tensor) or scalar in (None, 0))
    if op in ('clamp', 'hardtanh'):
        low = call.named.get('min', call.named.get('min_val', -1 if op == 'hardtanh' else None))
        high = call.named.get('max', call.named.get('max_val', 1 if op == 'hardtanh' else None))
        if isinstance(low, Tensor) or isinstance(high, Tensor):
            return len(met) == operands  # a bound for each channel, which is zero where the channel is
        return (low is None or low <= 0) and (high is None or high >= 0)
    if op in ('clamp_min', 'clamp_max'):
        bound = call.named.get('min', call.named.get('max'))
        return isinstance(bound, (int, float)) and (bound <= 0 if op == 'clamp_min' else bound >= 0)
    if op == 'pow':
        exponent = call.named.get('exponent')
        return isinstance(exponent, (int, float)) and exponent > 0
    return op in ZERO_STAYS


def pointwise(trace: Trace, call: Call) -> None:
    """Make the axes that meet after broadcasting equal. A size of one, or a stride of zero, is a broadcast."""
    out: Tensor = call.out if isinstance(call.out, Tensor) else call.out[0]
    tensors = call.tensors()
    result: list[Axis | None] = []
    for back in range(out.dim(), 0, -1):
        met: list[Axis] = []
        bare = False
        for tensor in tensors:
            if tensor.dim() < back or tensor.shape[-back] == 1:
                continue
            axis = trace.axes(tensor)[-back]
            if axis is not None:
                met.append(axis)
            elif tensor.stride(-back) != 0 and tensor.shape[-back] > 1:
                bare = True
        if not met:
            result.append(None)
            continue
        first = met[0]
        for axis in met[1:]:
            trace.equate(first, axis, call.op)
        if bare:  # frozen from here on, so nothing that follows needs to know
            trace.equate(first, None, call.op)
            result.append(None)
            continue
        weight = all(axis.weight for axis in met) and len(met) == len(tensors)
        zero = _zero_after(call, met, len(tensors))
        if call.op == 'add' and len(met) == 2 and met[0].weight != met[1].weight:  # a bias that is added by itself
            activation, bias = sorted(met, key=lambda axis: axis.weight)
            trace.biases.append((activation.atoms, bias.atoms))
        full = first.full if first.full is not None and first.full.dim() == out.dim() else None
        result.append(Axis(first.atoms, zero, weight, full))
    for tensor in [call.out] if isinstance(call.out, Tensor) else call.out:
        if isinstance(tensor, Tensor) and tensor.shape == out.shape:
            trace.set(tensor, tuple(result))


@rule('zeros_like', 'ones_like', 'full_like', 'empty_like', 'rand_like', 'randn_like', 'bernoulli', 'fill', 'zero')
def like(trace: Trace, call: Call) -> None:
    axes = trace.axes(call.tensors()[0])
    trace.set(call.out, tuple(a and a.activation(call.op in ('zeros_like', 'zero')) for a in axes))


@rule('as_strided')  # as_strided(self, size, stride, storage_offset): only a relabelling of strides is understood
def as_strided(trace: Trace, call: Call) -> None:
    source = call.named['self']
    moved = any(s > 1 and a != b for s, a, b in zip(source.shape, source.stride(), call.out.stride(), strict=False))
    if call.out.shape != source.shape or moved:
        unknown(trace, call)
    else:
        same(trace, call)


@rule('copy', 'log_sigmoid_forward')  # copy_(self, src, non_blocking); neither is tagged as point-wise
def copy(trace: Trace, call: Call) -> None:
    pointwise(trace, call)
