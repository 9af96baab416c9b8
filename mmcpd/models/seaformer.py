"""SeaFormer, a mobile backbone of inverted residuals and squeeze-enhanced axial attention.

Source: Wan et al., "SeaFormer: Squeeze-enhanced Axial Transformer for Mobile Semantic Segmentation",
ICLR 2023. Module names are the state-dict keys of the authors' checkpoints.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule, PretrainedInit, initialize
from torch import Tensor, nn

from mmcpd.models.convert import load_backbone
from mmcpd.registry import MODELS

NORM_CFG: dict = dict(type='BN', requires_grad=True)

# One row per size. stages: kernel size, expansion ratio, output channels, stride of each inverted residual.
# depths, key_dims, num_heads, mlp_ratios: one entry per transformer stage; these follow the last mobile ones.
# fmt: off
ARCHS: dict[str, dict[str, Any]] = dict(
    tiny=dict(
        stem_channels=16, depths=[2, 2], key_dims=[16, 24], num_heads=[4, 4], mlp_ratios=[2, 4],
        stages=[[[3, 1, 16, 1], [3, 4, 16, 2], [3, 3, 16, 1]],
                [[5, 3, 32, 2], [5, 3, 32, 1]], [[3, 3, 64, 2], [3, 3, 64, 1]],
                [[5, 3, 128, 2]], [[3, 6, 160, 2]]]),
    small=dict(
        stem_channels=16, depths=[3, 3], key_dims=[16, 24], num_heads=[6, 6], mlp_ratios=[2, 4],
        stages=[[[3, 1, 16, 1], [3, 4, 24, 2], [3, 3, 24, 1]],
                [[5, 3, 48, 2], [5, 3, 48, 1]], [[3, 3, 96, 2], [3, 3, 96, 1]],
                [[5, 4, 160, 2]], [[3, 6, 192, 2]]]),
    base=dict(
        stem_channels=16, depths=[4, 4], key_dims=[16, 24], num_heads=[8, 8], mlp_ratios=[2, 4],
        stages=[[[3, 1, 16, 1], [3, 4, 32, 2], [3, 3, 32, 1]],
                [[5, 3, 64, 2], [5, 3, 64, 1]], [[3, 3, 128, 2], [3, 3, 128, 1]],
                [[5, 4, 192, 2]], [[3, 6, 256, 2]]]),
    large=dict(
        stem_channels=32, depths=[3, 3, 3], key_dims=[16, 20, 24], num_heads=[8, 8, 8], mlp_ratios=[2, 4, 6],
        stages=[[[3, 3, 32, 1], [3, 4, 64, 2], [3, 4, 64, 1]],
                [[5, 4, 128, 2], [5, 4, 128, 1]], [[3, 4, 192, 2], [3, 4, 192, 1]],
                [[5, 4, 256, 2]], [[3, 6, 320, 2]]]),
)
# fmt: on
ALIASES: dict[str, str] = dict(t='tiny', s='small', b='base', l='large')


class ConvNorm(nn.Sequential):
    """Apply a convolution without bias, then a norm: (N, in_channels, H, W) -> (N, out_channels, H', W').

    `zero_init` starts the norm's weight at 0, so that the branch begins as silent.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm_cfg: dict = NORM_CFG,
        zero_init: bool = False,
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
        norm = build_norm_layer(norm_cfg, out_channels)[1]
        nn.init.constant_(norm.weight, 0.0 if zero_init else 1.0)
        super().__init__(OrderedDict(c=conv, bn=norm))


