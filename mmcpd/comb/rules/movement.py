"""Data movement: the very same operation runs on the atoms; and the few operations that need a rule of their own."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...nested import map_tensors
from ...slim.computed import CHANNELS
from ..atoms import FIXED, Axis, along
from ..trace import Call, Run
from .pointwise import MULTI_HEAD, same

PIECES = ('slice', 'split_with_sizes')
BOUNDED = set('__getitem__ __setitem__ narrow split split_with_sizes'.split())  # functions whose bounds are seen
VIEWS = ('view', '_unsafe_view', '_reshape_alias')  # of labels with stride 0, which need a reshape


def movement(run: Run, call: Call) -> None:
    """Run the very same operation on the atoms, one axis at a time, and see where the result varies."""
    source = call.tensors()[0]
    outs = call.outputs()
    axes: list[list[Axis | None]] = [[None] * out.dim() for out in outs]
    kept = _kept(run, call)
    for dim, axis in enumerate(run.axes(source)):
        if axis is None:
            if kept is not None and _picks(call, dim):
                axes[0][dim] = kept
            continue
        if not source.numel():
            _carry_empty(run, call, axis, axes)
            continue
        if _picks(call, dim):
            run.freeze(_held(run, call, axis), f'picked by a fixed index ({call.op}) in {run.where}')
            continue
        if call.op == 'slice' and dim == call.named.get('dim', 0) % source.dim():
            _step(run, call, dim, axis)
        moved = _moved(call, source, along(axis, dim, source.shape))
        for labels, found in zip(moved, axes, strict=True):
            place(run, call, axis, labels, found)
    for index in call.tensors()[1:] if kept is None else ():
        _index(run, call, index)
    for out, found in zip(outs, axes, strict=True):
        run.set(out, tuple(found))


def _carry_empty(run: Run, call: Call, axis: Axis, axes: list[list[Axis | None]]) -> None:
    """Give an axis of a tensor without elements, as of no tokens, to the one dimension of its size in each output."""
    for out, found in zip(call.outputs(), axes, strict=True):
        wide = [d for d, size in enumerate(out.shape) if size == len(axis) and found[d] is None]
        if len(wide) == 1:
            found[wide[0]] = axis
        else:
            run.freeze(axis, f'a tensor without elements ({call.op}) in {run.where}')


def _kept(run: Run, call: Call) -> Axis | None:
    """Return the axis of a buffer that says which computed channels are given out (see `mmcpd.slim.computed`)."""
    if call.op != 'index_select' or call.named['index'].dim() != 1 or not call.out.dim():
        return None
    (axis,), known = run.axes(call.named['index']), run.axes(call.named['self'])[call.named['dim']]
    if axis is None or known is not None or run.tensor_of(axis).rpartition('.')[2] != CHANNELS:
        return None
    return axis.activation(False)


def _index(run: Run, call: Call, index: Tensor) -> None:
    """Make an index equal to what it is gathered from in the other dimensions; others have no channels."""
    if call.op != 'gather':
        run.freeze_all(index, f'channels in an index ({call.op}) in {run.where}')
        return
    for dim, (axis, own) in enumerate(zip(run.axes(call.named['self']), run.axes(index), strict=True)):
        if own is not None:
            run.equate(own, None if _picks(call, dim) else axis, call.op)


def _picks(call: Call, dim: int) -> bool:
    """Say whether an operation picks positions of `dim` by an index that is not made of sizes."""
    if call.op == 'roll':  # by an offset; without dimensions over all of them at once
        dims = [d % call.out.dim() for d in call.named.get('dims', ())]
        return dim in dims or not dims
    if call.op in ('select', 'index_select', 'gather'):
        return dim == call.named['dim'] % call.tensors()[0].dim()
    return call.op == 'index' and dim < len(call.named['indices']) and call.named['indices'][dim] is not None


def _held(run: Run, call: Call, axis: Axis) -> Axis:
    """Return the channels without which an index would pick another: `x[:, 2]` picks the third of those that stay."""
    if call.op != 'select' or run.cursor.function != '__getitem__':
        return axis
    index = int(call.named['index'])
    return Axis(axis.atoms[: index + 1] if index >= 0 else axis.atoms[index:])


def _step(run: Run, call: Call, dim: int, axis: Axis) -> None:
    """Tie what a stepped slice passes over to what it picks, so that `x[:, 1::2]` is still one of each two."""
    step, first = int(call.named.get('step', 1)), int(call.named.get('start') or 0)
    if step == 1:
        return
    if len(axis) % step or not 0 <= first < step or call.out.shape[dim] != len(axis) // step:
        run.freeze(axis, f'a slice in unequal steps in {run.where}')
        return
    pieces = axis.atoms.reshape(-1, step)
    run.tie(pieces)
    run.freeze(Axis(pieces[(pieces == FIXED).any(axis=1)].ravel()), f'a step over a fixed position in {run.where}')


def _moved(call: Call, source: Tensor, labels: Tensor) -> list[Tensor]:
    """Run an operation on labels, which are on the CPU: an index or a mask is fetched there."""
    nothing = call.op == 'index' and source.numel() and not call.out.numel()
    fetched = some if nothing else Tensor.cpu
    args, kwargs = map_tensors((list(call.args), call.kwargs), lambda t: labels if t is source else fetched(t))
    kwargs = {name: value for name, value in kwargs.items() if name != 'device'}
    if call.op == 'constant_pad_nd':
        args = [*args[:2], FIXED]
    if call.op in VIEWS:
        return [labels.reshape(call.out.shape)]
    if 'pad' in call.op and call.op != 'constant_pad_nd':  # reflection and replication know no integers
        return [call.func(args[0].double(), *args[1:], **kwargs).to(torch.int32)]
    moved = call.func(*args, **kwargs)
    return [moved] if isinstance(moved, Tensor) else list(moved)


def some(index: Tensor) -> Tensor:
    """Return an index that picks something, on the CPU: what one that picks nothing would have met is the same."""
    index = index.cpu()
    if index.dtype in (torch.bool, torch.uint8):
        return index if index.any() else torch.ones_like(index)
    return index if index.numel() else index.new_zeros((1,) * index.dim())


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


def place(run: Run, call: Call, axis: Axis, labels: Tensor, found: list[Axis | None]) -> None:
    """Write the axis that `labels` (the atoms at each position of an output) shows into `found`.

    Where it varies along several dimensions (heads x width, groups x channels) one keeps the atoms, and those across
    the others are tied: a rectangle. It is the one along which they vary where those that are tied already (heads, a
    convolution's groups) have one name, and of several the last.
    """
    labels, varying = _varying(labels)
    if not varying:
        # Bounds that are seen follow what is in front of a piece of one channel; an index stays.
        piece = call.op in PIECES and run.cursor.function in BOUNDED
        picked = Axis(labels.flatten()[:1].numpy().astype(np.int64)) if piece else axis
        run.freeze(picked, f'picked by a fixed index ({call.op}) in {run.where}')
        return
    keep = varying[0] if len(varying) == 1 else _carrier(run, call, _real(run, varying, labels), labels)
    columns = labels.movedim(keep, 0).reshape(labels.shape[keep], -1).numpy().astype(np.int64)
    if columns.shape[1] > 1:
        run.tie(columns)
    atoms = columns.max(axis=1)
    merged = f'two axes in one dimension ({call.op}) in {run.where}'
    other = found[keep]
    if other is not None and run.depth(other) < run.depth(axis):  # a weight as a matrix: positions of its kernel stay
        run.freeze(axis, merged)
        return
    run.freeze(found[keep], merged)
    zero = axis.zero and (call.op != 'constant_pad_nd' or not call.named.get('value'))
    found[keep] = Axis(atoms, zero, axis.weight, labels if columns.shape[1] > 1 else None)


def _real(run: Run, varying: list[int], labels: Tensor) -> list[int]:
    """Return those of the dimensions along which other atoms than tied ones meet."""
    # Padding around the other dimensions is no atom, and does not make them vary.
    real = [d for d in varying if not _only_padding(labels, d)] or varying
    if len(real) > 1:
        known = _varying(run.tied_names(labels))[1]
        real = [d for d in real if d in known] or real
    return real


def _only_padding(labels: Tensor, dim: int) -> bool:
    top = labels.amax(dim, keepdim=True)
    return bool(((labels == top) | (labels == FIXED)).all())


def _carrier(run: Run, call: Call, varying: list[int], labels: Tensor) -> int:
    """Choose the dimension that keeps the atoms of a rectangle."""
    if 'pixel_shuffle' in call.op:
        return varying[0]
    if (channels := _noted(run.policy.pictures, labels)) is not None and len(channels):
        wide = [d for d in varying if _distinct(labels, d)] or varying[-1:]
        return next((d for d in wide if labels.shape[d] == channels[0]), wide[0])
    if len(varying) > 1 and _noted(run.policy.whole_heads, labels) is not None:
        return varying[-2]
    if varying[-1] in run.cursor.pairs:
        wider = (d for d in varying[-2::-1] if d not in run.cursor.pairs and _distinct(labels, d))
        return next(wider, varying[-1])
    widths = run.cursor.widths[-1] if call.op in VIEWS and run.cursor.function != MULTI_HEAD else set[int]()
    last = labels.shape[varying[-1]]
    if last not in widths:  # `view(-1, C, 2 * k)`: C are the module's own channels; fewer than the last are its heads
        own = (d for d in varying[-2::-1] if last < labels.shape[d] in widths and _distinct(labels, d))
        return next(own, varying[-1])
    return varying[-1]


def _noted(notes: np.ndarray | None, labels: Tensor) -> np.ndarray | None:
    """Return what an earlier run noted of the atoms at these positions, or None if it did not of all."""
    if notes is None:
        return None
    known = labels[labels >= 0].numpy()
    found: np.ndarray | None = notes[known] if bool((known < len(notes)).all()) else None
    return found if found is not None and bool(found.all()) else None


def _distinct(labels: Tensor, dim: int) -> bool:
    """Say whether no two positions of a dimension are the same: `view(-1, batch * heads, width)` repeats its heads."""
    columns = labels.movedim(dim, 0).flatten(1)
    return len(columns.unique(dim=0)) == len(columns)


def channel_shuffle(run: Run, call: Call) -> None:
    # channel_shuffle(self, groups): equal groups stay equal
    axis = run.axes(call.named['self'])[1]
    if axis is not None:
        run.tie(axis.atoms.reshape(call.named['groups'], -1).T)
    movement(run, call)


def cat(run: Run, call: Call) -> None:
    # cat(tensors, dim=0), stack(tensors, dim=0)
    tensors: list[Tensor] = [t for t in call.named['tensors'] if t.numel() or any(run.axes(t))]
    dim = call.named.get('dim', 0) % call.out.dim()
    rows = [list(run.axes(tensor)) for tensor in tensors]
    for axes in rows if call.op == 'stack' else ():
        axes.insert(dim, None)
    result: list[Axis | None] = []
    for d in range(call.out.dim()):
        column = [axes[d] for axes in rows]
        known = [a for a in column if a is not None]
        if not known or call.out.shape[d] == 1:
            result.append(None)
        elif d == dim:
            parts = [
                axis.atoms if axis is not None else np.full(tensor.shape[d], FIXED)
                for tensor, axis in zip(tensors, column, strict=True)
            ]
            zero = all(a is not None and a.zero for t, a in zip(tensors, column, strict=True) if t.shape[d])
            result.append(Axis(np.concatenate(parts), zero, all(a.weight for a in known)))
        else:
            for axis in column:
                if axis is not known[0]:
                    run.equate(known[0], axis, call.op)
            result.append(Axis(known[0].atoms, all(a.zero for a in known), all(a.weight for a in known)))
    run.set(call.out, tuple(result))


def triangle(run: Run, call: Call) -> None:
    # tril(self, diagonal): zeros, which stay what they are in all but the last two dimensions
    run.freeze_each(run.axes(call.named['self'])[-2:], f'a triangle of channels ({call.op})')
    same(run, call)


def im2col(run: Run, call: Call) -> None:
    # im2col(self, kernel_size, dilation, padding, stride): (N, C, H, W) -> (N, C * k, L)
    source = call.named['self']
    batch, channel, *space = run.axes(source)
    run.freeze_space(source, len(space))
    taps = call.out.shape[-2] // source.shape[1]
    out = channel and Axis(np.repeat(channel.atoms, taps), channel.zero)
    run.set(call.out, (batch, out, None))


def col2im(run: Run, call: Call) -> None:
    # col2im(self, output_size, kernel_size, ...): (N, C * k, L) -> (N, C, H, W)
    batch, channel, length = run.axes(call.named['self'])
    run.freeze(length, f'a spatial dimension in {run.where}')
    out = None
    if channel is not None:
        columns = channel.atoms.reshape(call.out.shape[1], -1)
        run.tie(columns)
        out = Axis(columns[:, 0], channel.zero)
    run.set(call.out, (batch, out, None, None))


def glu(run: Run, call: Call) -> None:
    # glu(self, dim): the halves are a * sigmoid(b)
    source = call.named['self']
    axes = list(run.axes(source))
    dim = call.named.get('dim', -1) % source.dim()
    axis = axes[dim]
    if axis is not None:
        halves = axis.atoms.reshape(2, -1)
        run.equate(Axis(halves[0]), Axis(halves[1]), 'glu')
        axes[dim] = Axis(halves[0], axis.zero)
    run.set(call.out, tuple(axes))
