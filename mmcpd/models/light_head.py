"""The Light head of SeaFormer: fuse local detail with global context and classify each pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmcv.cnn import ConvModule
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.utils import resize
from torch import Tensor, nn

from mmcpd.registry import MODELS


class FusionBlock(nn.Module):
    """Weight local features by a gate made of global ones: (N, embed_dims, H, W) at the local resolution.

    Source: Wan et al., "SeaFormer", ICLR 2023, fusion block of the light segmentation head.
    """

    def __init__(
        self, local_channels: int, global_channels: int, embed_dims: int, align_corners: bool, **conv_kwargs: Any
    ) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.local_embedding = ConvModule(local_channels, embed_dims, 1, act_cfg=None, **conv_kwargs)
        self.global_act = ConvModule(global_channels, embed_dims, 1, act_cfg=None, **conv_kwargs)
        self.gate = nn.Hardsigmoid()

    def forward(self, local: Tensor, context: Tensor) -> Tensor:
        """Fuse local (N, C_l, H, W) and context (N, C_g, H', W') into (N, embed_dims, H, W)."""
        gate = self.gate(self.global_act(context))
        gate = resize(gate, size=local.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return self.local_embedding(local) * gate


@MODELS.register_module()
class LightHead(BaseDecodeHead):
    """Segment from the 1/8 features, refined by each coarser feature map in turn.

    Args:
        embed_dims: Width after each fusion; one entry less than `in_channels`, the last equal to `channels`.
        kwargs: Arguments of mmseg's `BaseDecodeHead`; in_channels and in_index begin with the local features.

    Raises:
        ValueError: If the widths do not fit together.

    Example:
        >>> head = LightHead([6, 8], in_channels=[3, 4, 5], in_index=[0, 1, 2], channels=8, num_classes=150)
        >>> features = [torch.rand(1, c, s, s) for c, s in ((3, 8), (4, 2), (5, 1))]
        >>> tuple(head.eval()(features).shape)
        (1, 150, 8, 8)
    """

    def __init__(self, embed_dims: Sequence[int], **kwargs: Any) -> None:
        super().__init__(input_transform='multiple_select', **kwargs)
        if len(embed_dims) != len(self.in_channels) - 1 or embed_dims[-1] != self.channels:
            raise ValueError(
                f'LightHead: embed_dims {list(embed_dims)} needs one entry for each of in_channels '
                f'{list(self.in_channels)} after the first, and must end with channels={self.channels}'
            )
        conv_kwargs = dict(conv_cfg=self.conv_cfg, norm_cfg=self.norm_cfg)
        local_channels = self.in_channels[0]
        for i, (global_channels, width) in enumerate(zip(self.in_channels[1:], embed_dims, strict=True), 1):
            fuse = FusionBlock(local_channels, global_channels, width, self.align_corners, **conv_kwargs)
            self.add_module(f'fuse{i}', fuse)
            local_channels = width
        self.linear_fuse = ConvModule(
            self.channels, self.channels, 1, groups=self.channels, act_cfg=self.act_cfg, **conv_kwargs
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map feature maps to class scores at the local resolution, (N, out_channels, H, W)."""
        x, *contexts = self._transform_inputs(inputs)
        for i, context in enumerate(contexts, 1):
            x = self.get_submodule(f'fuse{i}')(x, context)
        return self.cls_seg(self.linear_fuse(x))
