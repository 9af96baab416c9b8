"""Comb, prune, distil: find what belongs together in a model, remove what matters least, teach the rest.

`mmcpd.comb`, `mmcpd.prune` and `mmcpd.distill` need torch, numpy and scipy only; `mmcpd.engine`,
`mmcpd.models` and `mmcpd.datasets` are the OpenMMLab layer over them, `mmcpd.deploy` the ONNX one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmcpd.compat import require
from mmcpd.version import __version__

require('pure')

__all__ = ['__version__']

# Where `type='mmcpd.CombHook'` is looked for: MMEngine imports a name whose scope has no registry.
CONFIG_FOLDERS = ('mmcpd.engine', 'mmcpd.models', 'mmcpd.datasets', 'mmcpd.distill')


def __getattr__(name: str) -> Any:
    """Find what a config names as `mmcpd.Name`; class names only, so that plain imports stay light."""
    if name[:1].isupper():
        for folder in CONFIG_FOLDERS:
            found = getattr(import_module(folder), name, None)
            if found is not None:
                return found
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
