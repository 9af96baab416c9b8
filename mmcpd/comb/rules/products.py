"""What weights do to activations: convolutions, matrix products, attention; pooling and sampling beside them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ..atoms import FIXED, Axes, Axis
from ..groups import KERNEL
from ..trace import Call, ScaleSite, Trace
from .table import POOLS, rule


# -- spatial -----------------------------------------------------------------------------------------------------------
def pool(trace: Trace, call: Call) -> None:
    axes = trace.axes(call.tensors()[0])
    space = POOLS[call.op]
    for axis in axes[-space:]:
        trace.freeze(axis, f'a spatial dimension in {trace.where}')
    for out in [call.out] if isinstance(call.out, Tensor) else call.out:
        trace.set(out, (*axes[:-space], *[None] * space))


@rule('grid_sampler_2d', 'grid_sampler', 'grid_sampler_3d')  # (input (N, C, H, W), grid (N, h, w, 2), ...)
def grid_sample(trace: Trace, call: Call) -> None:
    axes = trace.axes(call.named['input'])
    for axis in axes[2:]:
        trace.freeze(axis, f'a spatial dimension in {trace.where}')
    trace.freeze_all(call.named['grid'], f'a sampling grid in {trace.where}')
    trace.set(call.out, (*axes[:2], *[None] * (call.out.dim() - 2)))


# -- convolutions and products -----------------------------------------------------------------------------------------
def _beside_bias(trace: Trace, out: Axis | None, bias: Tensor | None, what: str) -> None:
    """Make a bias follow the rows of its weight."""
    if bias is None:
        return
    axis = trace.axes(bias)[-1]
    if axis is None and bias.shape[-1] == 1:
        return
    trace.equate(out, axis, what)
    if out is not None and axis is not None and len(out) == len(axis):
        trace.role(axis, 'out' if axis.weight else 'free')
        trace.biases.append((out.atoms, axis.atoms))


@rule('convolution', '_convolution', 'cudnn_convolution', 'mkldnn_convolution', counted=True)
# convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
def convolution(trace: Trace, call: Call) -> None:
    x: Tensor = call.named['input' if 'input' in call.named else 'self']
    weight: Tensor = call.named['weight']
    groups, transposed = int(call.named['groups']), bool(call.named.get('transposed', False))
    what = 'a convolution'
    x_axes, w_axes = trace.axes(x), trace.axes(weight)
    lead = x_axes[: x.dim() - (weight.dim() - 2)]
    channel = lead[-1]
    for axis in x_axes[len(lead) :]:
        trace.freeze(axis, f'a spatial dimension in {trace.where}')
    for axis in w_axes[2:]:
        trace.freeze(axis, KERNEL)
    into, out = (w_axes[0], w_axes[1]) if transposed else (w_axes[1], w_axes[0])
    if groups == 1:
        if x.shape[len(lead) - 1] > 1:
            _contract(trace, channel, into, what)
    else:
        widths = x.shape[len(lead) - 1], call.out.shape[len(lead) - 1]
        out = _grouped(trace, channel, into, out, groups, transposed, widths)
    if out is not None:
        trace.role(out, 'out')
        out = out.activation(True)
    _beside_bias(trace, out, call.named.get('bias'), what)
    trace.output(call.out, (*lead[:-1], out, *[None] * (weight.dim() - 2)))
    spatial = x if transposed else call.out
    constant = int(np.prod(spatial.shape[len(lead) :]))
    batch = lead[0] if len(lead) > 1 else None  # where channels were folded into it, it shrinks with them
    constant *= spatial.shape[0] if len(lead) > 1 and batch is None else 1
    for dim, (size, axis) in enumerate(zip(weight.shape, w_axes, strict=True)):
        constant *= size if axis is None or dim > 1 else 1
    trace.cost(constant, *w_axes[:2], batch)


def _grouped(
    trace: Trace,
    channel: Axis | None,
    into: Axis | None,
    out: Axis | None,
    groups: int,
    transposed: bool,
    widths: tuple[int, int],
) -> Axis | None:
    """Tie the channels of each convolution group, inputs and outputs, so that it stays or goes whole.

    `into` and `out` are the weight's axes: (O, I / groups) or, transposed, (I, O / groups); `widths` are I and O.
    """
    if trace.path[-1] in trace.inside:
        return _inside(trace, channel, into, out, groups, transposed)
    reason = f'channels inside a convolution group in {trace.where}'
    if transposed:
        trace.freeze(out, reason)  # O / groups
        rows = into
    else:
        trace.freeze(into, reason)  # I / groups
        rows = out
    if rows is None:
        return None
    trace.role(rows, 'out')
    per_row = rows.atoms.reshape(groups, -1)
    trace.tie(per_row)
    if widths[0] > groups:
        trace.grouped.append((trace.path[-1], rows.atoms))
    if channel is None:
        trace.freeze(rows, f'a grouped convolution of an activation without channels in {trace.where}')
    else:
        grouped = channel.atoms.reshape(groups, widths[0] // groups)
        trace.tie(grouped)
        trace.equate(Axis(grouped.max(axis=1)), Axis(per_row[:, 0]), 'a convolution')
        if (grouped == FIXED).any():
            trace.freeze(Axis(grouped.max(axis=1)), f'a fixed position in a convolution group in {trace.where}')
    return Axis(np.repeat(per_row[:, 0], widths[1] // groups)) if transposed else rows


def _inside(
    trace: Trace, channel: Axis | None, into: Axis | None, out: Axis | None, groups: int, transposed: bool
) -> Axis | None:
    """Tie the same channel of each convolution group, so that the groups stay equally wide; axes as in `_grouped`."""
    rows, columns = (into, out) if transposed else (out, into)
    if rows is not None:
        trace.tie(rows.atoms.reshape(groups, -1).T)
    read, made = (rows, columns) if transposed else (columns, rows)
    if channel is not None:
        trace.tie(channel.atoms.reshape(groups, -1).T)
        each = Axis(channel.atoms[: len(channel) // groups], channel.zero)
        _contract(trace, each, read and Axis(read.atoms[: len(each)], weight=True), 'a convolution')
        trace.role(read, 'in')
    else:
        trace.freeze(read, f'a grouped convolution of an activation without channels in {trace.where}')
    trace.role(made, 'out')
    return made and (Axis(np.tile(made.atoms, groups)) if transposed else made)


def _contract(trace: Trace, left: Axis | None, right: Axis | None, what: str) -> None:
    """Sum over two axes: they are equal, and one factor must vanish where a unit is removed."""
    if left is None and right is None:
        return
    trace.equate(left, right, what)
    if left is None or right is None:
        return
    if not left.zero and not right.zero:
        trace.freeze(left, f'{what} sums over channels that do not vanish in {trace.where}')
    if left.weight and right.weight:
        return
    if left.weight or right.weight:
        trace.role(left if left.weight else right, 'in')
    else:
        trace.gates.append((left if left.zero else right).everything())


def _product(trace: Trace, call: Call, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Multiply matrices (..., M, K) and (..., K, N); leading dimensions meet point-wise."""
    a, b = trace.axes(left), trace.axes(right)
    a, b = (a if left.dim() > 1 else (None, *a)), (b if right.dim() > 1 else (*b, None))
    _contract(trace, a[-1], b[-2], call.op)
    lead: list[Axis | None] = []
    for x, y in zip(a[:-2], b[:-2], strict=True):
        if (x is None) != (y is None) or x is not None:
            trace.equate(x, y, call.op)
        met = x or y
        lead.append(met and met.alone())  # the contracted dimension, along which heads may vary, is gone
    rows, columns = a[-2], b[-1]
    for axis in (rows, columns):
        if axis is not None and axis.weight:
            trace.role(axis, 'out')
    out = [*lead, rows and rows.activation(rows.zero), columns and columns.activation(columns.zero)]
    if bias is not None:
        _bias(trace, call, out, bias)
    axes: Axes = tuple(out)
    if left.dim() == 1:
        axes = (*axes[:-2], axes[-1])
    if right.dim() == 1:
        axes = axes[:-1]
    trace.output(call.out, axes)
    sizes = [*(left.shape if left.dim() > 1 else (1, *left.shape)), right.shape[-1] if right.dim() > 1 else 1]
    known = [*lead, rows, a[-1] if a[-1] is not None else b[-2], columns]
    constant = int(np.prod([s for s, axis in zip(sizes, known, strict=True) if axis is None]))
    trace.cost(constant, *known)


