"""Sizes that no attribute holds: starred shapes, chains over lines, pieces, slices, tensors made anew, decorators."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import check_structure, gap, masked, randomise_, sample

X = sample((2, 5, 3))


class Net(nn.Module):
    """Twelve channels of five tokens, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.fc = nn.Linear(3, 8), nn.Linear(8, 12), nn.Linear(12, 2)
        self.gate, self.width, self.__parts = nn.Linear(8, 1), 12, 3

    def forward(self, x):
        y = self.stem(x)
        return self.fc(self.change(self.a(y), y))


class StarredName(Net):
    def change(self, x, _):
        shape = (x.shape[0], x.shape[1], 3, 4)
        return x.view(*shape).flip(2).flatten(2)


class StarredExpression(Net):
    def change(self, x, _):
        return x.reshape(*x.shape[:-1], 3, 4).flip(2).view(*[*x.shape[:2], 12])


class StarredTwice(Net):
    def change(self, x, _):
        head, tail = x.shape[:2], [3, 4]
        return x.reshape(*head, *tail).flip(2).flatten(2)


class SizeObject(Net):
    def change(self, x, _):
        return torch.reshape(x, torch.Size([2, 5, 3, 4])).flip(2).flatten(2)


class Named(Net):
    def change(self, x, _):
        return x.reshape(shape=[2, 5, 3, 4]).flip(2).flatten(2)


class ListOfSizes(Net):
    def change(self, x, _):
        size = torch.Size([2, 5]) + torch.Size([3])
        return x.reshape(size + torch.Size([4])).flip(2).flatten(2)


class Chain(Net):
    def change(self, x, _):
        return (
            x
            .transpose(1, 2)
            .view(x.shape[0],
                  3,
                  4, x.shape[1])
            .flip(1)
            .flatten(1, 2)
        ).mT  # fmt: skip


class ChainOfThree(Net):
    def change(self, x, _):
        return x.reshape(
            2, 5, 3, 4
        ).flip(
            2
        ).reshape(
            2, 5, 12
        )  # fmt: skip


class Private(Net):
    def change(self, x, _):
        return x.reshape(2, 5, self._Net__parts, 4).flip(2).flatten(2) * self._Net__parts


class Unflattened(Net):
    def change(self, x, _):
        return x.unflatten(-1, (3, 4)).flip(2).flatten(2)


class UnflattenedByFunction(Net):
    def change(self, x, _):
        return torch.unflatten(x, 2, [-1, 4]).softmax(2).flatten(2)


class Pieces(Net):
    def change(self, x, _):
        left, right = torch.split(x, [4, 8], dim=-1)
        return torch.cat([right, left.sin()], -1)


class EqualPieces(Net):
    def change(self, x, _):
        return torch.cat(x.split(4, -1)[::-1], -1)


class NamedPieces(Net):
    def change(self, x, _):
        left, right = x.split(split_size=(5, 7), dim=2)
        return torch.cat([right.sin(), left], -1)


class Narrowed(Net):
    def change(self, x, _):
        return torch.cat([x.narrow(-1, 5, 7).sin(), torch.narrow(x, 2, start=0, length=5)], -1)


class Sliced(Net):
    def change(self, x, _):
        return torch.cat([x[..., -5:].sin(), x[:, :, :7]], -1)


class SlicedInside(Net):
    def change(self, x, _):
        return torch.cat([x[:, :, 9:], x[..., 2:9].sin(), x[..., :-10]], -1)


class ByDivision(Net):
    def change(self, x, _):
        half = int(x.shape[-1] / 3)
        return torch.cat([x[..., half:].sin(), x[..., :half]], -1)


class ByRounding(Net):
    def change(self, x, _):
        few = round(x.size(-1) * 0.25)
        left, right = torch.split(x, (few, x.shape[-1] - few), 2)
        return torch.cat([right.sin(), left], -1)


class ByShift(Net):
    def change(self, x, _):
        left, right = x.split([self.width >> 2, self.width - (self.width >> 2)], 2)
        return torch.cat([right.sin(), left], -1)


