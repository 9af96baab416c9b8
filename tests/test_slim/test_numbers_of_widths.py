"""Numbers that a forward makes of a width, in ways that only C or a trial sees: they stay what they were."""

from __future__ import annotations

import math

import pytest
from torch import nn

from mmcpd.comb import comb
from tests.helpers import check_equal, check_structure, randomise_, sample

X = sample((2, 3, 6, 6))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.a(x).relu()
        return self.b(self.scaled(y))

    def scaled(self, y):
        raise NotImplementedError


class Root(Counting):
    def scaled(self, y):
        return y / math.isqrt(y.shape[1])


class Logarithm(Counting):
    def scaled(self, y):
        return y / math.log(self.b.in_channels)


class Distance(Counting):
    def scaled(self, y):
        return y * abs(y.shape[1] - 20)


class Bits(Counting):
    def scaled(self, y):
        return y * (y.shape[1] & 12 | 1)


class Remainder(Counting):
    def scaled(self, y):
        return y + (y * 90) % y.shape[1]


class Elements(Counting):
    """More than any tensor of this model has."""

    def scaled(self, y):
        return y * (self.a.weight.numel() + self.b.weight.numel() + 2 * self.a.weight.numel())


@pytest.mark.parametrize('trial', [False, True])
@pytest.mark.parametrize('kind', [Root, Logarithm, Distance, Bits, Remainder, Elements])
def test_a_number_that_is_made_of_a_width_stays(kind, trial):
    model = randomise_(kind())
    found = comb(model, X, trial=trial)
    assert {g.name: g.units for g in found.groups} == {'a': 8}
    check_structure(model, found, check_equal(model, found), kind)


class Loop(Counting):
    def scaled(self, y):
        for _ in range(self.a.out_channels):
            y = y * 1.1
        return y


class Table(Counting):
    def scaled(self, y):
        return y * {8: 1.5, 4: 2.0}.get(self.a.out_channels, 1.0)


class Length(Counting):
    def scaled(self, y):
        return y * len(self.a.weight) ** -0.5


class Digits(Counting):
    def scaled(self, y):
        return y * y.shape[1].bit_length()


class Name(Counting):
    def scaled(self, y):
        return y * float(f'{y.shape[1]}')


class Bound(Counting):
    def scaled(self, y):
        return (9 * y).clamp(max=y.shape[1])


def test_a_width_that_picks_an_entry_freezes_without_a_trial():
    found = comb(randomise_(Table()), X, trial=False)
    assert not found.groups
    assert any('which never changes' in reason for reason in found.reasons())


@pytest.mark.parametrize('kind', [Loop, Length, Digits, Name, Bound])
def test_a_number_that_nobody_sees_is_found_by_the_trial(kind):
    found = comb(randomise_(kind()), X)
    assert not found.groups
    assert any('trial failed' in reason for reason in found.reasons())
