"""Pieces of the channels, and what puts tensors together: splits, slices, concatenation, stacks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import Net, randomise_, rows, sample, strided
from tests.toys import Toy, check_toy, pooled

IMAGE = ((2, 3, 4, 4),)
TOKENS = ((2, 6, 3),)


class Pieces(nn.Module):
    """A convolution of 8 channels, cut into pieces that go different ways: `cut` returns (left, right)."""

    def __init__(self, cut, left=4, right=4, **attributes):
        super().__init__()
        self.cut = cut
        for name, value in attributes.items():
            setattr(self, name, value)
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(left, 5, 3), nn.Conv2d(right, 5, 3)
        self.fc = nn.Linear(5, 2)

    def forward(self, x):
        left, right = self.cut(self, self.stem(x).tanh())
        return self.fc(pooled((self.left(left) + self.right(right)).tanh()))


def coupled_pieces() -> dict[str, list[list[int]]]:
    return {
        'stem.weight:0': strided(4, 2),
        'stem.bias:0': strided(4, 2),
        'left.weight:1': rows(4),
        'right.weight:1': rows(4),
    }


def pieces(cut, left: int = 4, right: int = 4, coupled: bool = True, **attributes) -> Toy:
    """Return a toy whose pieces are tied position by position, or where not coupled are groups of their own."""
    toy = Toy(lambda: Pieces(cut, left, right, **attributes), IMAGE, {'left': 5})
    if coupled:
        toy.groups['stem'] = 4
        toy.members['stem'] = coupled_pieces()
    else:
        toy.groups |= {'stem': left, 'stem#2': right}
        toy.members['stem'] = {'stem.weight:0': rows(left), 'stem.bias:0': rows(left), 'left.weight:1': rows(left)}
        toy.members['stem#2'] = {
            'stem.weight:0': rows(right, start=left),
            'stem.bias:0': rows(right, start=left),
            'right.weight:1': rows(right),
        }
    return toy


CUTS = {
    'chunk': pieces(lambda m, x: x.chunk(2, 1)),
    'chunk as a function': pieces(lambda m, x: torch.chunk(x, chunks=2, dim=-3)),
    'split by an attribute': pieces(lambda m, x: x.split(m.width, 1), width=4),
    'split by half of the width': pieces(lambda m, x: x.split(x.shape[1] // 2, dim=1)),
    'halves by the width of the tensor': pieces(lambda m, x: (x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :])),
    'halves by size()': pieces(lambda m, x: (x[:, : x.size(1) // 2], x[:, x.size(1) // 2 :])),
    'reshaped to two and picked': pieces(lambda m, x: x.unflatten(1, (2, -1)).unbind(1)),
    'split into attributes': pieces(lambda m, x: x.split([m.one, m.other], 1), 3, 5, False, one=3, other=5),
    'split with sizes': pieces(lambda m, x: torch.split(x, (m.one, m.other), dim=1), 6, 2, False, one=6, other=2),
    'split into a list': pieces(lambda m, x: x.split(m.sizes, 1), 3, 5, False, sizes=[3, 5]),
    'slices at an attribute': pieces(lambda m, x: (x[:, : m.one], x[:, m.one :]), 3, 5, False, one=3),
    'slices from the end': pieces(lambda m, x: (x[:, : -m.last], x[:, -m.last :]), 3, 5, False, last=5),
    'narrow': pieces(lambda m, x: (x.narrow(1, 0, m.one), x.narrow(1, m.one, m.other)), 3, 5, False, one=3, other=5),
    'slices, channels last': pieces(
        lambda m, x: (x.permute(0, 2, 3, 1)[..., : m.one].permute(0, 3, 1, 2), x[:, m.one :]), 3, 5, False, one=3
    ),
}
LITERALS = {
    'split into literals': lambda m, x: x.split([3, 5], 1),
    'slices at a literal': lambda m, x: (x[:, :3], x[:, 3:]),
}


@pytest.mark.parametrize('name', CUTS)
def test_pieces_of_the_channels(name):
    check_toy(CUTS[name])


@pytest.mark.parametrize('name', LITERALS)
def test_a_literal_cannot_follow_and_freezes(name):
    toy = pieces(LITERALS[name], 3, 5, False)
    toy.groups = {'left': 5, 'stem': 5} if 'slices' in name else {'left': 5}  # 3: goes to the end, wherever that is
    toy.members, toy.trial, toy.frozen = (
        {},
        True,
        {'left.weight:1': 'a trial failed: no attribute makes 3 equal'},
    )
    check_toy(toy)


class Uneven(nn.Module):
    """Layers for pieces of the channels of which some are shorter."""

    def __init__(self, cut, width, size=0):
        super().__init__()
        self.stem, self.cut, self.size = nn.Linear(3, width), cut, size
        self.layers = nn.ModuleList(nn.Linear(piece.shape[-1], 4) for piece in cut(self, torch.ones(1, width)))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        pieces = self.cut(self, self.stem(x).tanh())
        return self.fc(sum(layer(piece).sin() for layer, piece in zip(self.layers, pieces, strict=True)))


SHORTER = {  # width, size, units of the groups
    'chunks of 6, 6 and 4': (lambda m, x: x.chunk(3, -1), 16, 0, {'stem': 4, 'stem#2': 2}),
    'chunks of 5, 5, 5 and 2': (lambda m, x: x.chunk(dim=-1, chunks=4), 17, 0, {'stem': 2, 'stem#2': 3}),
    'split in 6, 6 and 4': (lambda m, x: x.split(m.size, -1), 16, 6, {'stem': 4, 'stem#2': 2}),
    'split in 7 and 3': (lambda m, x: torch.split(x, m.size, dim=-1), 10, 7, {'stem': 3, 'stem#2': 4}),
    'tensors of 4, 4 and 3': (lambda m, x: x.tensor_split(3, -1), 11, 0, {'stem': 3}),
}  # fmt: skip


@pytest.mark.parametrize('name', SHORTER)
def test_a_shorter_piece_stays_with_the_first_positions_of_the_others(name):
    cut, width, size, groups = SHORTER[name]
    found = exact(Uneven(cut, width, size), sample((2, 5, 3)), {'layers.0': 4} | groups)
    assert all('cut into' not in reason for reason in found.reasons())


REFUSED = {
    'fewer chunks than were asked for': lambda m, x: x.chunk(4, -1),
    'at positions': lambda m, x: x.tensor_split((2, 5), -1),
}


@pytest.mark.parametrize('name', REFUSED)
def test_pieces_that_would_be_others_freeze(name):
    found = comb(randomise_(Uneven(REFUSED[name], 9)), sample((2, 5, 3)), trial=False)
    assert {g.name for g in found.groups} == {'layers.0'}
    assert 'a dimension cut into unequal chunks in the model itself' in found.reasons()


def test_the_attributes_of_a_split_follow():
    net, found = check_toy(CUTS['split into attributes'])
    keep = found.keep()
    keep['stem'][0] = keep['stem#2'][1] = keep['stem#2'][4] = False
    small = slim(net, found, keep)
    assert (small.one, small.other) == (2, 3)
    assert type(small.one) is int
    assert (net.one, net.other) == (3, 5)
    net, found = check_toy(CUTS['split into a list'])
    assert slim(net, found, keep).sizes == [2, 3]
    assert net.sizes == [3, 5]


def joined(join, units: dict[str, int], into: int) -> Toy:
    return Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.mix(join(m, m.a(x), m.b(x), x)).tanh())),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 5, 1),
            mix=nn.Conv2d(into, 6, 3),
            fc=nn.Linear(6, 2),
        ),
        IMAGE,
        {**units, 'mix': 6},
    )


def out(name: str, units: int) -> dict[str, list[list[int]]]:
    return {f'{name}.weight:0': rows(units), f'{name}.bias:0': rows(units)}


def test_concatenation():
    toy = joined(lambda m, a, b, x: torch.cat([a, b], 1), {'a': 4, 'b': 5}, 9)
    toy.members = {
        'a': {**out('a', 4), 'mix.weight:1': rows(4)},
        'b': {**out('b', 5), 'mix.weight:1': rows(5, start=4)},
    }
    check_toy(toy)


def test_concatenation_with_a_fixed_activation():
    toy = joined(lambda m, a, b, x: torch.cat([x, a, x, b], 1), {'a': 4, 'b': 5}, 15)
    toy.members = {
        'a': {**out('a', 4), 'mix.weight:1': rows(4, start=3)},
        'b': {**out('b', 5), 'mix.weight:1': rows(5, start=10)},
    }
    toy.frozen = {'mix.weight:1': 'a convolution with a fixed position in mix'}
    check_toy(toy)


def test_concatenation_of_one_thing_twice():
    toy = joined(lambda m, a, b, x: torch.cat([a, b, a.sin()], 1), {'a': 4, 'b': 5}, 13)
    toy.members = {'a': {**out('a', 4), 'mix.weight:1': [[i, i + 9] for i in range(4)]}}
    check_toy(toy)


def test_concatenation_then_norm():
    toy = Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.norm(torch.cat([m.a(x), m.b(x)], 1)).tanh())),
            a=nn.Conv2d(3, 4, 1),
            b=nn.Conv2d(3, 5, 1),
            norm=nn.BatchNorm2d(9),
            fc=nn.Linear(9, 2),
        ),
        IMAGE,
        {'a': 4, 'b': 5},
    )
    toy.members['b'] = out('b', 5) | {
        f'norm.{n}:0': rows(5, start=4) for n in ('weight', 'bias', 'running_mean', 'running_var')
    }
    toy.members['b']['fc.weight:1'] = rows(5, start=4)
    check_toy(toy)


def test_dense_connections():
    def build():
        def run(m, x):
            x = m.stem(x)
            for layer in (m.one, m.two):
                x = torch.cat([x, layer(x.tanh())], 1)
            return m.fc(pooled(x))

        parts = dict(stem=nn.Conv2d(3, 4, 1), one=nn.Conv2d(4, 3, 1), two=nn.Conv2d(7, 3, 1), fc=nn.Linear(10, 2))
        return Net(run, **parts)

    members = {
        'stem': {**out('stem', 4), 'one.weight:1': rows(4), 'two.weight:1': rows(4), 'fc.weight:1': rows(4)},
        'one': {**out('one', 3), 'two.weight:1': rows(3, start=4), 'fc.weight:1': rows(3, start=4)},
        'two': {**out('two', 3), 'fc.weight:1': rows(3, start=7)},
    }
    check_toy(Toy(build, IMAGE, {'stem': 4, 'one': 3, 'two': 3}, members))


@pytest.mark.parametrize(
    'meet',
    [
        lambda a, b: torch.stack([a, b.tanh()], 1).amax(1),
        lambda a, b: a.gather(1, b.topk(3, dim=1).indices).tanh(),  # places found in another tensor
    ],
    ids=['stack', 'gather'],
)
def test_two_tensors_couple(meet):
    toy = Toy(
        lambda: Net(
            lambda m, x: m.fc(meet(m.a(x), m.b(x)).mean(1)),
            a=nn.Linear(3, 4),
            b=nn.Linear(3, 4),
            fc=nn.Linear(4, 2),
        ),
        TOKENS,
        {'a': 4},
        {'a': {**out('a', 4), **out('b', 4), 'fc.weight:1': rows(4)}},
    )
    check_toy(toy)


def with_tokens(batch: int) -> tuple[Net, torch.Tensor]:
    """Return a net that puts its tokens, of which there are none, before those of the input."""

    def run(m, x):
        x = torch.cat([m.tokens.expand(len(x), -1, -1), m.a(x)], 1)
        return m.b(m.norm(x).relu())

    net = Net(run, a=nn.Linear(3, 8), norm=nn.LayerNorm(8), b=nn.Linear(8, 2))
    net.tokens = nn.Parameter(torch.zeros(1, 0, 8))
    return net.double(), torch.randn(batch, 5, 3, generator=torch.Generator().manual_seed(0)).double()


def test_tokens_of_which_there_are_none_are_as_wide_as_the_others():
    net, x = with_tokens(2)
    found = exact(net, x, {'a': 8})
    assert slim(net, found, random_keep(found, 0.5, 0)).tokens.shape == (1, 0, 4)
    assert found.prunable() == (8 * 3 + 8 + 2 * 8 + 8 * 2, 8 * 3 + 8 + 2 * 8 + 8 * 2 + 2)


def test_where_two_dimensions_of_nothing_look_alike_it_freezes():
    net, x = with_tokens(8)
    found = comb(net, x)
    assert not found.groups and any('a tensor without elements (expand)' in reason for reason in found.reasons())


# -- pieces of one channel ---------------------------------------------------------------------------------------------
class Separable(nn.Module):
    """Attention with one channel of queries, as MobileViTv2's."""

    def __init__(self):
        super().__init__()
        self.width, self.qkv, self.proj, self.fc = 6, nn.Linear(3, 13), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        query, key, value = self.qkv(x).split([1, self.width, self.width], -1)
        context = (query.softmax(1) * key).sum(1, keepdim=True)
        return self.fc(self.proj(value.relu() * context))


