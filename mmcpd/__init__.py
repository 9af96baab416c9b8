"""Comb, prune, distil: find which channels are coupled, remove those that matter least, teach the rest.

`mmcpd.comb`, `mmcpd.slim`, `mmcpd.prune` and `mmcpd.distill` need torch, numpy and scipy only; `mmcpd.engine`,
`mmcpd.models` and `mmcpd.datasets` are the OpenMMLab layer over them, `mmcpd.deploy` the ONNX one, `mmcpd.cli` the
commands. Configs name what mmcpd registers as `type='mmcpd.PruneHook'`, and need no import: see `mmcpd.registry`.
"""

from __future__ import annotations

from mmcpd.compat import require
from mmcpd.version import __version__

require('pure')

__all__ = ['__version__']
