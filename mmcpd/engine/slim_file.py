"""The file `slim.pth`: a slim model's weights, and the structure that cuts a config's dense model to its size."""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import print_log
from torch import nn

from mmcpd.engine.hashing import digest_nested
from mmcpd.engine.reader import PathLike, load
from mmcpd.engine.slim_content import check_content
from mmcpd.errors import SlimError, first_line
from mmcpd.files import whole
from mmcpd.slim.weights import is_extra_state, weights
from mmcpd.version import __version__

VERSION = 4  # of the file; raise it whenever an older mmcpd could not read what is written


def save_slim(path: PathLike, model: nn.Module, structure: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a slim model's checkpoint, whole or not at all; its folder is made.

    `structure` is that of `mmcpd.slim.structure`, `meta` plain values; MMEngine's own readers look for `dataset_meta`.

    Raises:
        ValueError: `meta` or `structure` holds something that is not plain; reading it could run code.

    Example:
        >>> from tempfile import mkdtemp
        >>> from mmcpd.slim import structure
        >>> path = Path(mkdtemp(), 'slim.pth')
        >>> save_slim(path, small, structure(model, small), {'epoch': 30})
        >>> read_slim(path)['meta']['epoch']
        30
    """
    path, values = Path(path), weights(model)
    # State dicts leave them out, and the constructor makes them at the dense width.
    cut = set(structure.get('tensors', ())) - values.keys()
    content = {
        'version': VERSION,
        'state_dict': {name: _on_cpu(value, name) for name, value in values.items()},
        'buffers': {name: buffer.cpu() for name, buffer in model.named_buffers() if name in cut},
        'structure': json.dumps(_plain(structure, 'structure')),
        'meta': {'mmcpd_version': __version__, **_plain(meta, 'meta')},
    }
    content['checksum'] = checksum(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, content)


def _on_cpu(value: Any, name: str) -> Any:
    """Return a tensor on the CPU, or an extra state that can be read again without running code.

    Raises:
        ValueError: it cannot.
    """
    if not is_extra_state(name):
        return value.cpu()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    try:
        return torch.load(buffer, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f'{name}: what get_extra_state returns must be tensors and plain values, not {type(value).__name__}'
        ) from error


def checksum(content: Mapping[str, Any]) -> str:
    """Return the SHA-256, in hex, of what a slim file holds beside it.

    Example:
        >>> len(checksum({'version': VERSION, 'state_dict': model.state_dict()}))
        64
    """
    return digest_nested([[name, content[name]] for name in sorted(content) if name != 'checksum'])


def save_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a file of `torch.save` whole or not at all."""
    with whole(path) as unfinished:
        torch.save(content, unfinished)


def read_slim(path: PathLike) -> dict[str, Any]:
    """Read a slim checkpoint without running any code from it: `state_dict`, `structure` (parsed), `meta`, `version`.

    Raises:
        SlimError: The file is missing, truncated, not a slim checkpoint, or of another version.
    """
    content = load(path, 'cpu', plain=True)
    if not _has_structure(content):
        raise SlimError(
            f'{path} is not a slim checkpoint: it has no structure. Cut one from a training checkpoint by '
            '`mmcpd slim`, or give the slim.pth that training wrote'
        )
    version = content.get('version')
    if type(version) is not int or version != VERSION:
        shown = version if version is None or type(version) is int else type(version).__name__
        raise SlimError(
            f'{path} is a slim checkpoint of version {shown}, and mmcpd {__version__} reads version '
            f'{VERSION}: cut it again from its training checkpoint by `mmcpd slim`, or use the mmcpd that wrote it'
        )
    check_content(content, Path(path))
    if content['checksum'] != checksum(content):
        raise SlimError(
            f'{path} is damaged: its checksum does not match. Copy it again, or cut it again by `mmcpd slim`'
        )
    try:
        structure = json.loads(content['structure'], parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise SlimError(f'{path} is not a slim checkpoint: its structure is not JSON ({first_line(error)})') from error
    if not isinstance(structure, dict):
        raise SlimError(f'{path} is not a slim checkpoint: its structure is a {type(structure).__name__}')
    return {**content, 'structure': structure}


def is_slim(path: PathLike) -> bool:
    """Say whether a file is a slim checkpoint, of any version; whatever cannot be read is not."""
    try:
        return _has_structure(load(path, 'cpu', plain=True))
    except SlimError:
        return False


def _has_structure(content: Any) -> bool:
    return isinstance(content, dict) and {'state_dict', 'structure'} <= content.keys()


def _no_number(text: str) -> None:
    raise ValueError(f'{text} is no size')


def plain_entries(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the entries that a slim file can hold, arrays as lists; a warning names those that it cannot.

    Example:
        >>> plain_entries({'palette': np.zeros((1, 3), int), 'draw': print}, 'metainfo')
        {'palette': [[0, 0, 0]]}
    """
    kept = {}
    for name, value in values.items():
        try:
            kept[str(name)] = _plain(value, where)
        except ValueError:
            text = f'{name} of the {where} is no plain value ({type(value).__name__}), and is left out of slim.pth'
            print_log(text, 'current', logging.WARNING)
    return kept


def _plain(value: Any, where: str) -> Any:
    """Return the value as dicts, lists, strings and numbers, of exactly those types."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f'{where}.{key}') for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f'{where}[{number}]') for number, item in enumerate(value)]
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return _plain(value.tolist(), where)
    raise ValueError(f'{where} of a slim checkpoint must be plain values, not {type(value).__name__}')
