"""What weights do to activations: convolutions, matrix products, attention; pooling and sampling beside them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from ...coupling import KERNEL, Role
from ..atoms import FIXED, Axes, Axis
from ..record import GroupedConvolution
from ..trace import Call, Run
from .pointwise import Rule

ATTENTION = 'scaled_dot_product_attention'  # the function, whatever operations it is made of


# -- spatial -----------------------------------------------------------------------------------------------------------
def pool(space: int) -> Rule:
    """Return the rule of an operation that pools the last `space` dimensions; channels stay."""

    def rule(run: Run, call: Call) -> None:
        x = call.tensors()[0]
        axes = run.axes(x)
        run.freeze_space(x, space)
        for out in call.outputs():
            run.set(out, (*axes[:-space], *[None] * space))

    return rule


def grid_sample(run: Run, call: Call) -> None:
    # grid_sampler_2d(input (N, C, H, W), grid (N, h, w, 2), ...)
    x = call.named['input']
    axes = run.axes(x)
    run.freeze_space(x, x.dim() - 2)
    run.freeze_all(call.named['grid'], f'a sampling grid in {run.where}')
    run.set(call.out, (*axes[:2], *[None] * (call.out.dim() - 2)))


# -- convolutions and products -----------------------------------------------------------------------------------------
def _beside_bias(run: Run, out: Axis | None, bias: Tensor | None, what: str) -> None:
    """Make a bias follow the rows of its weight."""
    if bias is None:
        return
    axis = run.axes(bias)[-1]
    if axis is None and bias.shape[-1] == 1:
        return
    run.equate(out, axis, what)
    if out is not None and axis is not None and len(out) == len(axis):
        run.role(axis, Role.PRODUCER if axis.weight else Role.FREE)
        run.beside(out, axis)


def convolution(run: Run, call: Call) -> None:
    # convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    x: Tensor = call.named['input' if 'input' in call.named else 'self']
    weight: Tensor = call.named['weight']
    groups, transposed = int(call.named['groups']), bool(call.named.get('transposed', False))
    what = 'a convolution'
    x_axes, w_axes = run.axes(x), run.axes(weight)
    lead = x_axes[: x.dim() - (weight.dim() - 2)]
    channel = lead[-1]
    run.freeze_space(x, x.dim() - len(lead))
    for axis in w_axes[2:]:
        run.freeze(axis, KERNEL)
    into, out = (w_axes[0], w_axes[1]) if transposed else (w_axes[1], w_axes[0])
    if groups == 1:
        if x.shape[len(lead) - 1] > 1:
            contract(run, channel, into, what, x)
    else:
        widths = x.shape[len(lead) - 1], call.out.shape[len(lead) - 1]
        out = _grouped(run, x, channel, weight, groups, transposed, widths)
    if out is not None:
        run.role(out, Role.PRODUCER)
        out = out.activation(True)
    _beside_bias(run, out, call.named.get('bias'), what)
    space = [None] * (weight.dim() - 2)
    run.output(call.out, (*lead[:-1], out, *space))
    *batch, _ = lead  # where channels were folded into a batch, it shrinks with them
    places = (x if transposed else call.out).shape
    sizes = (*weight.shape, *places[: len(batch)], *places[len(lead) :])
    run.cost(sizes, (*w_axes[:2], *space, *batch, *space))


def _grouped(
    run: Run, x: Tensor, channel: Axis | None, weight: Tensor, groups: int, transposed: bool, widths: tuple[int, int]
) -> Axis | None:
    """Tie the channels of each convolution group, inputs and outputs, so that it stays or goes whole.

    `weight` is (O, I / groups, ...) or, transposed, (I, O / groups, ...); `widths` are I and O.
    """
    axes = run.axes(weight)
    if run.module in run.policy.narrowed:
        return _inside(run, x, channel, axes, groups, transposed)
    rows = axes[0]
    run.freeze(axes[1], f'channels inside a convolution group in {run.where}')
    if rows is None:
        if widths == (groups, groups) and not weight.is_meta and bool((weight == weight[:1]).all()):
            return channel and channel.activation(channel.zero)  # one kernel for all of them: a blur
        run.freeze(channel, f'a grouped convolution with a weight that no layer produces in {run.where}')
        return None
    run.role(rows, Role.PRODUCER)
    per_row = rows.atoms.reshape(groups, -1)
    run.tie(per_row)
    if widths[0] > groups:
        run.record.grouped.append(GroupedConvolution(run.module, rows.atoms))
    if channel is None:
        run.freeze(rows, f'{run.origin(x)} (read by {run.where})')
    else:
        grouped = channel.atoms.reshape(groups, widths[0] // groups)
        run.tie(grouped)
        run.equate(Axis(grouped.max(axis=1)), Axis(per_row[:, 0]), 'a convolution')
        if (grouped == FIXED).any():
            run.freeze(Axis(grouped.max(axis=1)), f'a fixed position in a convolution group in {run.where}')
    return Axis(np.repeat(per_row[:, 0], widths[1] // groups)) if transposed else rows


def _inside(run: Run, x: Tensor, channel: Axis | None, weight: Axes, groups: int, transposed: bool) -> Axis | None:
    """Tie the same channel of each convolution group, so that the groups stay equally wide; axes as in `_grouped`."""
    rows, columns = weight[:2]
    if rows is not None:
        run.tie(rows.atoms.reshape(groups, -1).T)
    read, made = (rows, columns) if transposed else (columns, rows)
    if channel is not None:
        across = channel.atoms.reshape(groups, -1).T  # one channel of each group in a row
        run.tie(across)
        padded = across[(across == FIXED).any(axis=1)]
        run.freeze(Axis(padded.ravel()), f'a convolution group with a fixed position in {run.where}')
        each = Axis(channel.atoms[: len(channel) // groups], channel.zero)
        contract(run, each, read and Axis(read.atoms[: len(each)], weight=True), 'a convolution', x)
        run.role(read, Role.CONSUMER)
    else:
        run.freeze(read, f'{run.origin(x)} (read by {run.where})')
    run.role(made, Role.PRODUCER)
    return made and (Axis(np.tile(made.atoms, groups)) if transposed else made)


def contract(run: Run, left: Axis | None, right: Axis | None, what: str, read: Tensor) -> None:
    """Sum over two axes: they are equal, and one factor must be zero where a unit is removed.

    `read` is the activation that meets the weight, to say whose channels they are.
    """
    if left is None or right is None:
        run.freeze(left or right, f'{run.origin(read)} (read by {run.where})')
        return
    run.equate(left, right, what)
    run.sums(left)
    if not left.zero and not right.zero:
        run.freeze(left, f'{what} sums over channels that are not zero where a unit is removed, in {run.where}')
    if left.weight and right.weight:
        return
    if left.weight or right.weight:
        run.role(left if left.weight else right, Role.CONSUMER)
    else:
        run.gate(left if left.zero else right)


def _product(run: Run, call: Call, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    """Multiply matrices (..., M, K) and (..., K, N); leading dimensions meet point-wise."""
    a, b = run.axes(left), run.axes(right)
    a, b = (a if left.dim() > 1 else (None, *a)), (b if right.dim() > 1 else (*b, None))
    contract(run, a[-1], b[-2], call.op, right if any(axis and axis.weight for axis in a) else left)
    lead: list[Axis | None] = []
    for x, y in zip(a[:-2], b[:-2], strict=True):
        if (x is None) != (y is None) or x is not None:
            run.equate(x, y, call.op)
        met = x or y
        lead.append(met and met.without_full())  # the contracted dimension, along which heads may vary, is gone
    if left.dim() > 2 and right.dim() > 2:
        _per_head(run, a[-2:], b[-2:])
    rows, columns = a[-2], b[-1]
    for axis in (rows, columns):
        if axis is not None and axis.weight:
            run.role(axis, Role.PRODUCER)
    out = [*lead, rows and rows.activation(rows.zero), columns and columns.activation(columns.zero)]
    if bias is not None:
        _bias(run, call, out, bias)
    axes: Axes = tuple(out)
    if left.dim() == 1:
        axes = (*axes[:-2], axes[-1])
    if right.dim() == 1:
        axes = axes[:-1]
    run.output(call.out, axes)
    sizes = [*(left.shape if left.dim() > 1 else (1, *left.shape)), right.shape[-1] if right.dim() > 1 else 1]
    known = [*lead, rows, a[-1] if a[-1] is not None else b[-2], columns]
    run.cost(sizes, known)


def _bias(run: Run, call: Call, out: list[Axis | None], bias: Tensor) -> None:
    """Add a bias to the last dimension of a product; one of more dimensions meets the product point-wise."""
    axes = run.axes(bias)
    for back in range(1, min(len(out), bias.dim()) + 1):
        if bias.shape[-back] == 1 or (out[-back] is None and axes[-back] is None):
            continue
        if back == 1:
            _beside_bias(run, out[-1], bias, call.op)
        else:
            run.equate(out[-back], axes[-back], call.op)


def product(run: Run, call: Call) -> None:
    _product(run, call, *call.tensors()[:2])


def add_product(run: Run, call: Call) -> None:
    # addmm(self, mat1, mat2, *, beta, alpha)
    bias, left, right = call.tensors()[:3]
    _product(run, call, left, right, bias)


def sparse_product(run: Run, call: Call) -> None:
    # _sparse_addmm(self, mat1, mat2, *, beta, alpha): where nothing is added, `self` is zeros that torch makes
    added = call.named['self']
    _product(run, call, call.named['mat1'], call.named['mat2'], added if any(run.axes(added)) else None)


def linear(run: Run, call: Call) -> None:
    # linear(input, weight, bias)
    x, weight, bias = call.named['input'], call.named['weight'], call.named.get('bias')
    axes, (out, into) = run.axes(x), run.axes(weight)
    contract(run, axes[-1], into, call.op, x)
    if out is not None:
        run.role(out, Role.PRODUCER)
        out = out.activation(True)
    _beside_bias(run, out, bias, call.op)
    run.output(call.out, (*(axis and axis.without_full() for axis in axes[:-1]), out))
    run.cost((*x.shape, weight.shape[0]), (*axes[:-1], into, out))


def _per_head(run: Run, *operands: Axes) -> None:
    """Note the channels of a batched product of activations: attention, head by head."""
    run.record.batched.extend(a.atoms for axes in operands for a in axes if a is not None and not a.weight)


def _heads(run: Run, query: Axis | None, key: Axis | None) -> None:
    """Make heads equal; where several queries share one key (`enable_gqa`), they stay or go with it."""
    if query is not None and key is not None and len(query) > len(key) and len(query) % len(key) == 0:
        shared = query.atoms.reshape(len(key), -1)
        run.tie(shared)
        query = Axis(shared.max(axis=1))
    run.equate(query, key, 'attention')


def embedding(run: Run, call: Call) -> None:
    # embedding(weight, indices, ...)
    entries, width = run.axes(call.named['weight'])
    run.freeze(entries, f'the entries of an embedding in {run.where}')
    run.role(width, Role.PRODUCER)
    run.set(call.out, (*[None] * (call.out.dim() - 1), width and width.activation(True)))


def attention(run: Run, call: Call) -> None:
    # (query (..., L, E), key (..., S, E), value (..., S, Ev), ...), out (..., L, Ev)
    query, key, value = (call.named[name] for name in ('query', 'key', 'value'))
    q, k, v = run.axes(query), run.axes(key), run.axes(value)
    out: Tensor = call.out[0]
    _per_head(run, q, k, v)
    contract(run, q[-1], k[-1], 'attention', key if k[-1] is None else query)
    run.freeze_each((q[-2], k[-2], v[-2]), 'a token dimension')
    lead: list[Axis | None] = []
    for x, y, z in zip(q[:-2], k[:-2], v[:-2], strict=True):
        if x is not None or y is not None or z is not None:
            _heads(run, x, y)
            _heads(run, x, z)
        met = x or y or z
        lead.append(met and met.without_full())
    if run.cursor.function != ATTENTION:  # hidden by another function from Python's mode, which sees the call's place
        own = call.named.get('scale') is None
        run.reads([key, value] if own else [query, key, value])
        if own and q[-1] is not None:
            run.scaled(q[-1])
    mask = call.named.get('attn_mask', call.named.get('attn_bias'))
    if mask is not None:
        for back in range(3, mask.dim() + 1):
            axis = run.axes(mask)[-back]
            if mask.shape[-back] > 1 and (axis is not None or lead[2 - back] is not None):
                run.equate(axis, lead[2 - back], 'attention mask')
        run.freeze_each(run.axes(mask)[-2:], 'a token dimension')
    run.output(out, (*lead, None, v[-1] and v[-1].activation(v[-1].zero)))
    for axis, size in ((q[-1], query.shape[-1]), (v[-1], value.shape[-1])):
        run.cost((*query.shape[:-1], key.shape[-2], size), (*lead, None, None, axis))


def distances(run: Run, call: Call) -> None:
    # _cdist_forward(x1 (..., P, M), x2 (..., R, M), p, mode), _euclidean_dist(x1, x2): (..., P, R)
    sides = [run.axes(call.named[name]) for name in ('x1', 'x2')]
    left, right = (axes[-1] for axes in sides)
    run.equate(left, right, 'a distance')
    for axis in (left, right):
        run.sums(axis)
    if left is not None and right is not None and not (left.zero and right.zero):
        run.freeze(left, f'a distance over channels that are nowhere zero in {run.where}')
    for axes in sides:
        run.freeze_each(axes[:-2], 'a batch of distances')
    run.set(call.out, (*[None] * (call.out.dim() - 2), *(axes[-2] and axes[-2].activation(False) for axes in sides)))
