"""The ResNets that were made for CIFAR's pictures of 32x32: three narrow stages of basic blocks."""

from __future__ import annotations

from typing import Any, ClassVar

from mmpretrain.models.backbones.resnet import BasicBlock
from mmpretrain.models.backbones.resnet_cifar import ResNet_CIFAR

from mmcpd.registry import MODELS


@MODELS.register_module()
class CIFARResNet(ResNet_CIFAR):
    """Build a ResNet-20, 32, 44, 56 or 110, with the parameter names of mmpretrain's ResNets: 16, 32, 64 channels.

    Args:
        depth: 6 n + 2, for stages of n blocks.
        **options: As in mmpretrain's `ResNet`.

    Raises:
        KeyError: Another depth.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2; shortcuts that change
    the width are 1x1 convolutions here.

    Example:
        >>> CIFARResNet(20)(torch.rand(1, 3, 32, 32))[0].shape
        torch.Size([1, 64, 8, 8])
    """

    arch_settings: ClassVar[dict[int, Any]] = {6 * n + 2: (BasicBlock, (n, n, n)) for n in (3, 5, 7, 9, 18)}

    def __init__(self, depth: int, **options: Any) -> None:
        narrow = {'num_stages': 3, 'stem_channels': 16, 'base_channels': 16, 'out_indices': (2,)}
        strides = {'strides': (1, 2, 2), 'dilations': (1, 1, 1)}
        super().__init__(depth, **{**narrow, **strides, **options})
