"""Hash tensors and plain values, so that a flipped bit in a file is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors by name, in hex: of their names, dtypes, shapes and bytes, in the names' order.

    Example:
        >>> same = {'b': torch.zeros(2), 'a': torch.ones(2)}, {'a': torch.ones(2), 'b': torch.zeros(2)}
        >>> digest(same[0]) == digest(same[1]) != digest({'a': torch.ones(2), 'b': torch.zeros(2, 1)})
        True
    """
    found, parts = hashlib.sha256(), dict[object, str]()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        view = (
            tensor.device,
            tensor.data_ptr(),
            tensor.dtype,
            tensor.shape,
            tensor.stride(),
            tensor.is_conj(),
            tensor.is_neg(),
        )
        if view not in parts:  # shared tensors are read once
            values = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
            parts[view] = hashlib.sha256(values.numpy().data).hexdigest()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), parts[view]]).encode())
    return found.hexdigest()


def digest_nested(content: object) -> str:
    """Return the SHA-256 of nested dicts, lists and tuples of tensors and plain values, in hex.

    Raises:
        ValueError: something in it is of another type.

    Example:
        >>> digest_nested({'a': [torch.ones(2), 1]}) == digest_nested({'a': [torch.ones(2), 1.0]})
        False
    """
    tensors: dict[str, Tensor] = {}
    form = json.dumps(_form(content, tensors))
    return hashlib.sha256(f'{digest(tensors)}{form}'.encode()).hexdigest()


def _form(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Describe a value in JSON types, with types by name; tensors are put aside, and numbered."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return [kind]
    if value is None or isinstance(value, bool | int | float | str):
        return [kind, value]
    if isinstance(value, dict):
        return [kind, [[_form(key, tensors), _form(item, tensors)] for key, item in value.items()]]
    if isinstance(value, list | tuple):
        return [kind, [_form(item, tensors) for item in value]]
    if isinstance(value, set | frozenset):
        return [kind, sorted(json.dumps(_form(item, tensors)) for item in value)]
    if isinstance(value, complex | bytes | bytearray | torch.dtype | torch.device):
        return [kind, repr(value)]
    raise ValueError(f'a {kind} has no checksum')
