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
