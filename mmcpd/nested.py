"""Find the tensors in whatever a forward takes and gives out, and change them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import Tensor, nn

_PLAIN = (
    int,
    float,
    str,
    bytes,
    type(None),
)  # they hold nothing; their subclasses may have attributes, which are notes


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dictionaries and plain objects, data classes among them.

    A plain object has attributes, and is no module and cannot be called: OpenMMLab's data samples.
    """
    return list(named_tensors_in(value).values())


def named_tensors_in(value: Any) -> dict[str, Tensor]:
    """Return all tensors that `tensors_in` returns, each under the path to it.

    Example:
        >>> list(named_tensors_in({'loss': torch.ones(1), 'boxes': [torch.ones(4)]}))
        ['loss', 'boxes.0']
    """
    found: dict[str, Tensor] = {}
    _visit(value, '', found, set())
    return found


def _visit(part: Any, path: str, found: dict[str, Tensor], seen: set[int]) -> None:
    if isinstance(part, Tensor):
        found[path] = part
    elif id(part) not in seen and (children := _children(part)) is not None:
        seen.add(id(part))
        for name, child in children:
            if not isinstance(child, _PLAIN):  # most of a configuration is
                _visit(child, f'{path}.{name}' if path else str(name), found, seen)


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of what `tensors_in` looks into, with each tensor changed.

    Example:
        >>> map_tensors({'x': [torch.ones(1), 2]}, torch.neg)
        {'x': [tensor([-1.]), 2]}
    """
    if isinstance(value, Tensor):
        return change(value)
    if _children(value) is None:
        return value
    if isinstance(value, (list, tuple)):
        items = [map_tensors(each, change) for each in value]
        return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
    twin = copy.copy(value)
    parts = twin if isinstance(twin, dict) else vars(twin)
    parts.update({name: map_tensors(each, change) for name, each in parts.items()})
    return twin


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return what a container or a plain object holds, by name; None of anything else.

    Attributes are in alphabetical order: MMEngine's samples have theirs in that of a set, another one in each process.
    """
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    opaque = callable(value) or isinstance(value, (nn.Module, ModuleType, *_PLAIN))
    return None if opaque or not hasattr(value, '__dict__') else sorted(vars(value).items())
