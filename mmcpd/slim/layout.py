"""Take positions out of a dimension and put them back, in the order of memory that a tensor has (channels last)."""

from __future__ import annotations

import torch
from torch import Tensor


def gathered(tensor: Tensor, dim: int, kept: Tensor) -> Tensor:
    """Return these positions of a dimension, (n,) integers; the others are in the same order of memory as before.

    Example:
        >>> x = torch.rand(2, 8, 5, 5).contiguous(memory_format=torch.channels_last)
        >>> gathered(x, 1, torch.tensor([0, 3])).is_contiguous(memory_format=torch.channels_last)
        True
    """
    if tensor.layout is not torch.strided or (order := _order(tensor)) == sorted(order):
        return tensor.index_select(dim, kept)
    part = tensor.permute(order).index_select(order.index(dim % tensor.dim()), kept)
    return part.permute(_back(order))


def spread(part: Tensor, dim: int, kept: Tensor, size: int) -> Tensor:
    """Return a tensor with `size` positions in a dimension, zero but for these, in the order of memory of the part.

    Example:
        >>> spread(torch.ones(1, 2), 1, torch.tensor([0, 2]), 4)
        tensor([[1., 0., 1., 0.]])
    """
    order = _order(part)
    laid = part.permute(order)
    place = order.index(dim % part.dim())
    whole = laid.new_zeros([*laid.shape[:place], size, *laid.shape[place + 1 :]])
    return whole.index_copy(place, kept, laid).permute(_back(order))


def _order(tensor: Tensor) -> list[int]:
    """Return the dimensions from the one whose neighbours are furthest apart in memory to the nearest.

    It is that of what torch makes of the tensor: where some places share their memory, the plain one.
    """
    if tensor.is_contiguous():
        return list(range(tensor.dim()))
    strides = torch.empty_like(tensor, device='meta').stride()
    return sorted(range(tensor.dim()), key=lambda d: -strides[d])


def _back(order: list[int]) -> list[int]:
    return [order.index(d) for d in range(len(order))]