def _bias(trace: Trace, call: Call, out: list[Axis | None], bias: Tensor) -> None:
    """Add a bias to the last dimension of a product; one of more dimensions meets the product point-wise."""
    axes = trace.axes(bias)
    for back in range(1, min(len(out), bias.dim()) + 1):
        if bias.shape[-back] == 1 or (out[-back] is None and axes[-back] is None):
            continue
        if back == 1:
            _beside_bias(trace, out[-1], bias, call.op)
        else:
            trace.equate(out[-back], axes[-back], call.op)


@rule('mm', 'bmm', 'mv', 'dot', 'matmul', counted=True)
def product(trace: Trace, call: Call) -> None:
    left, right = call.tensors()[:2]
    _product(trace, call, left, right)


@rule('addmm', 'baddbmm', 'addmv', counted=True)  # addmm(self, mat1, mat2, *, beta, alpha)
def add_product(trace: Trace, call: Call) -> None:
    bias, left, right = call.tensors()[:3]
    _product(trace, call, left, right, bias)


@rule('linear', counted=True)  # linear(input, weight, bias)
def linear(trace: Trace, call: Call) -> None:
    x, weight, bias = call.named['input'], call.named['weight'], call.named.get('bias')
    axes, (out, into) = trace.axes(x), trace.axes(weight)
    _contract(trace, axes[-1], into, call.op)
    if out is not None:
        trace.role(out, 'out')
        out = out.activation(True)
    _beside_bias(trace, out, bias, call.op)
    trace.output(call.out, (*(axis and axis.alone() for axis in axes[:-1]), out))
    known = [*axes[:-1], into, out]
    sizes = [*x.shape, weight.shape[0]]
    trace.cost(int(np.prod([s for s, axis in zip(sizes, known, strict=True) if axis is None])), *known)


