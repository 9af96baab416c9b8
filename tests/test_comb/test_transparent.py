"""`int(width)` on a line that runs with several widths: no number can stand there, and none needs to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb, transparent
from mmcpd.comb.transparent import Whole, transparent_ints
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import check_structure, randomise_, sample

X = sample((2, 3, 8, 8))


def halves(x):
    return torch.split(x, int(x.size(1) // 2), dim=1)


class Net(nn.Module):
    """Two layers of other widths, whose channels go through one helper."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 3)
        self.ends = nn.ModuleList([nn.Conv2d(16, 5, 1), nn.Conv2d(12, 5, 1)])

    def forward(self, x):
        a = self.a(x)
        b = self.b(a)
        return [end(self.out(y).tanh()) for end, y in zip(self.ends, (a, b), strict=True)]


class Normed(Net):
    def out(self, x):
        channels = int(x.shape[1])
        return F.layer_norm(x.permute(0, 2, 3, 1), [channels]).permute(0, 3, 1, 2)


class Mapped(Net):
    def out(self, x):
        n, c, h, w = map(int, x.shape)
        return x.reshape(n, c, h * w).mean(-1).view(n, c, 1, 1)


class Shuffled(Net):
    def out(self, x):
        n, c, h, w = (int(t) for t in x.size())
        return x.view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)


class Halved(Net):
    """In a function of the file."""

    def out(self, x):
        left, right = halves(x)
        return torch.cat([left, right.sigmoid()], 1)


class Scaled(Net):
    """What is worked out from the number keeps the dense model's."""

    def out(self, x):
        if isinstance(x.shape[1], int):
            x = x / int(x.shape[1]) ** 0.5
        return x


FREE = {'a': 16, 'b': 12}


@pytest.mark.parametrize(
    ('kind', 'groups'),
    [
        (Normed, FREE),
        (Mapped, FREE),
        (Shuffled, {'a': 4, 'b': 3}),
        (Halved, {'a': 8, 'b': 6}),
    ],
)
def test_a_line_that_takes_two_widths_needs_no_number(kind, groups):
    before = {name: vars(kind)[name].__code__ for name in ('out',)} | {'halves': halves.__code__}
    found = exact(kind(), X, groups)
    assert before == {'out': kind.out.__code__, 'halves': halves.__code__}
    assert transparent.NAME not in globals()
    model = randomise_(kind())
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert not rewrites_of(small)
    check_structure(model, found, small, kind)


def test_a_line_that_computes_with_two_widths_still_does():
    found = comb(randomise_(Scaled()), X)
    assert not found.groups and 'different sizes' in str(found.reasons())


class OneWidth(Normed):
    """Here a number can stand, as before."""

    def forward(self, x):
        return self.ends[0](self.out(self.a(x)))


def test_one_width_is_written_as_before():
    found = exact(OneWidth(), X, {'a': 16})
    assert len(found.fixes.constants) == 1


class NamesTheType(Net):
    """`int` as a type of torch's: nothing may stand for it."""

    def out(self, x):
        return x[:, torch.arange(int(x.shape[1]), dtype=int)]


class HasTheMethod(Net):
    """`int` as a method of a tensor."""

    def out(self, x):
        return x * (x > 0).int() / int(x.shape[1])


@pytest.mark.parametrize('kind', [NamesTheType, HasTheMethod])
def test_a_function_that_uses_the_name_otherwise_is_left_alone(kind):
    model = randomise_(kind())
    with transparent_ints(model, {kind.out.__code__}):
        assert kind.out.__code__.co_names.count('int') == 1
        model(X)
    assert not comb(model, X).groups


def test_an_error_puts_everything_back():
    model, before = Normed(), Normed.out.__code__
    with pytest.raises(KeyError), transparent_ints(model, {before}):
        assert Normed.out.__code__ is not before
        raise KeyError
    assert Normed.out.__code__ is before and transparent.NAME not in globals()


class Mapping(Net):
    """`int` beside the callable that is mapped, and beside the classes that are asked for."""

    def out(self, x):
        zeros = map(lambda n: torch.zeros(n, dtype=int), (1, int(x.shape[1])))  # noqa: C417 - as some write it
        return x + sum(each.sum() for each in zeros if isinstance(each.to(int), torch.Tensor))


def plain(number):
    if type(number) is not int:
        raise TypeError('a plain number is needed')
    return number


class Strict(Net):
    """Code that takes nothing but a plain number, which a size is not."""

    def out(self, x):
        n, c, h, w = map(int, x.shape)
        return x.reshape(n, plain(c), h * w).mean(-1).view(n, c, 1, 1)


@pytest.mark.parametrize('kind', [Mapping, Strict])
def test_what_cannot_run_with_a_width_is_observed_as_before(kind):
    found = comb(randomise_(kind()), X)
    assert not found.unsupported and kind.out.__code__.co_names.count('int') == 1
    check = randomise_(kind())
    assert compare(check, found, random_keep(found, 0.5, 0)) < 1e-12


class Beside(Normed):
    """A line elsewhere whose number can stand keeps it."""

    def __init__(self):
        super().__init__()
        self.c, self.last = nn.Conv2d(5, 8, 1), nn.Conv2d(8, 2, 1)

    def counted(self, x):
        number = int(x.shape[1])
        return x * len(range(number))

    def forward(self, x):
        first, second = super().forward(x)
        return self.last(self.counted(self.c(first))), second


def test_a_line_elsewhere_keeps_its_number():
    exact(Beside(), X, {**FREE, 'c': 8, 'ends.0': 5})


def test_another_run_beside_it_is_a_plain_one():
    model, found = Normed(), comb(randomise_(OneWidth()), X, unused='leave')
    with transparent_ints(model, {Normed.out.__code__}):
        again = comb(randomise_(OneWidth()), X, unused='leave', trial=False)
    assert again.fixes.constants == found.fixes.constants and again.fixes.constants


def test_it_is_int_in_every_other_way():
    assert Whole('12') == 12 and Whole(3.9) == 3 and Whole('f', 16) == 15 and Whole() == 0
    assert type(Whole(True)) is int and isinstance(7, Whole) and not isinstance('7', Whole)
    assert [*map(Whole, '12')] == [1, 2]