class ByNumber(Net):
    def change(self, x, _):
        width = int(self.width)
        left, right = x.split([width // 3, width - width // 3], 2)
        return torch.cat([right.sin(), left], -1) * x.view(2, 5, self.width).sum(-1, keepdim=True)


class ByRemainder(Net):
    def change(self, x, _):
        part, rest = divmod(self.width, 5)
        left, right = x.split([part + rest, self.width - part - rest], 2)
        return torch.cat([right.sin(), left], -1)


class Written(Net):
    def change(self, x, _):
        out = torch.zeros(x.shape[0], 5, 12, dtype=x.dtype)
        out[..., :5] = x[..., 7:]
        out[..., 5:] = x[..., :7]
        return out


class Expanded(Net):
    def change(self, x, y):
        return x * self.gate(y).expand(-1, -1, self.width).sigmoid()


class Repeated(Net):
    def change(self, x, y):
        return x * self.gate(y).repeat(1, 1, 12).sigmoid()


class FromANumber(Net):
    def change(self, x, y):
        return x + self.gate.bias.sum().expand(x.shape[0], 5, 12)


class Ones(Net):
    def change(self, x, _):
        left = x[..., :4] * torch.ones(4, dtype=x.dtype)
        return torch.cat([left, x[..., 4:] * torch.full((8,), 0.3, dtype=x.dtype)], -1)


class Accumulated(Net):
    def change(self, x, _):
        total = x.new_zeros((x.shape[0], self.width))
        for token in x.unbind(1):
            total = 0.5 * total + token.tanh()
        return x * total[:, None]


class Identity(Net):
    def change(self, x, _):
        gram = x.mT @ x / 5
        return x @ (gram + torch.eye(gram.shape[-1], dtype=x.dtype))


class WithoutDiagonal(Net):
    def change(self, x, _):
        return x @ (x.mT @ x / 5 * (1 - torch.eye(self.width, dtype=x.dtype)))


class Filled(Net):
    def change(self, x, _):
        return x * x.new_full((1, 5, 12), 0.4).cumsum(1)


def kept_name(function):
    @functools.wraps(function)
    def wrapper(self, *args):
        return function(self, *args)

    return wrapper


def lost_name(function):
    def wrapper(self, *args):
        return function(self, *args)

    return wrapper


class DecoratedInClass(Net):
    def checked(function):
        @functools.wraps(function)
        def wrapper(self, *args):
            assert isinstance(self, DecoratedInClass)
            return function(self, *args)

        return wrapper

    @checked
    def change(self, x, _):
        return x.reshape(2, 5, 3, 4).flip(2).flatten(2)


class DecoratedTwice(Net):
    @lost_name
    @kept_name
    @torch.no_grad()
    def change(self, x, _):
        return x.reshape(2, 5, 3, 4).flip(2).flatten(2)


class WithSuper(Net):
    def forward(self, x):
        return super().forward(x) + self.fc(self.a(self.stem(x)).reshape(2, 5, 3, 4).flip(2).flatten(2))

    def change(self, x, _):
        return x.tanh()


def local():
    parts = 3

    class Local(Net):
        def change(self, x, _):
            return x.reshape(2, 5, parts, 4).flip(2).flatten(2)

    return Local()


FOUR = (
    StarredName, StarredExpression, StarredTwice, SizeObject, Named, ListOfSizes, Chain, ChainOfThree, Private,
    Unflattened, UnflattenedByFunction, EqualPieces, DecoratedInClass, DecoratedTwice, WithSuper, local,
)  # fmt: skip
TWELVE = (
    Pieces, NamedPieces, Narrowed, Sliced, ByDivision, ByRounding, ByShift, ByNumber, ByRemainder, Written,
    Expanded, Repeated, FromANumber, Ones, Accumulated, Identity, WithoutDiagonal, Filled,
)  # fmt: skip


@pytest.mark.parametrize('kind', FOUR + TWELVE)
def test_a_size_in_the_source_follows(kind):
    model = kind()
    found = exact(model, X, {'stem': 8, 'a': 4 if kind in FOUR else 12})
    small = slim(model, found, random_keep(found, 0.5, 3, awkward=True))
    check_structure(model, found, small, kind)


def test_pieces_that_overlap_keep_their_bounds():
    model = SlicedInside()
    found = exact(model, X, {'stem': 8, 'a': 12})
    keep = found.keep()
    keep['a'][:2], keep['a'][9:] = False, False  # nothing is left of two of the pieces
    assert gap(masked(model, found, keep)(X), slim(model, found, keep)(X)) < 1e-12


def test_other_batches_and_lengths_still_work():
    for kind in (StarredName, Chain, Accumulated, Expanded):
        model = randomise_(kind())
        found = comb(model, X, trial=False, unused='leave')
        keep = random_keep(found, 0.5, 0, awkward=True)
        small, big = slim(model, found, keep), masked(model, found, keep)
        for shape in ((1, 5, 3), (4, 9, 3)):
            assert gap(big(sample(shape)), small(sample(shape))) < 1e-12


def test_decorators_run_once_at_definition_and_stay():
    model = DecoratedTwice()
    found = exact(model, X, {'stem': 8, 'a': 4})
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert [r.method for r in rewrites_of(small)] == ['change']
    assert not small.change(
        torch.rand(2, 5, 12).double()[..., : small.a.out_features].requires_grad_(), X
    ).requires_grad


def test_positions_that_are_made_anew_stay_positions():
    class Table(Net):
        def change(self, x, _):
            return x * torch.arange(12, dtype=x.dtype)

    found = comb(randomise_(Table()), X, trial=False, unused='leave')
    assert {g.name: g.units for g in found.groups} == {'stem': 8}


def test_a_new_tensor_over_positions_does_not_hold_the_input_size():
    class Ramp(Net):
        def change(self, x, _):
            return x * torch.ones(1, x.shape[1], self.width, dtype=x.dtype).cumsum(1)

    model = Ramp()
    found = exact(model, X, {'stem': 8, 'a': 12})
    keep = random_keep(found, 0.5, 0, awkward=True)
    longer = sample((3, 7, 3))
    assert gap(masked(model, found, keep)(longer), slim(model, found, keep)(longer)) < 1e-12
