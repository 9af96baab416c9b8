"""The MMEngine layer: hooks, distillers, slim checkpoints and what the command-line tools share.

Importing it checks OpenMMLab's versions and registers everything that a config may name.
"""

from __future__ import annotations

import warnings

from mmcpd.compat import require

require('openmmlab')
require('detection')

from mmcpd.engine.operators import stand_in  # noqa: E402

stand_in()  # before anything imports mmcv.ops

with warnings.catch_warnings():
    # mmcv warns of its own old name of a module at each start.
    warnings.filterwarnings('ignore', message='``MultiScaleDeformableAttention`` has been moved')
    from mmcpd import datasets, models
    from mmcpd.engine.checkpoint_hook import CheckpointHook
    from mmcpd.engine.checkpoints import load_slim
    from mmcpd.engine.comb_hook import CombHook
    from mmcpd.engine.compat import mend_scopes
    from mmcpd.engine.distillers import Distiller
    from mmcpd.engine.hooks import PruneHook
    from mmcpd.engine.reader import install
    from mmcpd.engine.slim_model import slimmed

mend_scopes()
install()

__all__ = ['CheckpointHook', 'CombHook', 'Distiller', 'PruneHook', 'datasets', 'load_slim', 'models', 'slimmed']
