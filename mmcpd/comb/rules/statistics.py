"""Statistics: reductions, softmax and norms, over channels or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ...coupling import Role
from ..atoms import Axis
from ..trace import Call, Run
from .pointwise import Rule, meet


# -- reductions --------------------------------------------------------------------------------------------------------
def reduction(safe: bool = False, zero: bool = True, last: bool = False) -> Rule:
    """Return the rule of a reduction, a scan or a sort.

    Args:
        safe: zeros change nothing, as in a sum.
        zero: of zeros alone it is zero.
        last: without `dim` it goes over the last dimension, not over all.
    """

    def rule(run: Run, call: Call) -> None:
        if call.named.get('other') is not None:  # max(self, other)
            meet(run, call)
        else:
            _over_dims(run, call, safe, zero, last)

    return rule


def norm(run: Run, call: Call) -> None:
    # linalg_vector_norm(self, ord, dim, keepdim), norm(self, p, dim, keepdim): zeros count where the order is negative
    order = call.named.get('ord', call.named.get('p'))
    safe = not isinstance(order, int | float) or order >= 0
    _over_dims(run, call, safe=safe, zero=True, last=False)


def _over_dims(run: Run, call: Call, safe: bool, zero: bool, last: bool) -> None:
    source = call.named.get('self', call.tensors()[0])
    dims = call.named.get('dim', -1 if last else ())  # the schema leaves defaults out
    dims = [dims] if isinstance(dims, int) else list(dims or ())
    dims = [d % source.dim() for d in dims] if dims else list(range(source.dim()))
    kept: list[Axis | None] = []
    for d, axis in enumerate(run.axes(source)):
        if d in dims:
            run.sums(axis)
            if axis is None:
                run.statistic(None, d - source.dim(), source.shape[d])
            elif not (safe and axis.zero):
                run.over_kept(axis, d - source.dim(), len(axis), call.op)
        else:
            kept.append(axis and Axis(axis.atoms, axis.zero and zero, axis.weight, axis.full))
    for number, out in enumerate(call.outputs()):
        if number and out.dtype != source.dtype:  # positions
            kept = [axis and axis.activation(False) for axis in kept]
        if out.dim() == source.dim():  # keepdim, or a scan
            rest = iter(kept)
            run.set(out, [None if d in dims else next(rest) for d in range(source.dim())])
        elif out.dim() == len(kept):
            run.set(out, kept)


def softmax(run: Run, call: Call) -> None:
    # _softmax(self, dim, half_to_float)
    axes = list(run.axes(call.named['self']))
    dim = call.named['dim'] % len(axes)
    if (axis := axes[dim]) is not None:
        run.over_kept(axis, dim - len(axes), len(axis), 'softmax')
    else:
        run.statistic(None, dim - len(axes), call.out.shape[dim])
    # Taken over the kept channels alone it is zero elsewhere; over tokens each removed channel has its own.
    run.set(call.out, tuple(a and a.activation(d == dim) for d, a in enumerate(axes)))


# -- normalisation -----------------------------------------------------------------------------------------------------
def _affine(
    run: Run, axis: Axis | None, tensors: Sequence[tuple[Tensor | None, Role]], what: str, dim: int = -1
) -> Axis | None:
    """Make dimension `dim` of a norm's parameters equal to its channel; the weight's atoms stand for the output."""
    result = axis
    for position, (tensor, role) in enumerate(tensors):
        if tensor is None or tensor.shape[dim] == 1:
            continue
        own = run.axes(tensor)[dim]
        if axis is not None or own is not None:
            run.equate(axis, own, what)
        run.role(own, role)
        if position == 0 and own is not None and axis is not None:
            result = own
    weight, bias = tensors[0][0], tensors[1][0]
    if weight is not None and bias is not None and weight.shape[dim] > 1:
        w, b = run.axes(weight)[dim], run.axes(bias)[dim]
        if w is not None and b is not None:
            run.beside(w, b)
    return result


def batch_norm(run: Run, call: Call) -> None:
    # native_batch_norm(input (N, C, ...), weight, bias, running_mean, running_var, training, momentum, eps)
    x, epsilon = call.named['input'], call.named.get('eps', call.named.get('epsilon'))
    if epsilon == 0 and call.named.get('running_var') is not None:
        run.never_zero(call.named['running_var'])
    axes, named = run.axes(x), call.named
    affine = [(named.get(n), Role.AFFINE) for n in ('weight', 'bias')]
    statistics = [(named.get(n), Role.STATISTIC) for n in ('running_mean', 'running_var')]
    channel = _affine(run, axes[1], affine + statistics, 'batch norm')
    rest = [axes[0], *axes[2:]]  # which enter its statistics
    if len(axes) > 2 and named.get('running_mean') is None:
        rest[-1] = _last_normalised(run, rest[-1], x.shape[-1])
    run.freeze_each([axis for axis in rest if axis in axes], 'a batch norm over other channels')
    zero = named.get('weight') is not None or (axes[1] is not None and axes[1].zero)
    made = axes[1] is not None and axes[1].weight  # a standardised weight is one still
    channel = channel and (replace(channel, zero=zero) if made else channel.activation(zero))
    run.set(call.out[0], (rest[0], channel, *rest[1:]))


def _last_normalised(run: Run, axis: Axis | None, width: int) -> Axis | None:
    """Note a statistic over the last dimension, as that of standardised weights `(1, O, I * k * k)`."""
    if axis is None:
        run.statistic(None, -1, width)
        return None
    run.over_kept(axis, -1, width, 'a batch norm')
    return replace(axis, zero=True)


def layer_norm(run: Run, call: Call) -> None:
    # native_layer_norm(input, normalized_shape, weight, bias, eps)
    x, named = call.named['input'], call.named
    axes = run.axes(x)
    span = len(named['normalized_shape'])
    weight, bias = named.get('weight'), named.get('bias')
    longer = [d for d in range(-span, 0) if x.shape[d] > 1] or [-1]  # (C, 1, 1) normalises over channels alone
    result = [a and a.activation(False) for a in axes]
    if sum(axes[d] is not None for d in longer) > 1:
        for tensor in (t for t in (x, weight, bias) if t is not None):
            run.freeze_each(run.axes(tensor)[-span:], 'a layer norm over two dimensions of channels')
        run.set(call.out[0], axes)
        return
    for dim in longer:
        channel = _affine(run, axes[dim], [(weight, Role.AFFINE), (bias, Role.AFFINE)], 'layer norm', dim)
        run.statistic(channel, dim, x.shape[dim])
        result[dim] = channel and channel.activation(True)
    run.set(call.out[0], result)


def group_norm(run: Run, call: Call) -> None:
    # native_group_norm(input, weight, bias, N, C, HxW, group, eps)
    x, named = call.named['input'], call.named
    axes, groups = run.axes(x), int(named['group'])
    tensors = [(named.get('weight'), Role.AFFINE), (named.get('bias'), Role.AFFINE)]
    channel = _affine(run, axes[1], tensors, 'group norm')
    if channel is not None and groups < len(channel):  # else each channel is normed for itself
        if groups > 1:  # the same channel of each group stays or goes, so that the groups stay equally wide
            run.tie(channel.atoms.reshape(groups, -1).T)
        run.statistic(channel, 1 - x.dim(), len(channel))
    run.freeze_space(x, x.dim() - 2)
    run.set(call.out[0], (axes[0], channel and channel.activation(True), *axes[2:]))


def weight_norm(run: Run, call: Call) -> None:
    # _weight_norm_interface(v, g, dim=0): v * (g / norm of v over all dimensions but `dim`), which zeros do not change
    v: Tensor = call.named['v']
    axes, dim = list(run.axes(v)), int(call.named.get('dim', 0)) % v.dim()
    rows, own = axes[dim], run.axes(call.named['g'])[dim]
    if rows is not None and own is not None:
        run.equate(rows, own, 'a weight norm')
    if rows is not None and (own is None or not run.directions(rows)):
        run.freeze(rows, f'a weight norm divides by the norm of a unit, zero where it is removed, in {run.where}')
    run.set(call.out[0], axes)
