"""One attribute, or one line, that would have to hold two widths: they become one group."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, check_equal, check_structure, gap, masked, members, randomise_, rows, sample

X = sample((4, 5, 3))
BATCH = sample((4, 3))


def heads_of_width(x, heads, width):
    """Split channels into heads."""
    return x.reshape(*x.shape[:2], heads, width).transpose(1, 2)


BY_NUMBER = [heads_of_width]  # a function that no method names: no number can be written into a copy of it


class Shared(nn.Module):
    """Two streams through one helper, and one attribute for the width of a head of both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.heads, self.width = nn.Linear(3, 12), nn.Linear(3, 12), 3, 4
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        a = BY_NUMBER[0](self.a(x), self.heads, self.width)
        b = BY_NUMBER[0](self.b(x), self.heads, self.width)
        return self.fc(a.transpose(1, 2).flatten(2)) + b.tanh().amax((1, 3))[:, :, None]


class Loop(nn.Module):
    """One line runs for each branch, with a -1 in it already."""

    def __init__(self):
        super().__init__()
        self.into = nn.ModuleList(nn.Linear(3, 8) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))
        self.width = 8

    def forward(self, x):
        return sum(out(into(x).view(-1, self.width)) for into, out in zip(self.into, self.out, strict=True))


class Literal(nn.Module):
    """A number in a helper's place that two layers of one width share, beside one of another width."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 6)
        self.fc, self.last = nn.Linear(8, 2), nn.Linear(6, 2)

    def forward(self, x):
        out = self.last(self.c(x).relu())
        for layer in (self.a, self.b):
            out = out + self.fc(layer(x).reshape(-1, 8))
        return out


@pytest.mark.parametrize(('kind', 'coupled', 'units'), [(Loop, 'into', 8), (Literal, 'a', 8)])
def test_one_line_with_two_widths_couples_them(kind, coupled, units):
    model = randomise_(kind())
    found = comb(model, BATCH)
    assert not [f.reason for f in found.frozen if 'trial' in f.reason]
    first = next(group for group in found.groups if group.name.startswith(coupled))
    assert first.units == units
    others = [f'{n}.weight:0' for n in (('into.1', 'into.2') if kind is Loop else ('b',))]
    for other in others:
        assert members(found, first.name)[other] == rows(units)
    small = check_equal(model, found)
    check_structure(model, found, small, kind)


def test_one_attribute_for_two_widths_in_a_helper_couples_them():
    """The output of `b` is reduced over its head, so that only the attribute knows its width."""
    model = randomise_(Shared())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'a': 4}
    assert 'b.weight:0' in members(found, 'a')
    check_equal(model, found)


def test_widths_that_can_be_told_apart_are_not_coupled():
    class Apart(Loop):
        def forward(self, x):
            one = self.out[0](self.into[0](x).view(len(x), self.width))
            two = self.out[1](self.into[1](x).view(len(x), self.width).relu())
            return one + two + self.out[2](self.into[2](x))

    model = randomise_(Apart())
    found = comb(model, BATCH)
    assert {g.name: g.units for g in found.groups} == {'into.0': 8, 'into.1': 8, 'into.2': 8}
    check_equal(model, found)


def test_a_comparison_of_two_widths_couples_them():
    """A shortcut that is taken where the widths agree, as many residual blocks decide it in their forward."""

    def run(m, x):
        a, b = m.a(x), m.b(x)
        return m.fc(a) + m.other(b) if a.shape[-1] == b.shape[-1] else m.fc(a)

    parts = dict(a=nn.Linear(3, 6), b=nn.Linear(3, 6), fc=nn.Linear(6, 2), other=nn.Linear(6, 2))
    model = randomise_(Net(run, **parts))
    found = comb(model, BATCH)
    assert {g.name: g.units for g in found.groups} == {'a': 6}
    assert {'b.weight:0', 'other.weight:1'} <= set(members(found, 'a'))
    check_equal(model, found)


# -- statistics by their place -----------------------------------------------------------------------------------------
def test_a_statistic_over_as_many_tokens_as_channels_is_told_apart():
    """One module, one dimension, one length: only the line tells which of them goes over channels."""

    def run(m, x):
        x = m.a(x)  # (N, 6 tokens, 6 channels)
        x = x / (1 + x.square().mean(-1, keepdim=True))
        tokens = x.transpose(1, 2).tanh()  # (N, 6 channels, 6 tokens)
        return m.fc((tokens - tokens.mean(-1, keepdim=True)).transpose(1, 2))

    model = randomise_(Net(run, a=nn.Linear(3, 6), fc=nn.Linear(6, 2)))
    found = comb(model, sample((2, 6, 3)))
    assert {g.name: g.units for g in found.groups} == {'a': 6}
    assert len(found.fixes.statistics) == 1
    check_equal(model, found)
    keep = random_keep(found, 0.5, 3)
    for length in (6, 9):  # at another length too
        x = sample((2, length, 3))
        assert gap(masked(model, found, keep)(x), slim(model, found, keep)(x)) < 1e-12


def test_one_line_over_tokens_and_over_channels_freezes_with_a_reason():
    def centred(x):
        return x - x.mean(-1, keepdim=True)

    def run(m, x):
        x = m.a(x).tanh()
        for _ in range(2):
            x = centred(x).mT
        return m.fc(x)

    model = randomise_(Net(run, a=nn.Linear(3, 6), fc=nn.Linear(6, 2)))
    found = comb(model, sample((2, 6, 3)))
    assert not found.groups
    assert any('one line takes a statistic over channels and over 6 other positions' in f.reason for f in found.frozen)
    longer = comb(model, sample((2, 7, 3)))  # where the lengths differ, they are told apart by them
    assert {g.name: g.units for g in longer.groups} == {'a': 6}
    check_equal(model, longer)


def test_two_helpers_that_are_called_at_two_lines_are_told_apart():
    def centred(x):
        return x - x.mean(-1, keepdim=True)

    def run(m, x):
        one = centred(m.a(x))
        two = centred(m.b(x))
        return m.fc(one.tanh()) + m.other(two.tanh())

    parts = dict(a=nn.Linear(3, 6), b=nn.Linear(3, 6), fc=nn.Linear(6, 2), other=nn.Linear(6, 2))
    model = randomise_(Net(run, **parts))
    found = comb(model, BATCH)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 6}
    check_equal(model, found)


# -- sizes in the source -----------------------------------------------------------------------------------------------
class Folded(nn.Module):
    """Channels folded into the batch: a number would depend on the size of the picture."""

    def __init__(self):
        super().__init__()
        self.grow, self.one, self.shrink = nn.Conv2d(3, 12, 1), nn.Conv2d(1, 1, 3, padding=1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.grow(x).tanh().reshape(n * 12, 1, h, w)
        return self.shrink(self.one(y).reshape(n, 12, h, w))


def test_minus_one_takes_the_place_of_a_number():
    model = randomise_(Folded())
    found = comb(model, sample((2, 3, 5, 5)))
    assert {g.name: g.units for g in found.groups} == {'grow': 12}
    small = check_equal(model, found)
    assert {rewrite.number for rewrite in rewrites_of(small)} == {-1}
    keep = random_keep(found, 0.5, 1)
    for shape in ((1, 3, 4, 7), (3, 3, 8, 8)):
        x = sample(shape)
        assert gap(masked(model, found, keep)(x), slim(model, found, keep)(x)) < 1e-12


def test_a_call_has_one_minus_one_and_numbers_beside_it():
    class Two(nn.Module):
        """Both numbers of a call have to be replaced: -1 in place of one, the width in place of the other."""

        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1)
            self.fc, self.last = nn.Conv2d(6, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            n, _, h, w = x.shape
            a = self.a(x).reshape(n, 6, h * w)
            b = self.b(x).reshape(n, 4, h * w)
            outer = (a[:, :, None] * b[:, None]).reshape(n, 6, 4, h, w)
            return self.fc(outer.mean(2)) + self.last(outer.mean(1))

    model = randomise_(Two())
    found = comb(model, sample((2, 3, 3, 3)))
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 4}
    keep = found.keep()
    keep['a'][:3] = keep['b'][:1] = False
    written = {
        (rewrite.index, rewrite.number) for rewrite in rewrites_of(slim(model, found, keep)) if rewrite.count == 5
    }
    assert written == {(1, -1), (2, 3)}
    check_equal(model, found)


# -- heads concern attention alone -------------------------------------------------------------------------------------
def test_whole_heads_leave_channel_shuffles_alone():
    def shuffled(x):
        n, c, h, w = x.shape
        return x.view(n, 3, c // 3, h, w).transpose(1, 2).reshape(n, c, h, w)

    def run(m, x):
        x = shuffled(m.a(x)).relu()
        return m.fc(m.b(x).flatten(2).mean(2))

    parts = dict(a=nn.Conv2d(3, 12, 1), b=nn.Conv2d(12, 4, 1), fc=nn.Linear(4, 2))
    model = randomise_(Net(run, **parts))
    picture = sample((2, 3, 4, 4))
    narrow, whole = comb(model, picture), comb(model, picture, heads='head')
    assert [(g.name, g.units) for g in narrow.groups] == [(g.name, g.units) for g in whole.groups]
    assert members(narrow, 'a') == members(whole, 'a')


def test_whole_heads_go_beside_a_shuffle():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.qkv, self.fc, self.heads = nn.Linear(3, 12), nn.Linear(12, 24), nn.Linear(8, 2), 4

        def forward(self, x):
            x = self.stem(x)
            x = x.view(*x.shape[:2], 3, -1).transpose(2, 3).flatten(2)  # a shuffle
            q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attention = (q @ k.mT * 0.7).softmax(-1) @ v
            return self.fc(attention.transpose(1, 2).flatten(2))

    model = randomise_(Both())
    narrow, whole = comb(model, X), comb(model, X, heads='head')
    assert {g.name: g.units for g in narrow.groups} == {'stem': 4, 'qkv': 2}
    assert {g.name: g.units for g in whole.groups} == {'stem': 4, 'qkv': 4}
    check_equal(model, whole)


# -- inference mode ----------------------------------------------------------------------------------------------------
def test_a_forward_under_inference_mode_combs_like_any_other():
    def run(m, x):
        return m.fc(m.norm(m.conv(x).relu()).flatten(2).mean(2))

    parts = dict(conv=nn.Conv2d(3, 6, 3, groups=3), norm=nn.BatchNorm2d(6), fc=nn.Linear(6, 2))
    model = randomise_(Net(run, **parts))
    picture = sample((2, 3, 6, 6))
    expected = comb(model, picture).to_json()
    model.run = torch.inference_mode()(run)
    assert comb(model, picture).to_json() == expected
    with torch.inference_mode():
        assert comb(model, picture).to_json() == expected


# -- quotients ---------------------------------------------------------------------------------------------------------
QUOTIENTS = {  # each summed over its channels: a removed one must be left out, where it is not zero but infinite or NaN
    'of one channel': lambda m, x: m.one(x) / m.a(x),
    'of a number': lambda m, x: torch.tensor(1.0, dtype=x.dtype) / m.a(x),
    'of two removed channels': lambda m, x: m.a(x) / m.b(x),
    'of a removed channel': lambda m, x: m.a(x) / (1 + m.a(x).square().mean(-1, keepdim=True)),
}


@pytest.mark.parametrize('name', QUOTIENTS)
def test_a_quotient_is_zero_only_where_its_numerator_is_and_its_denominator_is_not(name):
    parts = dict(a=nn.Linear(3, 6), b=nn.Linear(3, 6), one=nn.Linear(3, 1), fc=nn.Linear(1, 2))
    model = randomise_(Net(lambda m, x: m.fc(QUOTIENTS[name](m, x).sum(-1, keepdim=True).tanh()), **parts))
    found = comb(model, BATCH, unused='leave')  # not each quotient uses both
    assert {g.name: g.units for g in found.groups} == {'a': 6}
    check_equal(model, found)


class Queried(nn.Module):
    """A learned query, as wide as tokens whose width never changes: no layer makes what is added to them."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Parameter(torch.randn(1, 1, 6)), nn.Linear(6, 6)
        self.embed, self.into, self.out = nn.Linear(3, 6), nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.embed(x) + torch.arange(6).to(x)
        assert self.query.shape[-1] == x.shape[-1], 'another width'
        weights = (self.query @ self.key(x).transpose(1, 2)).softmax(-1)
        return weights @ self.out(self.into(x).tanh())


def test_a_width_that_is_held_against_a_fixed_one_freezes_without_a_trial():
    model = randomise_(Queried())
    found = comb(model, X, trial=False)
    assert {group.name: group.units for group in found.groups} == {'into': 8}
    assert found.reasons()['the forward compares channels with size 6 of the input, which never changes'] == 18
    check_equal(model, found)
