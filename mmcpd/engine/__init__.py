"""The MMEngine layer: hooks, distillers, slim checkpoints and what the command-line tools share.

Importing it checks OpenMMLab's versions and registers everything that a config may name.
"""

from __future__ import annotations

from mmcpd.compat import require

require('openmmlab')

from mmcpd.engine.compat import mend_scopes  # noqa: E402

mend_scopes()
