"""Name the module and the source line where a forward is, or where it failed, for messages."""

from __future__ import annotations

import traceback
from pathlib import Path

from torch import nn

from .call_sites import Spot, receiver, source_range


def place_name(path: str, place: Spot | None) -> str:
    """Name a module, and the source line that runs in it where that is known: `blocks.0 (net.py:12)`."""
    line = None if place is None else source_range(place.code, place.instruction)[0]
    return (path or 'the model itself') + (f' ({Path(place.code.co_filename).name}:{line})' if place and line else '')


def raised_at(error: BaseException) -> str:
    """Return ' in ' and the innermost module and source line that an error came through, or nothing without a module.

    Example:
        >>> try:
        ...     _ = model(images[:, :1])
        ... except RuntimeError as error:
        ...     raised_at(error).startswith(' in conv1 (')
        True
    """
    paths: dict[nn.Module, str] = {}
    path, line = None, ''
    for frame, number in traceback.walk_tb(error.__traceback__):
        package = f'{frame.f_globals.get("__name__", "")}.'
        values = frame.f_locals
        module = receiver(frame.f_code, values)
        if isinstance(values, dict):  # before Python 3.13 a copy that stays on the frame, and may hold the error itself
            values.clear()
        if module is not None and '_modules' in vars(module):
            paths = paths or {each: name for name, each in module.named_modules()}
            path = paths.get(module, path)
        if path is not None and not package.startswith(('torch.', 'mmcpd.')):
            line = f' ({Path(frame.f_code.co_filename).name}:{number})'
    return '' if path is None else f' in {path or "the model itself"}{line}'
