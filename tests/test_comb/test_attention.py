"""Scaled dot product attention, nn.MultiheadAttention and heads: by width, and whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.prune import slim
from mmcpd.prune.replace import SlimMultiheadAttention
from tests.helpers import Net, call, gap, masked, rows, strided
from tests.toys import Toy, check_toy

TOKENS = ((2, 5, 3),)
ALLOWED = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()


class Attention(nn.Module):
    """Attention as most people write it: one layer for q, k and v, heads by reshape."""

    def __init__(self, product, heads=2, width=3, bias=True):
        super().__init__()
        self.product, self.heads, self.width = product, heads, width
        self.qkv, self.proj = nn.Linear(3, 3 * heads * width, bias=bias), nn.Linear(heads * width, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        out = self.product(self, q, k, v).transpose(1, 2).reshape(batch, tokens, self.heads * self.width)
        return self.fc(self.proj(out).relu().mean(1))


def by_hand(m, q, k, v):
    return (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v


def sdpa(**options):
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def qkv(bias: bool = True) -> dict[str, dict[str, list[list[int]]]]:
    """Return the groups of `Attention` by hand: unit i is row i of each head, of q and k; and of v."""
    qk = [[i + 3 * j for j in range(4)] for i in range(3)]
    v = [[12 + i + 3 * j for j in range(2)] for i in range(3)]
    first, second = {'qkv.weight:0': qk}, {'qkv.weight:0': v}
    if bias:
        first['qkv.bias:0'], second['qkv.bias:0'] = qk, v
    return {'qkv': first, 'qkv#2': {**second, 'proj.weight:1': strided(3, 2)}}


DIM = {
    'by hand': by_hand,
    'sdpa': sdpa(),
    'sdpa with a scale': sdpa(scale=0.3),
    'sdpa, causal': sdpa(is_causal=True),
    'sdpa with a mask of booleans': sdpa(attn_mask=ALLOWED),
    'sdpa with a mask of numbers': sdpa(attn_mask=torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)),
    'sdpa, scale from the width of the tensor': lambda m, q, k, v: sdpa(scale=float(k.shape[-1]) ** -0.25)(m, q, k, v),
}


@pytest.mark.parametrize('name', [n for n in DIM if 'width of the tensor' not in n])
def test_the_same_width_goes_in_each_head(name):
    # The query's and key's widths are contracted with each other, the value's is not: but one reshape names both.
    toy = Toy(lambda: Attention(DIM[name]), TOKENS, {'qkv': 3, 'proj': 4})
    unit = [[i + 3 * j for j in range(6)] for i in range(3)]
    toy.members = {'qkv': {'qkv.weight:0': unit, 'qkv.bias:0': unit, 'proj.weight:1': strided(3, 2)}}
    check_toy(toy)
