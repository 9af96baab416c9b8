"""The table of operations: what each one says about the axes of its inputs and outputs.

Four kinds of operation, looked up in this order:

1. those with a rule below, by the operation's name (in-place and out-of-place forms share it);
2. point-wise ones (the dispatcher tags them): broadcast dimensions meet and are equal;
3. data movement (`MOVEMENT`): run the very same operation on the atoms;
4. everything else: if an axis goes in, freeze it, count the operation and report it. Never guess.

A rule takes the `Trace` and the `Call` and sets the axes of `call.out`. To add one: write it, decorate it, and test it
with a toy net whose groups are written by hand (`docs/design.md`, "How to add an operation").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .atoms import FIXED, Axes, Axis, along
from .errors import CombError
from .groups import KERNEL
from .trace import Call, NormSite, ScaleSite, Trace

Rule = Callable[[Trace, Call], None]
RULES: dict[str, Rule] = {}
COUNTED: set[str] = set()  # operations that cost something, with axes or without

# f(0) == 0, so a channel that is zero before is zero after.
ZERO_STAYS = set(
    'relu relu6 gelu silu hardswish mish tanh elu celu selu leaky_relu prelu _prelu_kernel neg abs sqrt sin sinh '
    'asinh atan erf sign floor ceil round trunc square expm1 log1p native_dropout dropout nan_to_num softsign'.split()
)
# Point-wise too, though the dispatcher does not tag them.
POINTWISE = set('hardswish hardsigmoid hardtanh prelu _prelu_kernel rrelu native_dropout softplus logit'.split())
# Where nothing else runs, slimming is slicing and needs no trial.
PLAIN = set(
    'convolution addmm mm t view _unsafe_view native_batch_norm _native_batch_norm_legit_no_training cudnn_batch_norm '
    'relu hardtanh sigmoid silu hardswish hardsigmoid gelu add mul cat mean max_pool2d_with_indices avg_pool2d '
    '_adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d clone detach alias contiguous as_strided'.split()
)
# Axes pass through untouched.
SAME = set('clone contiguous detach alias _to_copy lift_fresh lift view_of positive fill_diagonal'.split())
MOVEMENT = set(
    'view _unsafe_view reshape _reshape_alias permute transpose t expand unsqueeze squeeze select slice narrow split '
    'split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk unbind roll flip repeat '
    'repeat_interleave constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d unfold '
    'diagonal movedim rot90 tril triu pixel_shuffle pixel_unshuffle unflatten '
    'flatten numpy_T swapaxes view_as expand_as squeeze_copy index index_select gather'.split()
)
VIEWS = {
    'view': 'reshape',
    '_unsafe_view': 'reshape',
    '_reshape_alias': 'reshape',
}  # a view of stride 0 needs reshape
# No input axis matters: fresh tensors, sizes, and random numbers.
FRESH = set(
    'new_zeros new_ones new_empty new_full new_empty_strided empty zeros ones full arange linspace rand randn randint '
    'scalar_tensor sym_size sym_numel sym_stride eye randperm empty_strided is_same_size tril_indices'.split()
)
POOLS = {  # spatial operations: name -> number of trailing spatial dimensions
    'avg_pool1d': 1, 'avg_pool2d': 2, 'avg_pool3d': 3, 'max_pool1d': 1, 'max_pool2d': 2, 'max_pool2d_with_indices': 2,
    'max_pool3d_with_indices': 3, 'adaptive_avg_pool1d': 1, '_adaptive_avg_pool2d': 2, 'adaptive_avg_pool2d': 2,
    'adaptive_max_pool2d': 2, '_adaptive_avg_pool3d': 3, 'upsample_nearest1d': 1, 'upsample_nearest2d': 2,
    'upsample_linear1d': 1, 'upsample_bilinear2d': 2, 'upsample_bicubic2d': 2, '_upsample_bilinear2d_aa': 2,
    '_upsample_bicubic2d_aa': 2, '_upsample_nearest_exact2d': 2, 'upsample_trilinear3d': 3,
}  # fmt: skip


def rule(*names: str, counted: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule under each of its operations' names; `counted` ones run even where no axis goes in."""

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f'two rules for {name!r}')
            RULES[name] = function
        COUNTED.update(names if counted else ())
        return function

    return register


def apply(trace: Trace, call: Call) -> None:
    """Apply the rule of one operation; passed by at once where no axis goes in."""
    if call.op in FRESH or not (call.op in COUNTED or any(any(trace.axes(t)) for t in call.tensors())):
        return
    trace.adapts |= call.op not in PLAIN
    if call.op in RULES:
        RULES[call.op](trace, call)
    elif call.op in SAME:
        same(trace, call)
    elif call.op in POINTWISE or torch.Tag.pointwise in call.func.tags:
        pointwise(trace, call)
    elif call.op in MOVEMENT:
        movement(trace, call)
    elif call.op in POOLS:
        pool(trace, call)
    else:
        unknown(trace, call)


def unknown(trace: Trace, call: Call) -> None:
    """Freeze what goes through an operation without a rule, and report it."""
    trace.unsupported[(call.op, trace.where)] += 1
    for tensor in call.tensors():
        trace.freeze_all(tensor, f'no rule for {call.op} in {trace.where}')


