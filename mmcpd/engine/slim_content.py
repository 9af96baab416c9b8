"""Check what a slim file holds, type by type: it may be damaged, or come from a stranger."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmcpd.cost import COSTS
from mmcpd.errors import SlimError
from mmcpd.slim.check_structure import DIMS
from mmcpd.slim.weights import is_extra_state

ENTRIES = ('version', 'state_dict', 'buffers', 'structure', 'meta', 'checksum')
STRUCTURE = 2**22  # characters of JSON
DEPTH, VALUES = 32, 10**6  # of nested values: a short pickle can name one list many times
PIXELS = 2**28  # of an input
OVERLAP = 4  # times the file's size: tensors may be parts of each other


def check_content(content: Mapping[str, Any], path: Path) -> None:
    """Check that the entries of a slim file have the types that `save_slim` writes.

    Raises:
        SlimError: one has not; the message names it.
    """
    if set(content) != set(ENTRIES):
        unknown = sorted(map(_named, set(content) ^ set(ENTRIES)))
        raise SlimError(f'{path} is damaged, or no slim checkpoint: {unknown[0]} is missing or unknown')
    views: dict[object, int] = {}
    for key in ('state_dict', 'buffers'):
        if not isinstance(content[key], dict) or not all(type(name) is str for name in content[key]):
            raise SlimError(f'{path} is damaged: its {key} is no table by name')
        for name, value in content[key].items():
            if key == 'state_dict' and is_extra_state(name):
                tensors = [tensor for _, tensor in _tensors(value, name, path)]
            else:
                tensors = [value]
            if not all(_is_dense(tensor) for tensor in tensors):
                raise SlimError(f'{path} is damaged: {_named(name)} of its {key} is no plain tensor')
            views |= {(t.data_ptr(), t.dtype, t.shape, t.stride()): t.nbytes for t in tensors}
    if sum(views.values()) > OVERLAP * path.stat().st_size:
        raise SlimError(f'{path} is damaged: its tensors are larger than the file')
    if type(content['structure']) is not str or len(content['structure']) > STRUCTURE:
        raise SlimError(f'{path} is not a slim checkpoint: its structure is not JSON')
    if type(content['checksum']) is not str:
        raise SlimError(f'{path} is damaged: its checksum is no text')
    _check_meta(content['meta'], path)


def _is_dense(value: object) -> bool:
    """Say whether a value is a plain tensor on the CPU with values of its own, not one value under many indices."""
    if type(value) is not Tensor or value.layout is not torch.strided or value.device.type != 'cpu':
        return False
    return not value.is_quantized and not value.is_nested and value.untyped_storage().nbytes() >= value.nbytes


def _tensors(value: Any, where: str, path: Path) -> Iterator[tuple[int, Tensor]]:
    """Yield the tensors in nested plain values.

    Raises:
        SlimError: something else is in it, or too much.
    """
    waiting, count = [(0, value)], 0
    while waiting:
        depth, item = waiting.pop()
        count += 1
        if depth > DEPTH or count > VALUES:
            raise SlimError(f'{path} is damaged: {_named(where)} holds more than {VALUES} values, or is nested')
        if isinstance(item, Tensor):
            yield depth, item
        elif isinstance(item, dict):
            waiting += [(depth + 1, part) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += [(depth + 1, part) for part in item]
        elif item is not None and not isinstance(
            item, bool | int | float | complex | str | bytes | bytearray | torch.dtype | torch.device
        ):
            raise SlimError(f'{path} is damaged: {_named(where)} holds a {type(item).__name__}')


def _check_meta(meta: Any, path: Path) -> None:
    """Check that `meta` is a dict of plain values, and the types of what is read from it."""
    if type(meta) is not dict:
        raise SlimError(f'{path} is damaged: its meta is no table by name')
    if any(True for _ in _tensors(meta, 'meta', path)):
        raise SlimError(f'{path} is damaged: its meta holds a tensor')
    if meta.get('input_shape') is not None and not is_shape(meta['input_shape']):
        raise SlimError(f'{path} is damaged: the input_shape in its meta is no shape of an input')
    for key in ('dense', 'slim', 'dataset_meta'):
        if type(meta.get(key, {})) is not dict:
            raise SlimError(f'{path} is damaged: {key} in its meta is no table by name')
    for key in ('dense', 'slim'):
        for name in (*COSTS, 'units'):
            if type(meta.get(key, {}).get(name, 0)) not in (int, float):
                raise SlimError(f'{path} is damaged: {key}.{name} in its meta is no number')


def is_shape(value: object) -> bool:
    """Say whether a value is the shape of an input, (C, H, W) say, that fits into memory.

    Example:
        >>> is_shape([3, 32, 32]), is_shape([3, 10**6, 10**6]), is_shape('32')
        (True, False, False)
    """
    if not isinstance(value, list | tuple) or len(value) > DIMS or not all(type(n) is int and n > 0 for n in value):
        return False
    return math.prod(value) <= PIXELS


def _named(name: object) -> str:
    """Return a name for a message of one line."""
    return ascii(name)[1:-1][:200] if isinstance(name, str) else type(name).__name__