class Gated(nn.Module):
    """One of eight channels weighs what all of them make."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix, self.fc = nn.Linear(3, 8), nn.Linear(8, 4), nn.Linear(4, 2)

    def gate(self, y):
        return y[..., :1]

    def forward(self, x):
        y = self.stem(x)
        return self.fc(self.mix(y.relu())) * self.gate(y)


class InTheMiddle(Gated):
    def gate(self, y):
        return y[..., 5:6]


class FromTheEnd(Gated):
    def gate(self, y):
        return y[..., -1:]


class Narrowed(Gated):
    def gate(self, y):
        return y.narrow(-1, 3, 1)


class ByNumber(Gated):
    """An index says no bounds, so that what is in front of it stays as well."""

    def gate(self, y):
        return y[..., 3, None]


class ByLastNumber(Gated):
    def gate(self, y):
        return y[..., -2, None]


class ByWidth(Gated):
    def gate(self, y):
        return y[..., y.shape[-1] // 2, None]


ONE = {
    Separable: {'qkv': 6, 'proj': 4},
    **{kind: {'stem': 7, 'mix': 4} for kind in (Gated, InTheMiddle, FromTheEnd, Narrowed)},
    ByNumber: {'stem': 4, 'mix': 4},
    ByLastNumber: {'stem': 6, 'mix': 4},
    ByWidth: {'mix': 4},
}


@pytest.mark.parametrize('kind', ONE)
def test_a_piece_of_one_channel_freezes_no_other(kind):
    exact(kind(), sample((2, 5, 3)), ONE[kind])


class CutAtNumbers(Gated):
    def gate(self, y):
        return torch.hsplit(y.mT, [3, 4])[1].mT


class CutInThree(Gated):
    def gate(self, y):
        return y.mT.hsplit([3, 5])[1].mT[..., :2].sum(-1, keepdim=True)


class CutDeep(Gated):
    def gate(self, y):
        return y.dsplit([3, 4])[1]


class CutByAten(Gated):
    def gate(self, y):
        return torch.ops.aten.slice(y, 2, 3, 4)


class ByScalar(Gated):
    def gate(self, y):
        return y.index_select(-1, torch.tensor(3))


@pytest.mark.parametrize('kind', [CutAtNumbers, CutInThree, CutDeep, CutByAten, ByScalar])
def test_pieces_whose_bounds_are_not_seen_freeze_all(kind):
    exact(kind(), sample((2, 5, 3)), {'mix': 4})


def test_equal_pieces_are_coupled_whatever_cuts_them():
    class Halves(Gated):
        def forward(self, x):
            left, right = self.stem(x).dsplit(2)
            return self.fc(self.mix(torch.cat([left.relu(), right.sigmoid() * left], -1)))

    exact(Halves(), sample((2, 5, 3)), {'stem': 4, 'mix': 4})