def same(trace: Trace, call: Call) -> None:
    trace.set(call.out, trace.axes(call.tensors()[0]))


# -- point-wise --------------------------------------------------------------------------------------------------------
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


# -- data movement -----------------------------------------------------------------------------------------------------
def movement(trace: Trace, call: Call) -> None:
    """Run the very same operation on the atoms, one axis at a time, and see where the result varies."""
    source = call.tensors()[0]
    outs = [call.out] if isinstance(call.out, Tensor) else list(call.out)
    axes: list[list[Axis | None]] = [[None] * out.dim() for out in outs]
    for dim, axis in enumerate(trace.axes(source)):
        if axis is None:
            continue
        if _picks(call, dim):
            trace.freeze(axis, f'picked by a fixed index ({call.op}) in {trace.where}')
            continue
        moved = _moved(call, source, along(axis, dim, source.shape))
        for labels, found in zip(moved, axes, strict=True):
            place(trace, call, axis, labels, found)
    for out, found in zip(outs, axes, strict=True):
        trace.set(out, tuple(found))


def _picks(call: Call, dim: int) -> bool:
    """Say whether an operation picks positions of `dim` by an index that is not made of sizes."""
    if call.op in ('select', 'index_select', 'gather'):
        return dim == call.named['dim'] % call.tensors()[0].dim()
    return call.op == 'index' and dim < len(call.named['indices']) and call.named['indices'][dim] is not None


def _moved(call: Call, source: Tensor, labels: Tensor) -> list[Tensor]:
    swap = {id(source): labels}
    args = [swap.get(id(a), a) for a in call.args]
    kwargs = {k: swap.get(id(v), v) for k, v in call.kwargs.items()}
    if call.op == 'constant_pad_nd':
        args = [*args[:2], FIXED]
    if call.op in VIEWS:
        return [labels.reshape(call.out.shape)]
    if 'pad' in call.op and call.op != 'constant_pad_nd':  # reflection and replication know no integers
        return [call.func(args[0].double(), *args[1:], **kwargs).to(torch.int32)]
    moved = call.func(*args, **kwargs)
    return [moved] if isinstance(moved, Tensor) else list(moved)


def _varying(labels: Tensor) -> tuple[Tensor, list[int]]:
    """Return the labels without the dimensions along which they are all the same, and those along which not."""
    for dim in range(labels.dim()):  # what does not vary needs no memory
        if labels.stride(dim) == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    varying = []
    for dim in range(labels.dim()):
        if labels.shape[dim] > 1:
            first = labels.narrow(dim, 0, 1)
            if bool((labels != first).any()):
                varying.append(dim)
            else:
                labels = first
    return labels, varying


def place(trace: Trace, call: Call, axis: Axis, labels: Tensor, found: list[Axis | None]) -> None:
    """Write the axis that `labels` (the atoms at each position of an output) shows into `found`.

    Where it varies along several dimensions (heads x width, groups x channels) one keeps the atoms, and those across
    the others are tied: a rectangle. It is the one along which they vary where those that are tied already (heads, a
    convolution's groups) have one name, and of several the last.
    """
    labels, varying = _varying(labels)
    if not varying:
        trace.freeze(axis, f'picked by a fixed index ({call.op}) in {trace.where}')
        return
    # Padding around the other dimensions is no atom, and does not make them vary.
    real = [d for d in varying if not _only_padding(labels, d)]
    real = real or varying
    if len(real) > 1:
        known = _varying(trace.named(labels))[1]
        real = [d for d in real if d in known] or real
    keep = _kept(trace, call, real)
    columns = labels.movedim(keep, 0).reshape(labels.shape[keep], -1).numpy().astype(np.int64)
    if columns.shape[1] > 1:
        trace.tie(columns)
    atoms = columns.max(axis=1)
    trace.freeze(found[keep], f'two axes in one dimension ({call.op}) in {trace.where}')
    zero = axis.zero and (call.op != 'constant_pad_nd' or not call.named.get('value'))
    found[keep] = Axis(atoms, zero, axis.weight, labels if columns.shape[1] > 1 else None)


def _only_padding(labels: Tensor, dim: int) -> bool:
    top = labels.amax(dim, keepdim=True)
    return bool(((labels == top) | (labels == FIXED)).all())


def _kept(trace: Trace, call: Call, varying: list[int]) -> int:
    """Choose the dimension that keeps the atoms of a rectangle."""
    if 'pixel_shuffle' in call.op:
        return varying[0]
    if trace.heads == 'head' and len(varying) > 1:
        return varying[-2]
    return varying[-1]


@rule('channel_shuffle', 'native_channel_shuffle')  # channel_shuffle(self, groups): equal groups stay equal
def channel_shuffle(trace: Trace, call: Call) -> None:
    axis = trace.axes(call.named['self'])[1]
    if axis is not None:
        trace.tie(axis.atoms.reshape(call.named['groups'], -1).T)
    movement(trace, call)


