"""Put back the values of tensors that a forward writes: queues, running statistics, counters, averages of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ..nested import tensors_in
from .references import plain_attributes


class _Value(NamedTuple):
    """A tensor, the memory that it had, and what stood there."""

    tensor: Tensor
    memory: Tensor
    value: Tensor

    def put_back_(self) -> None:
        if self.tensor.data_ptr() != self.memory.data_ptr() or self.tensor.shape != self.memory.shape:
            self.tensor.data = self.memory
        if self.value is not self.memory and not torch.equal(self.memory, self.value):
            self.memory.copy_(self.value)


@contextmanager
def values_kept(model: nn.Module) -> Iterator[None]:
    """Give all tensors of a model their values back afterwards: parameters, buffers, and those in plain attributes.

    Parameters are only copied where something writes into them.

    Example:
        >>> with values_kept(model):
        ...     _ = model.conv1.weight.data.zero_()
        >>> bool((model.conv1.weight == 0).all())
        False
    """
    plain = [tensor for module in model.modules() for tensor in tensors_in(plain_attributes(module))]
    parameters = [parameter for parameter in model.parameters() if _has_values(parameter)]
    writes = _Writes(parameters)
    held = {id(tensor): tensor for tensor in (*model.buffers(), *plain) if _has_values(tensor)}
    own = [tensor for tensor in held.values() if tensor.untyped_storage()._cdata not in writes.watched]
    values = [_Value(tensor, tensor.detach(), tensor.detach().clone()) for tensor in own]
    try:
        with writes:
            yield
    finally:
        with torch.no_grad():
            for value in (*values, *writes.values(parameters)):
                value.put_back_()


def _has_values(tensor: Tensor) -> bool:
    """Say whether a tensor has values of its own; one that was expanded cannot be written."""
    if is_lazy(tensor) or tensor.is_meta or tensor.is_quantized or tensor.layout is not torch.strided:
        return False
    return all(stride or size < 2 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


class _Writes(TorchDispatchMode):
    """Save tensors just before an operation writes into their memory, however it got at it."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self.watched: dict[int, list[Tensor]] = {}  # by their memory
        self.saved: dict[int, Tensor] = {}
        self._memory = {id(tensor): tensor.detach() for tensor in tensors}
        self._written: dict[Any, list[tuple[int, str]]] = {}
        for memory in self._memory.values():
            self.watched.setdefault(memory.untyped_storage()._cdata, []).append(memory)

    def values(self, tensors: Iterable[Tensor]) -> Iterator[_Value]:
        """Yield what must be put back: tensors that were written into, or that have another memory."""
        for tensor in tensors:
            memory = self._memory[id(tensor)]
            yield _Value(tensor, memory, self.saved.get(id(memory), memory))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self._written:
            arguments = enumerate(func._schema.arguments)
            self._written[func] = [
                (n, a.name) for n, a in arguments if a.alias_info is not None and a.alias_info.is_write
            ]
        for number, name in self._written[func]:
            for tensor in tensors_in(args[number] if number < len(args) else kwargs.get(name)):
                for memory in self.watched.get(tensor.untyped_storage()._cdata, ()) if _has_values(tensor) else ():
                    if id(memory) not in self.saved:
                        self.saved[id(memory)] = memory.clone()
        return func(*args, **kwargs)