def _heads(trace: Trace, query: Axis | None, key: Axis | None) -> None:
    """Make heads equal; where several queries share one key (`enable_gqa`), they stay or go with it."""
    if query is not None and key is not None and len(query) > len(key) and len(query) % len(key) == 0:
        shared = query.atoms.reshape(len(key), -1)
        trace.tie(shared)
        query = Axis(shared.max(axis=1))
    trace.equate(query, key, 'attention')


@rule('embedding')  # embedding(weight, indices, ...)
def embedding(trace: Trace, call: Call) -> None:
    entries, width = trace.axes(call.named['weight'])
    trace.freeze(entries, f'the entries of an embedding in {trace.where}')
    trace.role(width, 'out')
    trace.set(call.out, (*[None] * (call.out.dim() - 1), width and width.activation(True)))


@rule(
    '_scaled_dot_product_flash_attention_for_cpu',
    '_scaled_dot_product_flash_attention',
    '_scaled_dot_product_efficient_attention',
    '_scaled_dot_product_cudnn_attention',
    '_scaled_dot_product_fused_attention_overrideable',
    counted=True,
)  # (query (..., L, E), key (..., S, E), value (..., S, Ev), ...), out (..., L, Ev)
def attention(trace: Trace, call: Call) -> None:
    query, key, value = (call.named[name] for name in ('query', 'key', 'value'))
    q, k, v = trace.axes(query), trace.axes(key), trace.axes(value)
    out: Tensor = call.out[0]
    _contract(trace, q[-1], k[-1], 'attention')
    for axes in (q, k, v):
        trace.freeze(axes[-2], f'a token dimension in {trace.where}')
    lead: list[Axis | None] = []
    for x, y, z in zip(q[:-2], k[:-2], v[:-2], strict=True):
        if x is not None or y is not None or z is not None:
            _heads(trace, x, y)
            _heads(trace, x, z)
        met = x or y or z
        lead.append(met and met.alone())
    if call.named.get('scale') is None and q[-1] is not None:
        trace.scales.append(ScaleSite(q[-1].everything(), q[-1].atoms, trace.path[-1]))
    mask = call.named.get('attn_mask', call.named.get('attn_bias'))
    if mask is not None:
        for back in range(3, mask.dim() + 1):
            axis = trace.axes(mask)[-back]
            if mask.shape[-back] > 1 and (axis is not None or lead[2 - back] is not None):
                trace.equate(axis, lead[2 - back], 'attention mask')
        for axis in trace.axes(mask)[-2:]:
            trace.freeze(axis, f'a token dimension in {trace.where}')
    trace.output(out, (*lead, None, v[-1] and v[-1].activation(v[-1].zero)))
    shared, length = [a for a in lead if a is not None], query.shape[-2] * key.shape[-2]
    constant = int(np.prod([s for s, a in zip(query.shape[:-2], lead, strict=True) if a is None])) * length
    for axis, size in ((q[-1], query.shape[-1]), (v[-1], value.shape[-1])):
        trace.cost(constant * (1 if axis is not None else size), *shared, axis)