class InvertedResidual(nn.Module):
    """Expand, convolve depthwise and project: (N, in_channels, H, W) -> (N, out_channels, H / stride, W / stride).

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        expand_ratio: int,
        norm_cfg: dict = NORM_CFG,
    ) -> None:
        super().__init__()
        hidden = expand_ratio * in_channels
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers += [ConvNorm(in_channels, hidden, norm_cfg=norm_cfg), nn.ReLU()]
        layers += [ConvNorm(hidden, hidden, kernel_size, stride, groups=hidden, norm_cfg=norm_cfg), nn.ReLU()]
        layers += [ConvNorm(hidden, out_channels, norm_cfg=norm_cfg)]
        self.conv = nn.Sequential(*layers)
        self.with_res_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.with_res_shortcut else self.conv(x)


class AxialPositionEmbedding(nn.Module):
    """Add a learned embedding of `length` positions, interpolated to the length of the input: (N, C, L) -> (N, C, L).

    Source: Wan et al., SeaFormer, squeeze axial position embedding.
    """

    def __init__(self, channels: int, length: int = 16) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, channels, length))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.pos_embed, x.shape[2], mode='linear', align_corners=False)


class SqueezeAxialAttention(nn.Module):
    """Attend along the means of rows and columns and gate local details: (N, C, H, W) -> (N, C, H, W).

    The widths per head of q and k (`key_dim`) and of v (`head_dim`) are read at every forward and independent
    of each other; the `scale` stays that of the width at construction.

    Source: Wan et al., SeaFormer, squeeze-enhanced axial attention with the detail enhancement kernel.
    """

    def __init__(
        self, embed_dims: int, key_dim: int, num_heads: int, attn_ratio: int = 2, norm_cfg: dict = NORM_CFG
    ) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, key_dim**-0.5
        self.key_dim, self.head_dim = key_dim, attn_ratio * key_dim
        qk_width, v_width = num_heads * self.key_dim, num_heads * self.head_dim
        all_width = 2 * qk_width + v_width

        self.to_q = ConvNorm(embed_dims, qk_width, norm_cfg=norm_cfg)
        self.to_k = ConvNorm(embed_dims, qk_width, norm_cfg=norm_cfg)
        self.to_v = ConvNorm(embed_dims, v_width, norm_cfg=norm_cfg)
        self.dwconv = ConvNorm(all_width, all_width, 3, groups=all_width, norm_cfg=norm_cfg)
        self.act = nn.ReLU6()
        self.pwconv = ConvNorm(all_width, embed_dims, norm_cfg=norm_cfg)
        self.pos_emb_rowq = AxialPositionEmbedding(qk_width)
        self.pos_emb_rowk = AxialPositionEmbedding(qk_width)
        self.pos_emb_columnq = AxialPositionEmbedding(qk_width)
        self.pos_emb_columnk = AxialPositionEmbedding(qk_width)

        def project(width: int) -> nn.Sequential:
            return nn.Sequential(nn.ReLU6(), ConvNorm(v_width, width, norm_cfg=norm_cfg, zero_init=True))

        self.proj_encode_row = project(v_width)
        self.proj_encode_column = project(v_width)
        self.proj = project(embed_dims)
        self.gate = nn.Hardsigmoid()

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend over L positions: q, k (N, heads * key_dim, L) and v (N, heads * head_dim, L) -> like v."""
        q = q.unflatten(1, (self.num_heads, self.key_dim)).transpose(2, 3)  # (N, heads, L, key_dim)
        k = k.unflatten(1, (self.num_heads, self.key_dim))  # (N, heads, key_dim, L)
        v = v.unflatten(1, (self.num_heads, self.head_dim)).transpose(2, 3)  # (N, heads, L, head_dim)
        weights = (q @ k * self.scale).softmax(dim=-1)  # (N, heads, L, L)
        return (weights @ v).transpose(2, 3).flatten(1, 2)  # (N, heads * head_dim, L)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        detail = self.pwconv(self.act(self.dwconv(torch.cat((q, k, v), dim=1))))
        row = self.attend(self.pos_emb_rowq(q.mean(3)), self.pos_emb_rowk(k.mean(3)), v.mean(3))
        row = self.proj_encode_row(row.unsqueeze(3))  # (N, heads * head_dim, H, 1)
        column = self.attend(self.pos_emb_columnq(q.mean(2)), self.pos_emb_columnk(k.mean(2)), v.mean(2))
        column = self.proj_encode_column(column.unsqueeze(2))  # (N, heads * head_dim, 1, W)
        return self.gate(self.proj(v + (row + column))) * detail


