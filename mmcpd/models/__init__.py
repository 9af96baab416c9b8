"""Register the models that no OpenMMLab package ships, in mmcpd's scope (`type='mmcpd.SeaFormer'`).

SeaFormer needs MMEngine and MMCV only. The Light head derives from MMSegmentation's `BaseDecodeHead`, CIFAR's ResNets
from MMPretrain's `ResNet`: each exists where that package can be imported.
"""

from __future__ import annotations

from mmcpd.compat import imported, leave_out_multimodal
from mmcpd.models.seaformer import SeaFormer

__all__ = ['SeaFormer']

leave_out_multimodal()  # before anything imports mmpretrain

if imported('mmseg.models') is not None:
    from mmcpd.models.light_head import LightHead

    __all__ += ['LightHead']

if imported('mmpretrain.models') is not None:
    from mmcpd.models.cifar_resnet import CIFARResNet

    __all__ += ['CIFARResNet']
