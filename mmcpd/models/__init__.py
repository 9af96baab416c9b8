"""Register the models that no OpenMMLab package ships, in mmcpd's scope (`type='mmcpd.SeaFormer'`).

SeaFormer needs MMEngine and MMCV only. The Light head derives from MMSegmentation's `BaseDecodeHead`, CIFAR's ResNets
from MMPretrain's `ResNet`: each exists where that package is installed.
"""

from __future__ import annotations

from importlib.util import find_spec

from mmcpd.models.seaformer import SeaFormer

__all__ = ['SeaFormer']

if find_spec('mmseg') is not None:
    from mmcpd.models.light_head import LightHead

    __all__ += ['LightHead']

if find_spec('mmpretrain') is not None:
    from mmcpd.models.cifar_resnet import CIFARResNet

    __all__ += ['CIFARResNet']
