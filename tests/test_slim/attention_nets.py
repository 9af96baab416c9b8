"""An attention whose width comes from its input, in a block: no attribute holds the size of its reshape."""

from __future__ import annotations

import torch
from torch import nn

from mmcpd.coupling import Coupling


class Timm(nn.Module):
    """Attention as timm and many others write it: the width of a head is the embedding's divided by the heads."""

    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, kind=Timm):
        super().__init__()
        self.stem, self.norm, self.attn = nn.Linear(3, 12), nn.LayerNorm(12), kind()
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.attn(self.norm(x))).tanh().mean(1))


GROUPS = {'stem': 12, 'attn.qkv': 4}


def uneven(found: Coupling) -> dict[str, torch.Tensor]:
    """Return a keep after which the embedding's width is not that of all heads together."""
    keep = found.keep()
    keep['stem'][:3] = False
    keep['attn.qkv'][:2] = False
    return keep
