"""Sizes that a forward compares: slimming changes no branch."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.exact import exact
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


GUARDS = {
    'of 32-bit numbers': lambda m, x: x.numel() * 2 > 2**31,
    'of memory': lambda m, x: not x.shape[1] * x.shape[2] * x.shape[3] < 1e9,
    'of a width': lambda m, x: m.a.out_channels >= 100_000,
    'of empty tensors': lambda m, x: x.numel() == 0,
    'of empty pictures': lambda m, x: not x.shape[1] * x.shape[2] > 0,
}


class Guarded(nn.Module):
    """Takes a slower way, with another result here, where a tensor is too large for the fast one."""

    def __init__(self, guard):
        super().__init__()
        self.a, self.out, self.guard = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), guard

    def forward(self, x):
        x = self.a(x).relu()
        return self.out(-x if self.guard(self, x) else x)


@pytest.mark.parametrize('guard', GUARDS.values(), ids=list(GUARDS))
def test_a_bound_that_nothing_comes_near_holds_no_width(guard):
    found = exact(Guarded(guard), X, {'a': 8})
    assert compare(Guarded(guard).double(), found, random_keep(found, 0.5, 0)) < 1e-12


class MayBeEmpty(nn.Linear):
    """Takes empty tensors apart, as mmcv's layers do."""

    def forward(self, x):
        if x.numel() == 0:
            return x.new_empty((*x.shape[:-1], self.out_features))
        return super().forward(x)


def test_a_question_for_empty_tensors_holds_no_width():
    model = nn.Sequential(MayBeEmpty(6, 8), nn.GELU(), MayBeEmpty(8, 5), nn.GELU(), MayBeEmpty(5, 2))
    exact(model, sample((2, 3, 6)), {'0': 8, '2': 5})


NEARER = [lambda m, x: 36 // x.shape[1] > 4000, lambda m, x: x.shape[1] * -1000 + 8001 > 1000]


@pytest.mark.parametrize('guard', NEARER, ids=['a quotient', 'a difference'])
def test_a_bound_that_a_narrower_layer_comes_near_to_does(guard):
    found = comb(randomise_(Guarded(guard)), X)
    assert not found.groups and 'compared in size' in str(found.reasons())


def test_a_bound_that_is_near_does():
    found = comb(randomise_(Guarded(lambda m, x: x.numel() > 500)), X)  # it has 576 elements
    assert not found.groups and 'compared in size' in str(found.reasons())
