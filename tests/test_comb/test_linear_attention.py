"""Attention without a softmax: queries, keys and values of several scales, by convolutions that know their heads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact import exact
from tests.helpers import sample

PICTURES = sample((2, 3, 4, 5))


class MultiScale(nn.Module):
    """As EfficientViT's: a second scale by a depthwise convolution and one within the queries, keys, values of a head.

    Values get a one, with which the sum of the weights comes out beside the weighted sum.
    """

    def __init__(self, dim: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.dim, rows, groups = dim, 3 * heads * dim, 3 * heads
        self.stem, self.qkv = nn.Conv2d(3, 6, 1), nn.Conv2d(6, rows, 1)
        near, within = nn.Conv2d(rows, rows, 3, padding=1, groups=rows), nn.Conv2d(rows, rows, 1, groups=groups)
        self.scale, self.proj, self.fc = (
            nn.Sequential(near, within),
            nn.Conv2d(2 * heads * dim, 5, 1),
            nn.Conv2d(5, 2, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        first = self.qkv(self.stem(x))
        tokens = torch.cat([first, self.scale(first)], 1).reshape(n, -1, 3 * self.dim, h * w).transpose(2, 3)
        q, k, v = tokens.chunk(3, -1)
        out = q.relu() @ (k.relu().mT @ F.pad(v, (0, 1), value=1.0))
        out = out[..., :-1] / (out[..., -1:] + 1e-3)
        return self.fc(self.proj(out.transpose(2, 3).reshape(n, -1, h, w)))


@pytest.mark.parametrize(('dim', 'heads'), [(4, 2), (3, 4)])
def test_heads_of_several_scales_become_narrower(dim, heads):
    exact(MultiScale(dim, heads), PICTURES, {'stem': 6, 'qkv': dim, 'proj': 5})


class Positional(nn.Module):
    """As ConViT's: a small layer makes one channel for each head of relative positions, and a gate mixes both."""

    def __init__(self, dim: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.stem, self.fc = heads, nn.Linear(3, 6), nn.Linear(6, 2)
        self.qk, self.v = nn.Linear(6, 2 * heads * dim), nn.Linear(6, heads * dim)
        self.places, self.proj = nn.Linear(2, heads), nn.Linear(heads * dim, 6)
        self.gate = nn.Parameter(torch.rand(heads))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, tokens, _ = x.shape
        q, k = self.qk(x).reshape(n, tokens, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        near = torch.arange(tokens)[:, None] - torch.arange(tokens)
        near = self.places(torch.stack([near, near**2], -1).to(x.dtype)[None]).permute(0, 3, 1, 2).softmax(-1)
        gate = self.gate.sigmoid().view(1, -1, 1, 1)
        mixed = (1 - gate) * (q @ k.mT * 0.3).softmax(-1) + gate * near
        v = self.v(x).reshape(n, tokens, self.heads, -1).permute(0, 2, 1, 3)
        return self.fc(x + self.proj((mixed @ v).transpose(1, 2).reshape(n, tokens, -1)))


@pytest.mark.parametrize(('dim', 'heads'), [(8, 2), (3, 3)])
def test_a_layer_with_a_channel_for_each_head_does_not_make_heads_the_channels(dim, heads):
    exact(Positional(dim, heads), sample((2, 5, 3)), {'stem': 6, 'qk': dim, 'v': dim})
