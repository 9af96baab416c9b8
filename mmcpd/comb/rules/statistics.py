"""Statistics: reductions, softmax and norms, over channels or not."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..atoms import Axis
from ..trace import Call, NormSite, Trace
from .pointwise import pointwise
from .table import rule


# -- reductions --------------------------------------------------------------------------------------------------------
def _over_dims(trace: Trace, call: Call, safe: bool, zero: bool) -> None:
    source = call.named.get('self', call.tensors()[0])
    dims = call.named.get('dim', -1 if call.op in ('sort', 'argsort', 'topk') else ())  # the schema leaves defaults out
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    dims = [d % source.dim() for d in dims] if dims else list(range(source.dim()))
    kept: list[Axis | None] = []
    for d, axis in enumerate(trace.axes(source)):
        if d in dims:
            if axis is not None and not (safe and axis.zero):
                trace.over_live(axis, d - source.dim(), call.op)
        else:
            kept.append(axis and axis.activation(axis.zero and zero))
    for out in [call.out] if isinstance(call.out, Tensor) else call.out:
        if out.dim() == source.dim():  # keepdim, or a scan
            full, rest = [], iter(kept)
            for d in range(source.dim()):
                full.append(None if d in dims else next(rest))
            trace.set(out, tuple(full))
        elif out.dim() == len(kept):
            trace.set(out, tuple(kept))


@rule('sum', 'linalg_vector_norm', 'norm', 'count_nonzero')  # zeros add nothing
def sum_(trace: Trace, call: Call) -> None:
    _over_dims(trace, call, safe=True, zero=True)


@rule('mean', 'amax', 'amin', 'max', 'min', 'var', 'std', 'var_mean', 'std_mean', 'cumsum', 'median')
def reduce(trace: Trace, call: Call) -> None:
    if call.named.get('other') is not None:
        pointwise(trace, call)
    else:
        _over_dims(trace, call, safe=False, zero=True)


@rule(
    'argmax',
    'argmin',
    'logsumexp',
    'prod',
    'any',
    'all',
    'sort',
    'argsort',
    'topk',
    'logcumsumexp',
    'cumprod',
)
def reduce_nonzero(trace: Trace, call: Call) -> None:
    _over_dims(trace, call, safe=False, zero=False)


@rule('_softmax', '_log_softmax', 'softmax', 'log_softmax', '_safe_softmax')  # _softmax(self, dim, half_to_float)
def softmax(trace: Trace, call: Call) -> None:
    axes = list(trace.axes(call.named['self']))
    dim = call.named['dim'] % len(axes)
    if (axis := axes[dim]) is not None:
        trace.over_live(axis, dim - len(axes), 'softmax')
    trace.set(call.out, tuple(a and a.activation(False) for a in axes))


# -- normalisation -----------------------------------------------------------------------------------------------------
def _affine(
    trace: Trace, axis: Axis | None, tensors: Sequence[tuple[Tensor | None, str]], what: str, dim: int = -1
) -> Axis | None:
    """Make dimension `dim` of a norm's parameters equal to its channel; the weight's atoms stand for the output."""
    result = axis
    for position, (tensor, role) in enumerate(tensors):
        if tensor is None or tensor.shape[dim] == 1:
            continue
        own = trace.axes(tensor)[dim]
        if axis is not None or own is not None:
            trace.equate(axis, own, what)
        trace.role(own, role)
        if position == 0 and own is not None and axis is not None:
            result = own
    weight, bias = tensors[0][0], tensors[1][0]
    if weight is not None and bias is not None and weight.shape[dim] > 1:
        w, b = trace.axes(weight)[dim], trace.axes(bias)[dim]
        if w is not None and b is not None:
            trace.biases.append((w.atoms, b.atoms))
    return result


@rule(
    'native_batch_norm',
    '_native_batch_norm_legit_no_training',
    '_native_batch_norm_legit',
    'cudnn_batch_norm',
    'miopen_batch_norm',
    '_batch_norm_impl_index',
    '_batch_norm_no_update',
    '_batch_norm_with_update',
)  # (input (N, C, ...), weight, bias, running_mean, running_var, ...)
def batch_norm(trace: Trace, call: Call) -> None:
    x = call.named['input']
    axes, named = trace.axes(x), call.named
    roles = (('weight', 'affine'), ('bias', 'affine'), ('running_mean', 'stat'), ('running_var', 'stat'))
    channel = _affine(trace, axes[1], [(named.get(n), role) for n, role in roles], 'batch norm')
    zero = named.get('weight') is not None or (axes[1] is not None and axes[1].zero)
    trace.set(call.out[0], (axes[0], channel and channel.activation(zero), *axes[2:]))


@rule('native_layer_norm')  # native_layer_norm(input, normalized_shape, weight, bias, eps)
def layer_norm(trace: Trace, call: Call) -> None:
    x, named = call.named['input'], call.named
    axes = trace.axes(x)
    span = len(named['normalized_shape'])
    weight, bias = named.get('weight'), named.get('bias')
    longer = [d for d in range(-span, 0) if x.shape[d] > 1]  # (C, 1, 1) normalises over channels alone
    if len(longer) > 1:
        for tensor in (t for t in (x, weight, bias) if t is not None):
            for axis in trace.axes(tensor)[-span:]:
                trace.freeze(axis, f'a layer norm over several dimensions in {trace.where}')
        trace.set(call.out[0], axes)
        return
    dim = longer[0] if longer else -1
    channel = _affine(trace, axes[dim], [(weight, 'affine'), (bias, 'affine')], 'layer norm', dim)
    if channel is not None:
        trace.norms.append(NormSite(trace.asking, channel.atoms, dim))
    result = [a and a.activation(False) for a in axes]
    result[dim] = channel and channel.activation(True)
    trace.set(call.out[0], tuple(result))


@rule('native_group_norm')  # native_group_norm(input, weight, bias, N, C, HxW, group, eps)
def group_norm(trace: Trace, call: Call) -> None:
    x, named = call.named['input'], call.named
    axes, groups = trace.axes(x), int(named['group'])
    tensors = [(named.get('weight'), 'affine'), (named.get('bias'), 'affine')]
    channel = _affine(trace, axes[1], tensors, 'group norm')
    if channel is not None:
        if groups > 1:  # the same channel of each group stays or goes, so that the groups stay equally wide
            trace.tie(channel.atoms.reshape(groups, -1).T)
        trace.norms.append(NormSite(trace.asking, channel.atoms, 1 - x.dim()))
    for axis in axes[2:]:
        trace.freeze(axis, f'a spatial dimension in {trace.where}')
    trace.set(call.out[0], (axes[0], channel and channel.activation(True), *axes[2:]))
