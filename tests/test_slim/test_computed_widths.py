"""Widths that a forward computes with, as with any number: they stay what they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from tests.helpers import check_equal, check_structure, gap, masked, randomise_, sample

X = sample((2, 5, 3))


class Attention(nn.Module):
    """One head; the logits are divided by something that hangs on its width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.fc = nn.Linear(3, 9), nn.Linear(3, 9), nn.Linear(3, 6), nn.Linear(6, 2)
        self.width = 9

    def forward(self, x):
        q, k = self.q(x), self.k(x)
        logits = self.scaled(q @ k.mT, q)
        return self.fc(logits.softmax(-1) @ self.v(x))

    def scaled(self, logits, q):
        raise NotImplementedError


class Root(Attention):
    def scaled(self, logits, q):
        d_k = q.size(-1)
        return logits / math.sqrt(d_k)


class Power(Attention):
    def scaled(self, logits, q):
        return logits * q.shape[-1] ** -0.5


class Attribute(Attention):
    """The attribute is a size as well, and follows; the scale must not."""

    def scaled(self, logits, q):
        q = q.view(len(q), -1, self.width)
        return logits * self.width**-0.5 + 0 * q.sum()


class Quotient(Attention):
    def scaled(self, logits, q):
        return logits / q.shape[-1]


class InPlace(Attention):
    def scaled(self, logits, q):
        logits /= q.shape[-1]
        return logits


class Tensors(Attention):
    """As mmcv's non-local block writes it."""

    def scaled(self, logits, q):
        logits /= torch.tensor(q.shape[-1], dtype=torch.float64) ** torch.tensor(0.5, dtype=torch.float64)
        return logits


class Reversed(Attention):
    def scaled(self, logits, q):
        return q.shape[-1] * logits * (3 / q.shape[-1]) + q.shape[-1] * 0.5 + logits.new_tensor(q.shape[-1])


@pytest.mark.parametrize('kind', [Root, Power, Attribute, Quotient, InPlace, Tensors, Reversed])
def test_a_width_that_became_a_factor_stays_what_it_was(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'q': 9, 'v': 6}
    keep = found.keep()
    keep['q'][2:6] = False
    small = slim(model, found, keep)
    assert rewrites_of(small)
    assert gap(masked(model, found, keep)(X), small(X)) < 1e-12
    assert small.width == 5
    check_structure(model, found, check_equal(model, found), kind)


def test_what_torch_computes_inside_is_not_written_into_its_caller():
    space = {'__name__': 'torch.nn.modules.linear', 'math': math, 'nn': nn}
    source = """class Inner(nn.Linear):
    def forward(self, x):
        return nn.Linear.forward(self, x) / math.sqrt(x.shape[-1])"""
    exec(source, space)
    model = randomise_(nn.Sequential(nn.Linear(3, 6), space['Inner'](6, 4), nn.Linear(4, 2)))
    found = comb(model, X)
    assert not found.fixes.constants
    assert {g.name for g in found.groups} == {'1'}
    check_equal(model, found)


class Scaled(nn.Conv2d):
    """A width under a source that calls `super()`, which is a closure."""

    def forward(self, x):
        return super().forward(x) * self.out_channels**-0.5


def shrink(x, width):
    return x * width**-0.5


SHRINKING = [shrink]  # a function that no method names


class Helped(nn.Conv2d):
    """A width that a function computes with which is out of a table."""

    def forward(self, x):
        return SHRINKING[0](nn.Conv2d.forward(self, x), self.out_channels)


def scaled(kind):
    return nn.Sequential(kind(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1), nn.ReLU(), nn.Conv2d(5, 2, 1))


def test_a_method_that_calls_its_parent_is_rewritten():
    model = randomise_(scaled(Scaled))
    found = comb(model, sample((2, 3, 4, 4)), trial=False)
    assert {g.name: g.units for g in found.groups} == {'0': 6, '2': 5}
    check_structure(model, found, check_equal(model, found), lambda: scaled(Scaled))


def test_a_number_whose_place_cannot_be_written_freezes_by_the_trial():
    model = randomise_(scaled(Helped))
    found = comb(model, sample((2, 3, 4, 4)))
    assert {g.name: g.units for g in found.groups} == {'2': 5}
    assert any('trial failed' in f.reason for f in found.frozen if f.tensor == '0.weight')
    check_equal(model, found)


def test_a_width_that_stays_is_not_rewritten():
    model = randomise_(Root())
    found = comb(model, X)
    keep = found.keep()
    keep['v'][2:4] = False
    assert not rewrites_of(slim(model, found, keep))
