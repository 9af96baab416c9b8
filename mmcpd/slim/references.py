"""Find the references to a model's tensors and modules that stand in plain attributes, and let them follow.

A momentum model keeps `dict(source.named_parameters())`, an assigner a list of layers: nothing registers them there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..nested import tensors_in

OWN = frozenset(vars(nn.Module()))  # parameters, buffers, modules, hooks


class Replaced(NamedTuple):
    """A tensor or a module of a model, and what took its place."""

    old: Tensor | nn.Module
    new: Tensor | nn.Module


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside parameters, buffers, modules and hooks."""
    return {name: value for name, value in vars(module).items() if name not in OWN}


def detached_references(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(reference, tensor)` for tensors in plain attributes that are a parameter or buffer of a model, detached.

    `state_dict()` returns such references: other objects, but the same memory.
    """
    own = [*model.parameters(), *model.buffers()]
    objects, places = set(map(id, own)), {place: tensor for tensor in own if (place := _place(tensor)) is not None}
    for module in model.modules():
        for tensor in tensors_in(plain_attributes(module)):
            if id(tensor) not in objects and (owner := places.get(_place(tensor))) is not None:
                yield tensor, owner


def _place(tensor: Tensor) -> object:
    """Return where a tensor's values lie, also where they are on the meta device, or None if that is not one place."""
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return None
    storage = tensor.untyped_storage()._cdata
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype


def refer_(model: nn.Module, replaced: Iterable[Replaced]) -> None:
    """Let plain attributes that refer to what was replaced refer to what took its place, at any depth.

    Looked into are dictionaries, lists, tuples, sets, data classes and plain objects.
    """
    swap = _Swap([pair for pair in replaced if pair.old is not pair.new])
    for module in model.modules() if swap.replaced else ():
        for name, value in plain_attributes(module).items():
            vars(module)[name] = swap.of(value)


class _Swap:
    """Swap references in place where that is possible, and in a new tuple where it is not."""

    def __init__(self, replaced: list[Replaced]) -> None:
        self.replaced = replaced  # alive: the identity of one that is freed may become another's
        self.done: dict[int, Any] = {id(old): new for old, new in replaced}
        pairs = [(old, new) for old, new in replaced if isinstance(old, Tensor) and isinstance(new, Tensor)]
        self.places = {place: new.detach() for old, new in pairs if (place := _place(old)) is not None}

    def of(self, value: Any) -> Any:
        """Return what stands for a value now."""
        if id(value) in self.done:
            return self.done[id(value)]
        if isinstance(value, Tensor):
            return self.places.get(_place(value), value)
        self.done[id(value)] = value  # before what is in it: it may contain itself
        if isinstance(value, tuple):
            self.done[id(value)] = self._tuple(value)
        elif isinstance(value, dict):
            keys, items = list(map(self.of, value)), list(map(self.of, value.values()))
            if not _same([*keys, *items], [*value, *value.values()]):
                value.clear()
                value.update(zip(keys, items, strict=True))
        elif isinstance(value, (list, set)):
            items = list(map(self.of, value))
            if not _same(items, value):
                value.clear()
                (value.extend if isinstance(value, list) else value.update)(items)
        elif not callable(value) and not isinstance(value, nn.Module | ModuleType):
            for name, item in _attributes(value):
                if (new := self.of(item)) is not item:
                    object.__setattr__(value, name, new)
        return self.done[id(value)]

    def _tuple(self, value: Any) -> Any:
        items = [self.of(item) for item in value]
        if _same(items, value):
            return value
        return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)


def _same(left: Iterable[object], right: Iterable[object]) -> bool:
    return all(a is b for a, b in zip(left, right, strict=True))


def _attributes(value: object) -> list[tuple[str, Any]]:
    if hasattr(value, '__dict__'):
        return list(vars(value).items())
    names = [each.name for each in fields(value)] if is_dataclass(value) else []
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]
