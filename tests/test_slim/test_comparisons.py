"""Sizes that a forward compares, counts with or hands to C: slimming changes no branch, and no number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import check_equal, check_structure, gap, masked, randomise_, sample

X = sample((2, 3, 6, 6))


class Stage(nn.Module):
    """Two convolutions of different widths, and a projection between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1)
        self.project, self.out = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 2, 1)

    def forward(self, x):
        x = self.a(x).relu()
        y = self.b(x)
        return self.out((self.shortcut(x, y) + y).relu())

    def shortcut(self, x, y):
        return self.project(x) if self.differ(x, y) else x

    def differ(self, x, y):
        raise NotImplementedError


class Shapes(Stage):
    def differ(self, x, y):
        return x.shape != y.shape


class EqualShapes(Stage):
    def shortcut(self, x, y):
        return x if x.shape == y.shape else self.project(x)


class Attributes(Stage):
    def differ(self, x, y):
        return self.b.in_channels != self.b.out_channels


class Fewer(Stage):
    def differ(self, x, y):
        return x.size(1) < y.size(1)


class MoreByAttributes(Stage):
    def differ(self, x, y):
        return self.b.out_channels >= self.b.in_channels


class Number(Stage):
    def differ(self, x, y):
        return not (x.size(1) == 3 or x.size(1) > 9 or x.shape[1] <= 1)


class Multiple(Stage):
    def differ(self, x, y):
        return self.a.out_channels % 4 == 0


class Remaining(Stage):
    """What is left of a width after a number is what it was."""

    def differ(self, x, y):
        return 20 - y.shape[1] > 5


COMPARED = [Shapes, EqualShapes, Attributes, Fewer, MoreByAttributes, Number, Multiple, Remaining]


@pytest.mark.parametrize('trial', [False, True])
@pytest.mark.parametrize('kind', COMPARED)
def test_a_branch_stays_where_widths_meet_or_change_their_order(kind, trial):
    model = randomise_(kind())
    found = comb(model, X, trial=trial)
    assert {g.name: g.units for g in found.groups} == {'a': 8, 'b': 12}
    for seed, (few, many) in enumerate([(3, 3), (1, 1), (7, 2), (8, 7), (5, 5)]):
        keep = {
            name: torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)) < number
            for (name, units), number in zip(found.keep().items(), (few, many), strict=True)
        }
        assert gap(masked(model, found, keep)(X), slim(model, found, keep)(X)) < 1e-12
    check_structure(model, found, check_equal(model, found), kind)


class Chained(Stage):
    def differ(self, x, y):
        return 4 < x.size(1) < 20


class Largest(Stage):
    def differ(self, x, y):
        return max(x.size(1), 4) == 8


class OfPicture(Stage):
    def differ(self, x, y):
        return x.shape[1] > x.shape[2]


@pytest.mark.parametrize('kind', [Chained, Largest, OfPicture])
def test_what_cannot_be_written_stays(kind):
    found = comb(randomise_(kind()), X, trial=False)
    assert {g.name: g.units for g in found.groups} == {'b': 12}
    assert any(reason.startswith('compared in size') for reason in found.reasons())


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


@pytest.mark.parametrize('kind', [Loop, Table, Length, Digits, Name, Bound])
def test_a_number_that_nobody_sees_is_found_by_the_trial(kind):
    found = comb(randomise_(kind()), X)
    assert not found.groups
    assert any('trial failed' in reason for reason in found.reasons())


class Pooled(nn.Module):
    """A convolution whose only kept channel would be squeezed away."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.scaled(F.adaptive_avg_pool2d(self.a(x).relu(), 1)))

    def scaled(self, y):
        raise NotImplementedError


class All(Pooled):
    def scaled(self, y):
        return y.squeeze()


class Named(Pooled):
    def scaled(self, y):
        return y.squeeze(dim=1).flatten(1)


class Several(Pooled):
    def scaled(self, y):
        return y.squeeze((1, 2, 3))


class Space(Pooled):
    def scaled(self, y):
        return y.squeeze(-1).squeeze(dim=-1)


@pytest.mark.parametrize(('kind', 'least'), [(All, 2), (Named, 2), (Several, 2), (Space, 1)])
def test_channels_that_are_squeezed_are_several(kind, least):
    model = randomise_(kind())
    found = comb(model, X)
    assert found.floors['a'] == least
    keep = {'a': torch.arange(8) < least}
    assert gap(masked(model, found, keep)(X), slim(model, found, keep)(X)) < 1e-12
    if least > 1:
        with pytest.raises(ValueError, match=r'leaves 1 of 8 units, and the forward squeezes their dimension'):
            slim(model, found, {'a': torch.arange(8) < 1})
    assert int(random_keep(found, 0.01, 0)['a'].sum()) == least
