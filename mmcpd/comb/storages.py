"""Find the axes of a tensor by its memory, where another Python object stands for it, and who else looks into it."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..errors import CombError
from .atoms import Axes

Layout: TypeAlias = tuple[torch.Size, tuple[int, ...], int]


class Storages:
    """Remember which axes lie in which memory.

    A tensor becomes another object by `as_subclass`, which each operation on a tensor of a subclass ends with, and by
    `nn.Parameter(x)`: neither is an operation, and what was written on the first object is not on the second.
    """

    def __init__(self) -> None:
        # The weak reference keeps the address from being used again.
        self._known: dict[int, tuple[StorageWeakRef, dict[Layout, Axes]]] = {}
        self._viewed: dict[int, StorageWeakRef] = {}

    def note(self, tensor: Tensor, axes: Axes) -> None:
        """Note the axes of a tensor."""
        if (storage := memory_of(tensor)) is not None:
            _, layouts = self._known.setdefault(storage._cdata, (StorageWeakRef(storage), {}))
            layouts[_layout(tensor)] = axes

    def find(self, tensor: Tensor) -> Axes | None:
        """Return the axes that were noted for a tensor of the same memory and layout."""
        storage = memory_of(tensor)
        known = None if storage is None else self._known.get(storage._cdata)
        return None if known is None else known[1].get(_layout(tensor))

    def note_view(self, tensor: Tensor) -> None:
        """Note that a tensor without axes is a view of another."""
        if (storage := memory_of(tensor)) is not None:
            self._viewed[storage._cdata] = StorageWeakRef(storage)

    def has_views(self, tensor: Tensor) -> bool:
        """Say whether a view was noted of a tensor's memory."""
        storage = memory_of(tensor)
        return storage is None or storage._cdata in self._viewed


def memory_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return a tensor's memory, None where it has none of one piece.

    Raises:
        CombError: it stands for others, which cannot be observed.
    """
    if tensor.is_nested or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise CombError(
            'the forward computes with nested tensors, or under torch.func (vmap, jacrev), where nothing can be '
            'observed; give comb a `forward=` that goes without'
        )
    return tensor.untyped_storage() if tensor.layout is torch.strided else None


def _layout(tensor: Tensor) -> Layout:
    return tensor.shape, tensor.stride(), int(tensor.storage_offset())