@rule('cat', 'concat', 'stack')  # cat(tensors, dim=0)
def cat(trace: Trace, call: Call) -> None:
    tensors: list[Tensor] = [t for t in call.named['tensors'] if t.numel()]
    stack = call.op == 'stack'
    dim = call.named.get('dim', 0) % call.out.dim()
    rows = []
    for tensor in tensors:
        axes = list(trace.axes(tensor))
        if stack:
            axes.insert(dim, None)
        rows.append((tensor, axes))
    result: list[Axis | None] = []
    for d in range(call.out.dim()):
        column = [axes[d] for _, axes in rows]
        known = [a for a in column if a is not None]
        if not known or call.out.shape[d] == 1:
            result.append(None)
        elif d == dim:
            parts = [
                axis.atoms if axis is not None else np.full(tensor.shape[d], FIXED)
                for (tensor, _), axis in zip(rows, column, strict=True)
            ]
            zero = all(a is not None and a.zero for a in column)
            result.append(Axis(np.concatenate(parts), zero, all(a.weight for a in known)))
        else:
            for axis in column:
                if axis is not known[0]:
                    trace.equate(known[0], axis, call.op)
            result.append(Axis(known[0].atoms, all(a.zero for a in known), all(a.weight for a in known)))
    trace.set(call.out, tuple(result))


@rule('im2col')  # im2col(self, kernel_size, dilation, padding, stride): (N, C, H, W) -> (N, C * k, L)
def im2col(trace: Trace, call: Call) -> None:
    source = call.named['self']
    batch, channel, *space = trace.axes(source)
    for axis in space:
        trace.freeze(axis, f'a spatial dimension in {trace.where}')
    taps = call.out.shape[-2] // source.shape[1]
    out = channel and Axis(np.repeat(channel.atoms, taps), channel.zero)
    trace.set(call.out, (batch, out, None))


@rule('col2im')  # col2im(self, output_size, kernel_size, ...): (N, C * k, L) -> (N, C, H, W)
def col2im(trace: Trace, call: Call) -> None:
    batch, channel, length = trace.axes(call.named['self'])
    trace.freeze(length, f'a spatial dimension in {trace.where}')
    out = None
    if channel is not None:
        columns = channel.atoms.reshape(call.out.shape[1], -1)
        trace.tie(columns)
        out = Axis(columns[:, 0], channel.zero)
    trace.set(call.out, (batch, out, None, None))


@rule('glu')  # glu(self, dim): the halves are a * sigmoid(b)
def glu(trace: Trace, call: Call) -> None:
    source = call.named['self']
    axes = list(trace.axes(source))
    dim = call.named.get('dim', -1) % source.dim()
    axis = axes[dim]
    if axis is not None:
        halves = axis.atoms.reshape(2, -1)
        trace.equate(Axis(halves[0]), Axis(halves[1]), 'glu')
        axes[dim] = Axis(halves[0], axis.zero)
    trace.set(call.out, tuple(axes))


# -- reductions --------------------------------------------------------------------------------------------------------
def _over_dims(trace: Trace, call: Call, safe: bool, zero: bool) -> None:
    source = call.named.get('self', call.tensors()[0])
    dims = call.named.get('dim', ())
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
            trace.equate(x, y, 'attention')
            trace.equate(x, z, 'attention')
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


# -- normalisation -----------------------------------------------------------------------------------------------------
def _affine(trace: Trace, axis: Axis | None, tensors: Sequence[tuple[Tensor | None, str]], what: str) -> Axis | None:
    """Make the parameters of a norm equal to its channel; the weight's atoms stand for the output."""
    result = axis
    for position, (tensor, role) in enumerate(tensors):
        if tensor is None or tensor.shape[-1] == 1:
            continue
        own = trace.axes(tensor)[-1]
        if axis is not None or own is not None:
            trace.equate(axis, own, what)
        trace.role(own, role)
        if position == 0 and own is not None and axis is not None:
            result = own
    weight, bias = tensors[0][0], tensors[1][0]
    if weight is not None and bias is not None and weight.shape[-1] > 1:
        w, b = trace.axes(weight)[-1], trace.axes(bias)[-1]
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
    if span > 1:
        for tensor in (t for t in (x, weight, bias) if t is not None):
            for axis in trace.axes(tensor)[-span:]:
                trace.freeze(axis, f'a layer norm over several dimensions in {trace.where}')
        trace.set(call.out[0], axes)
        return
    channel = _affine(trace, axes[-1], [(weight, 'affine'), (bias, 'affine')], 'layer norm')
    if channel is not None:
        trace.norms.append(NormSite(trace.asking, channel.atoms, -1))
    trace.set(call.out[0], (*(a and a.activation(False) for a in axes[:-1]), channel and channel.activation(True)))


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


def check_strict(trace: Trace) -> None:
    """Raise on the operations that have no rule.

    Raises:
        CombError: with each operation and the module that ran it.
    """
    if trace.unsupported:
        rows = ', '.join(f'{op} in {where} (x{n})' for (op, where), n in trace.unsupported.items())
        raise CombError(
            f'no rule for {rows}; write one in mmcpd/comb/rules.py, or comb with strict=False to freeze them'
        )
