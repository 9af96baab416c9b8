"""Operations on regions of a picture: pooling by boxes, deformable convolutions, the inverse of a pooling."""

from __future__ import annotations

from ..atoms import FIXED, Axis
from ..trace import Call, Run
from .products import convolution


def region_pool(run: Run, call: Call) -> None:
    # roi_align(input (N, C, H, W), rois (K, 5), ...), roi_pool(...): (K, C, h, w), and where the largest was
    axes = run.axes(call.named['input'])
    run.freeze_each(axes[:1], 'a batch')
    run.freeze_space(call.named['input'], 2)
    run.freeze_all(call.named['rois'], f'boxes in {run.where}')
    for out in call.outputs():
        run.set(out, (None, axes[1], None, None))


def cell_pool(run: Run, call: Call) -> None:
    # ps_roi_align(input (N, C * h * w, H, W), rois, ...): (K, C, h, w); each cell of a box has channels of its own
    axes = run.axes(call.named['input'])
    run.freeze_each(axes[:1], 'a batch')
    run.freeze_space(call.named['input'], 2)
    run.freeze_all(call.named['rois'], f'boxes in {run.where}')
    channel, shape = axes[1], call.outputs()[0].shape
    if channel is not None:
        cells = channel.atoms.reshape(shape[1], -1)
        run.tie(cells)
        run.freeze(Axis(cells[(cells == FIXED).any(axis=1)].ravel()), f'a cell that no layer produces in {run.where}')
        channel = Axis(cells.max(axis=1), channel.zero) if shape[1] > 1 else None
    for out in call.outputs():
        run.set(out, (None, channel, None, None))


def deformable(run: Run, call: Call) -> None:
    # deform_conv2d(input (N, C, H, W), weight, offset (N, 2 * parts * k, h, w), mask, bias, ..., groups, parts, ...)
    for name in ('offset', 'mask'):
        run.freeze_all(call.named[name], f'offsets and masks of a deformable convolution in {run.where}')
    channel, parts = run.axes(call.named['input'])[1], int(call.named['offset_groups'])
    if channel is not None and parts > 1:  # each part of the channels has its own offsets: they stay equally wide
        run.tie(channel.atoms.reshape(parts, -1).T)
    convolution(run, call)


def unpool(run: Run, call: Call) -> None:
    # max_unpool2d(self (..., C, H, W), indices, output_size), max_unpool3d(...): each channel has its own indices
    source, indices = call.named['self'], call.named['indices']
    space = 3 if call.op == 'max_unpool3d' else 2
    axes = run.axes(source)
    run.freeze_space(source, space)
    for axis, own in zip(axes[:-space], run.axes(indices)[:-space], strict=True):
        if axis is not None or own is not None:
            run.equate(axis, own, call.op)
    run.set(call.out, (*(a and a.without_full() for a in axes[:-space]), *[None] * space))


def chosen(run: Run, call: Call) -> None:
    """Freeze channels whose values choose positions: `nonzero`, `masked_select`, `nms`."""
    for tensor in call.tensors():
        run.freeze_all(tensor, f'values of channels choose positions ({call.op}) in {run.where}')