class ConvMlp(nn.Module):
    """Expand, mix 3x3 neighbours depthwise and project back: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, embed_dims: int, mlp_ratio: int, norm_cfg: dict = NORM_CFG) -> None:
        super().__init__()
        hidden = mlp_ratio * embed_dims
        self.fc1 = ConvNorm(embed_dims, hidden, norm_cfg=norm_cfg)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.act = nn.ReLU6()
        self.fc2 = ConvNorm(hidden, embed_dims, norm_cfg=norm_cfg)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.dwconv(self.fc1(x))))


class TransformerBlock(nn.Module):
    """Add attention, then an MLP, each as a residual branch with drop path: (N, C, H, W) -> (N, C, H, W)."""

    def __init__(
        self, embed_dims: int, key_dim: int, num_heads: int, mlp_ratio: int, drop_path: float, norm_cfg: dict = NORM_CFG
    ) -> None:
        super().__init__()
        self.attn = SqueezeAxialAttention(embed_dims, key_dim, num_heads, norm_cfg=norm_cfg)
        self.mlp = ConvMlp(embed_dims, mlp_ratio, norm_cfg=norm_cfg)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(x))
        return x + self.drop_path(self.mlp(x))


@MODELS.register_module()
class SeaFormer(BaseModule):
    """Extract features at several scales with the SeaFormer backbone.

    Args:
        arch: A size by name ('tiny', 'small', 'base', 'large', or its first letter), or a dict with the
            fields of a row of `ARCHS`: stem_channels, stages, depths, key_dims, num_heads, mlp_ratios.
        in_channels: Channels of the input image.
        drop_path_rate: Drop-path rate of the last block of each transformer stage; it rises linearly from 0.
        norm_cfg: Config of the norm layers.
        init_cfg: MMEngine's initialization config. `type='Pretrained'` also reads the authors' classification
            checkpoints, see `load_backbone`.

    Raises:
        ValueError: If the name is unknown, a field is missing or unknown, or the fields' lengths disagree.

    Example:
        >>> [tuple(features.shape) for features in SeaFormer('tiny').eval()(torch.rand(1, 3, 64, 64))]
        [(1, 32, 8, 8), (1, 128, 2, 2), (1, 160, 1, 1)]
    """

    def __init__(
        self,
        arch: str | Mapping[str, Any] = 'tiny',
        in_channels: int = 3,
        drop_path_rate: float = 0.1,
        norm_cfg: dict = NORM_CFG,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        arch = _resolve(arch)
        self.num_stages = len(arch['stages'])
        self.num_mobile_only = self.num_stages - len(arch['depths'])
        channels = arch['stem_channels']
        stem = nn.Sequential(ConvNorm(in_channels, channels, 3, 2, norm_cfg=norm_cfg), nn.ReLU())
        for i, rows in enumerate(arch['stages']):
            layers: OrderedDict[str, nn.Module] = OrderedDict(stem_block=stem) if i == 0 else OrderedDict()
            for j, (kernel_size, expand_ratio, width, stride) in enumerate(rows, 1):
                layers[f'layer{j}'] = InvertedResidual(channels, width, kernel_size, stride, expand_ratio, norm_cfg)
                channels = width
            self.add_module(f'smb{i + 1}', nn.Sequential(layers))
            t = i - self.num_mobile_only  # the transformer stage that follows, if any
            if t >= 0:
                depth = arch['depths'][t]
                rates = [drop_path_rate * n / max(depth - 1, 1) for n in range(depth)]
                shape = (channels, arch['key_dims'][t], arch['num_heads'][t], arch['mlp_ratios'][t])
                blocks = [TransformerBlock(*shape, rate, norm_cfg) for rate in rates]
                stage: OrderedDict[str, nn.Module] = OrderedDict(transformer_blocks=nn.Sequential(*blocks))
                self.add_module(f'trans{t + 1}', nn.Sequential(stage))

    def init_weights(self) -> None:
        """Draw convolution weights from N(0, 2 / fan_out) or follow `init_cfg`; pretrained weights come last.

        A depthwise filter's fan-out is its kernel's size, which MMEngine's `KaimingInit` does not know.
        """
        cfgs = [self.init_cfg] if isinstance(self.init_cfg, dict) else list(self.init_cfg or ())
        pretrained = [cfg for cfg in cfgs if cfg['type'] in ('Pretrained', PretrainedInit)]
        others = [cfg for cfg in cfgs if cfg not in pretrained]
        if others:
            initialize(self, others)
        elif not pretrained:
            for module in self.modules():
                if isinstance(module, nn.Conv2d):
                    fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
                    nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)
        for cfg in pretrained:
            load_backbone(self, cfg['checkpoint'], cfg.get('prefix'))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (N, in_channels, H, W) to the 1/8 features of `smb2` and each transformer stage's output."""
        outputs = []
        for i in range(self.num_stages):
            x = self.get_submodule(f'smb{i + 1}')(x)
            if i == 1:
                outputs.append(x)
            if i >= self.num_mobile_only:
                x = self.get_submodule(f'trans{i - self.num_mobile_only + 1}')(x)
                outputs.append(x)
        return tuple(outputs)


def _resolve(arch: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields of an architecture given by name or by value, checked."""
    if isinstance(arch, str):
        name = ALIASES.get(arch, arch)
        if name not in ARCHS:
            raise ValueError(f'SeaFormer: arch {arch!r} is unknown; give one of {[*ARCHS, *ALIASES]} or a dict')
        return ARCHS[name]
    fields = set(ARCHS['tiny'])
    if set(arch) != fields:
        raise ValueError(f'SeaFormer: a dict arch needs exactly {sorted(fields)}, not {sorted(arch)}')
    lengths = {key: len(arch[key]) for key in ('depths', 'key_dims', 'num_heads', 'mlp_ratios')}
    if len(set(lengths.values())) != 1:
        raise ValueError(f'SeaFormer: give one entry per transformer stage in each of {lengths}')
    room = len(arch['stages']) - 2
    if lengths['depths'] > room:
        raise ValueError(
            f'SeaFormer: {room + 2} mobile stages take at most {room} transformer stages, not {lengths["depths"]}; '
            'the first two only make the 1/8 features'
        )
    return arch
