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


class Odd(Stage):
    def differ(self, x, y):
        return bool(self.b.out_channels % 5) and bool(x.shape[1] // 5)


class Remaining(Stage):
    """What is left of a width after a number is what it was."""

    def differ(self, x, y):
        return 20 - y.shape[1] > 5


COMPARED = [Shapes, EqualShapes, Attributes, Fewer, MoreByAttributes, Number, Multiple, Odd, Remaining]


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


class OfPictureInequality(Stage):
    def differ(self, x, y):
        return x.shape[1] != x.shape[2]


class Among(Stage):
    def differ(self, x, y):
        return x.shape[1] not in (1, 3)


class Twice(Stage):
    """The same text, once of a width and once of space."""

    def differ(self, x, y):
        t = x
        few = t.size(1) > 5
        t = x.flatten(2).transpose(1, 2)[:, :3]
        return few and not t.size(1) > 5


class Helped(Stage):
    """The same line, of a width and of space."""

    def differ(self, x, y):
        return self.many(x) and not self.many(x.flatten(2).transpose(1, 2)[:, :3])

    def many(self, t):
        return t.size(1) > 5


class Loop(Stage):
    def differ(self, x, y):
        return any(t.shape[1] > 5 for t in (x, x.flatten(2).transpose(1, 2)[:, :3]))


class Doubling(Stage):
    def differ(self, x, y):
        n = 1
        while n < x.shape[1]:
            n *= 2
        return n == 8


class Fraction(Stage):
    def differ(self, x, y):
        return x.shape[1] > 5.5


class InInit(Stage):
    """A function that is made once, of which no other is made when the model is cut."""

    def __init__(self):
        super().__init__()
        self.many = lambda t: t.shape[1] > 5

    def differ(self, x, y):
        return self.many(x)


CANNOT = [Chained, Largest, OfPicture, OfPictureInequality, Among, Twice, Helped, Loop, Doubling, Fraction, InInit]


@pytest.mark.parametrize('kind', CANNOT)
def test_what_cannot_be_written_stays(kind):
    model = randomise_(kind())
    found = comb(model, X, trial=False)
    assert {g.name: g.units for g in found.groups} == {'b': 12}
    assert any(reason.startswith('compared in size') for reason in found.reasons())
    check_equal(model, found)


class ResNet(nn.Module):
    """One line for all stages: in some the widths are equal, in others not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.stages = nn.ModuleList([Functional(4, 6), Functional(6, 6), Functional(6, 8)])
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        for stage in self.stages:
            x = stage(x)
        return self.out(x)


class Functional(nn.Module):
    def __init__(self, width, out):
        super().__init__()
        self.conv, self.project = nn.Conv2d(width, out, 1), nn.Conv2d(width, out, 1)

    def forward(self, x):
        y = self.conv(x).relu()
        if x.shape != y.shape:
            x = self.project(x)
        return x + y


def test_each_stage_keeps_its_own_branch():
    model = randomise_(ResNet())
    found = comb(model, X, unused='leave')
    assert sum(g.units for g in found.groups) == 4 + 6 + 8
    for count in range(1, 4):
        keep = {name: torch.arange(len(units)) < count for name, units in found.keep().items()}
        assert gap(masked(model, found, keep)(X), slim(model, found, keep)(X)) < 1e-12


class Walrus(Stage):
    def shortcut(self, x, y):
        if (c := y.shape[1]) != (d := x.shape[1]):
            x = self.project(x)
        return x.view(-1, c, *x.shape[2:]) + 0 * d


class Popping(Stage):
    def shortcut(self, x, y):
        left = [x]
        if left.pop().size(1) < 10:
            x = self.project(x)
        return x + len(left)


@pytest.mark.parametrize('kind', [Walrus, Popping])
def test_what_a_comparison_does_beside_it_is_still_done(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert 'a' in {g.name for g in found.groups}
    for few, many in ((2, 2), (7, 7), (1, 9)):
        keep = {name: torch.arange(len(units)) < {8: few, 12: many}[len(units)] for name, units in found.keep().items()}
        assert gap(masked(model, found, keep)(X), slim(model, found, keep)(X)) < 1e-12


class OwnError(Stage):
    """Raises what no library knows, where channels go."""

    def differ(self, x, y):
        if sum(x[0, :, 0, 0].shape) != 8:
            raise Unknown
        return next(number for number in (5, 4, 3) if len(x[0]) % number == 0) == 4


class Unknown(Exception):
    pass


def test_any_error_is_found_by_the_trial():
    found = comb(randomise_(OwnError()), X)
    assert {g.name: g.units for g in found.groups} == {'b': 12}


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


class Joined(nn.Module):
    """Squeezed with another group beside it: never one channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(torch.cat([self.a(x), self.b(x)], 1), 1).squeeze())


def test_two_groups_that_are_squeezed_together_need_no_floor():
    assert comb(randomise_(Joined()), X).floors == {'a': 1, 'b': 1}
