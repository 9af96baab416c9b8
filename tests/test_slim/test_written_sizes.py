"""Sizes that no attribute holds, however they are written: numbers, other methods, decorators, heads without hooks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.modes import as_trained
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import check_equal, check_structure, gap, masked, randomise_, sample

from .attention_nets import GROUPS, Block, Timm, uneven

X = sample((2, 5, 3))


class Number(nn.Module):
    """A plain number in a method."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x):
        width = int(math.sqrt(64.0))
        return self.outer(self.inner(x).tanh().reshape(-1, width).reshape(x.shape[0], -1, width))


def test_a_number_in_a_method_is_replaced_where_it_stands():
    model = randomise_(Block(Number))
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'stem': 12, 'attn.inner': 8}
    small = check_equal(model, found)
    check_structure(model, found, small, lambda: Block(Number))


class Helper(Timm):
    """The size is asked for in another method, by keyword and as a tuple."""

    def split_heads(self, x):
        return torch.reshape(x, (x.shape[0], x.shape[1], 3, self.num_heads, x.shape[2] // self.num_heads // 3))

    @staticmethod
    def merge(x, shape):
        B, N, C = shape
        return x.reshape((B, N, C))

    def forward(self, x):
        q, k, v = self.split_heads(self.qkv(x)).permute(2, 0, 3, 1, 4)
        return self.proj(self.merge((((q * self.scale) @ k.mT).softmax(-1) @ v).transpose(1, 2), x.shape))


class Decorated(Timm):
    """A decorator around the forward, which uses a global of its module and a name from an enclosing function."""

    @torch.no_grad()
    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.softmax((q * self.scale) @ k.mT, -1).matmul(v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('kind', [Helper, Decorated])
def test_other_ways_to_write_it(kind):
    model = randomise_(Block(kind))
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == GROUPS
    small = check_equal(model, found)
    check_structure(model, found, small, lambda: Block(kind))
    assert rewrites_of(slim(model, found, uneven(found)).attn)


class Apart(nn.Module):
    """Two widths under one attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.width = nn.Linear(3, 6), nn.Linear(3, 6), 6
        self.fc, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.a(x).view(-1, 5, self.width)) + self.other(self.b(x).view(-1, 5, self.width).tanh())


class Starred(Apart):
    """The rest of the shape is somebody else's."""

    def forward(self, x):
        left = self.a(x).mT.reshape(-1, self.width, *x.shape[1:2])
        right = self.b(x).reshape(*x.shape[:-1], self.width)
        return self.fc(left.mT) + self.other(right)


class Whole(Apart):
    """A shape that was read elsewhere, of a tensor with other channels."""

    def forward(self, x):
        left = self.a(x)
        shape = left.shape
        return self.fc(left) + self.other(self.b(x).flatten(1).reshape(shape))


@pytest.mark.parametrize('kind', [Apart, Starred, Whole])
def test_what_one_attribute_cannot_hold_is_rewritten(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 6}
    keep = found.keep()
    keep['a'][1:4], keep['b'][2] = False, False
    small = slim(model, found, keep)
    assert len(rewrites_of(small)) == 1
    assert gap(masked(model, found, keep)(X), small(X)) < 1e-12
    check_structure(model, found, check_equal(model, found), kind)


def test_decorators_stay():
    model = randomise_(Block(Decorated))
    found = comb(model, X)
    small = slim(model, found, uneven(found))
    assert rewrites_of(small.attn)
    assert not small.attn(sample((2, 5, 9))).requires_grad
    assert small(X).requires_grad


class Unhooked(nn.Module):
    """A head that is called by its forward, as mmseg's are, so that no hook tells that it runs."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), Head()

    def forward(self, x):
        return self.head.forward(self.stem(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.fc = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        batch, tokens, channels = x.shape
        x = self.inner(x - x.mean(-1, keepdim=True)).view(batch, tokens, channels)
        return self.fc(x.sigmoid())


def test_a_module_that_is_called_without_its_hooks():
    model = randomise_(Unhooked())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'stem': 6, 'head.inner': 6}
    keep = found.keep()
    keep['stem'][1:4], keep['head.inner'][2] = False, False
    assert [len(rewrites_of(m)) for m in slim(model, found, keep).modules()] == [0, 0, 1, 0, 0]
    check_structure(model, found, check_equal(model, found), Unhooked)


class WithASide(nn.Module):
    """A head that only training runs, behind a size that stands in the source."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(3, 12, 1), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x):
        x = self.one(x).reshape(x.shape[0], 12, -1).mean(2)
        return self.two(x) + self.side(x) if self.training else self.two(x)


def test_a_size_is_found_while_training_mode_is_observed():
    def trained(model, *inputs):
        with as_trained(model):
            return model(*inputs)

    model, x = WithASide(), torch.rand(2, 3, 4, 4)
    found = comb(model, x, also=[trained])
    assert [(group.name, group.units) for group in found.groups] == [('one', 12)]
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-6
