"""What a width has over a multiple, or over a number: nothing in the dense model, and nothing after pruning."""

from __future__ import annotations

import math

import pytest
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import check_equal, check_structure, randomise_, sample

X = sample((2, 7, 5))


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(5, 24), nn.LayerNorm(24)
        self.second, self.fc = nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.fc(self.second(self.norm(self.pad(self.first(x)))).relu())

    def pad(self, x):
        raise NotImplementedError


class AsAPicture(Padded):
    def pad(self, x):
        """Pad tokens and channels as if they were a picture, as DaViT's adaptive padding does."""
        channels = x.shape[-1]
        over = max((math.ceil(channels / 2) - 1) * 2 + 2 - channels, 0)
        return F.pad(x, (0, over)) if over > 0 else x


class ToAMultiple(Padded):
    def pad(self, x):
        over = (8 - x.shape[-1] % 8) % 8
        return F.pad(x, [0, over]) if over else x


class OnBothSides(Padded):
    def pad(self, x):
        over = -x.shape[-1] % 8
        return F.pad(x, (over // 2, over - over // 2))


class Always(Padded):
    def pad(self, x):
        return F.pad(input=x, pad=(0, -x.shape[-1] % 4))


class WhereAnyIsOver(Padded):
    def pad(self, x):
        over = x.shape[-1] % 3
        return F.pad(x, (0, 3 - over)) if over != 0 else x


class ToAFixedWidth(Padded):
    def pad(self, x):
        over = 24 - x.shape[-1]
        return F.pad(x, (0, over)) if over else x


class Refused(Padded):
    def pad(self, x):
        if x.shape[-1] % 8:
            raise ValueError('no multiple')
        return x


class RefusedUnlessEqual(Padded):
    def pad(self, x):
        if not x.shape[-1] % 8 == 0:
            raise ValueError('no multiple')
        return x


class Attention(nn.Module):
    """As most attentions are written: the width must be a multiple of the heads."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 24
        self.embed, self.qkv, self.out = nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24)
        self.fc = nn.Linear(24, 3)

    def forward(self, x):
        x = self.embed(x)
        assert self.fits(x.shape[-1]), 'the width must be a multiple of the heads'
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.fc(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))

    def fits(self, width):
        return width % self.heads == 0


class Negated(Attention):
    def fits(self, width):
        return not width % self.heads


class Compared(Attention):
    def fits(self, width):
        return self.width - width == 0


@pytest.mark.parametrize(
    'kind',
    [AsAPicture, ToAMultiple, OnBothSides, Always, WhereAnyIsOver, ToAFixedWidth, Refused, RefusedUnlessEqual],
)
def test_what_was_padded_by_nothing_stays_so(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'first': 24, 'second': 16}
    assert slim(model, found, random_keep(found, 0.5, 0, awkward=True)).norm.weight.numel() % 2
    check_structure(model, found, check_equal(model, found), kind)


@pytest.mark.parametrize('heads', ['dim', 'head'])
@pytest.mark.parametrize('kind', [Attention, Negated, Compared])
def test_a_width_need_not_stay_a_multiple_of_the_heads(kind, heads):
    model = randomise_(kind())
    found = comb(model, X, heads=heads)
    assert sorted(g.units for g in found.groups) == ([4, 24] if heads == 'head' else [6, 24])
    check_structure(model, found, check_equal(model, found), kind)


class ByOne(Padded):
    def pad(self, x):
        return F.pad(x[..., :-1], (0, -(x.shape[-1] - 1) % 8))


def test_a_padding_by_some_channels_is_another_matter():
    model = randomise_(ByOne())
    found = comb(model, X)
    assert 'first' not in {g.name for g in found.groups}
    check_equal(model, found)
