"""What a layer reads and puts out at sampled positions of its output, as matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layer_calls import LayerCall, LayerKind
from ..slim.trial import double


def sample(count: int, limit: int, seed: int, device: torch.device) -> Tensor:
    """Choose at most `limit` of `count` positions, the same ones each time: sorted int64 on `device`."""
    if count <= limit:
        return torch.arange(count, device=device)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:limit].sort().values.to(device)


def flat(output: Tensor, dims: int) -> Tensor:
    """Return a layer's output, or what is shaped alike, as `(N, O, positions of one of N)`: a view where it can be.

    `dims` are those of the layer's weight, 2 for a linear layer.
    """
    if dims == 2:
        return output.reshape(-1, output.shape[-1], 1)
    return (output if output.dim() == dims else output[None]).flatten(2)


def outputs_at(output: Tensor, dims: int, positions: Tensor) -> Tensor:
    """Return a layer's output, or what is shaped alike, at some positions, in float64: `(P, O)`."""
    found = flat(output, dims)
    return double(found[positions // found.shape[2], :, positions % found.shape[2]])


def columns_at(call: LayerCall, output: torch.Size, positions: Tensor) -> Tensor:
    """Return what a layer reads for some positions of its output of this size: float64 `(P, groups, columns, taps)`.

    A column is an input channel of a convolution group, a tap one place of the kernel.
    """
    dims = call.weight.dim()
    if dims == 2:
        return outputs_at(call.input, dims, positions)[:, None, :, None]
    given, shape = call.input, output[2 - dims :]
    given = given if given.dim() == dims else given[None]
    source = _transposed_source if call.kind is LayerKind.TRANSPOSED else _source
    size = shape.numel()
    place = torch.zeros(len(positions), 1, dtype=torch.int64, device=positions.device)
    inside = torch.ones_like(place, dtype=torch.bool)
    for dim, at in enumerate(torch.unravel_index(positions % size, shape)):
        taps = torch.arange(call.weight.shape[2 + dim], device=positions.device)
        index, valid = source(call, dim, at[:, None], taps)  # (P, k)
        valid = valid & (index >= 0) & (index < given.shape[2 + dim])
        index = index.clamp(0, given.shape[2 + dim] - 1)
        place = (place[:, :, None] * given.shape[2 + dim] + index[:, None]).flatten(1)  # (P, taps so far)
        inside = (inside[:, :, None] & valid[:, None]).flatten(1)
    found = double(given.flatten(2)[(positions // size)[:, None], :, place])  # (P, taps, C)
    found = torch.where(inside[:, :, None].to(found.device), found, 0.0)
    return found.unflatten(2, (call.groups, -1)).permute(0, 2, 3, 1)


def _source(call: LayerCall, dim: int, at: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    """Return which input position each tap reads for an output position, and whether it reads one."""
    stride, dilation = (_of(call, name, dim, 1) for name in ('stride', 'dilation'))
    padding = call.arguments.get('padding', 0)
    if padding == 'same':
        left = dilation * (len(taps) - 1) // 2
    else:
        left = 0 if padding == 'valid' else _of(call, 'padding', dim, 0)
    index = at * stride - left + taps * dilation
    return index, torch.ones_like(index, dtype=torch.bool)


def _transposed_source(call: LayerCall, dim: int, at: Tensor, taps: Tensor) -> tuple[Tensor, Tensor]:
    stride, dilation = (_of(call, name, dim, 1) for name in ('stride', 'dilation'))
    index = at + _of(call, 'padding', dim, 0) - taps * dilation
    return index.div(stride, rounding_mode='floor'), index % stride == 0


def _of(call: LayerCall, name: str, dim: int, default: int) -> int:
    value = call.arguments.get(name, default)
    if isinstance(value, int):
        return value
    return int(value[dim] if len(value) > 1 else value[0])


def as_matrix(kind: LayerKind, groups: int, weight: Tensor) -> Tensor:
    """Return a weight as `(groups, columns, taps, outputs)`."""
    flat = weight.flatten(2) if weight.dim() > 2 else weight[:, :, None]
    flat = flat.unflatten(
        0, (groups, -1)
    )  # (groups, outputs, columns, taps); transposed: (groups, columns, outputs, taps)
    return flat.permute(0, 1, 3, 2) if kind is LayerKind.TRANSPOSED else flat.permute(0, 2, 3, 1)


def as_weight(kind: LayerKind, matrix: Tensor, shape: torch.Size) -> Tensor:
    """Return `(groups, columns, taps, outputs)` as a weight of this shape."""
    order = (0, 1, 3, 2) if kind is LayerKind.TRANSPOSED else (0, 3, 1, 2)
    return matrix.permute(order).reshape(shape)
