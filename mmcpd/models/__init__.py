"""Register the models that no OpenMMLab package ships, in mmcpd's scope (`type='mmcpd.SeaFormer'`).

The backbone needs MMEngine and MMCV only. The head derives from MMSegmentation's `BaseDecodeHead`,
so it exists where MMSegmentation is installed.
"""

from __future__ import annotations

from importlib.util import find_spec

from mmcpd.models.seaformer import SeaFormer

__all__ = ['SeaFormer']

if find_spec('mmseg') is not None:
    from mmcpd.models.light_head import LightHead

    __all__ += ['LightHead']
