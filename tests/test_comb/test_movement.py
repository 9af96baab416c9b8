"""Data movement: concatenation, splits, slices, shuffles, unfolding and windows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
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


def moved(move, into: int, units: int, out_rows, in_rows, image=IMAGE, stem: int = 8) -> Toy:
    """Return a toy: conv (8 channels), data movement, conv, classifier."""
    return Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.mix(move(m.stem(x))).tanh())),
            stem=nn.Conv2d(3, stem, 1),
            mix=nn.Conv2d(into, 5, 1),
            fc=nn.Linear(5, 2),
        ),
        image,
        {'stem': units, 'mix': 5},
        {'stem': {'stem.weight:0': out_rows, 'stem.bias:0': out_rows, 'mix.weight:1': in_rows}},
    )


def shuffle(x):
    """Shuffle as ShuffleNet does, with two groups."""
    batch, channels, height, width = x.shape
    return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, channels, height, width)


def by_pixel(x, function):
    """Apply a function to each pixel of the first image as a matrix of 8 x 8: (8 pixels, 8 channels)."""
    first = function(x.flatten(2)[0, :, :8].T.contiguous())
    return first.T.reshape(1, -1, 2, 4) + x[:, :, :2]


def turn(x):
    """Turn pairs of channels by an angle, as rotary embeddings do."""
    even, odd = x[:, ::2], x[:, 1::2]
    return torch.stack([0.8 * even - 0.6 * odd, 0.6 * even + 0.8 * odd], 2).flatten(1, 2)


def windows(x):
    """Cut an image into windows of 2 x 2, and put it together again."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, channels)
    x = x.softmax(1)
    x = x.reshape(batch, height // 2, width // 2, 2, 2, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(batch, channels, height, width)


MOVED = {
    'pixel shuffle': moved(lambda x: F.pixel_shuffle(x, 2), 2, 2, rows(2, 4), rows(2)),
    'pixel shuffle by hand, of unknown width': moved(
        lambda x: x.reshape(len(x), -1, 4, 1, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(len(x), -1, 16, 4),
        2, 2, rows(2, 4), rows(2),
    ),
    'pixel unshuffle': moved(lambda x: F.pixel_unshuffle(x, 2), 32, 8, rows(8), rows(8, 4)),
    'space to channels by slices': moved(
        lambda x: torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1),
        32,
        8,
        rows(8),
        strided(8, 4),
    ),
    'pixel shuffle by hand': moved(
        lambda x: x.reshape(len(x), -1, 2, 2, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(len(x), -1, 8, 8),
        2,
        2,
        rows(2, 4),
        rows(2),
    ),
    'channel shuffle': moved(shuffle, 8, 4, strided(4, 2), rows(4, 2)),
    'channel shuffle of torch': moved(lambda x: F.channel_shuffle(x, 2), 8, 4, strided(4, 2), rows(4, 2)),
    'sum over pairs of channels': moved(lambda x: x.unflatten(1, (-1, 2)).sum(2), 4, 4, rows(4, 2), rows(4)),
    'pairs by their half': moved(
        lambda x: x.reshape(len(x), x.shape[1] // 2, 2, *x.shape[2:]).amax(2), 4, 4, rows(4, 2), rows(4)
    ),
    'windows': moved(windows, 8, 8, rows(8), rows(8)),
    'repeat': moved(lambda x: x.repeat(1, 2, 1, 1), 16, 8, rows(8), strided(8, 2)),
    'repeat_interleave': moved(lambda x: x.repeat_interleave(2, 1), 16, 8, rows(8), rows(8, 2)),
    'padded channels': moved(lambda x: F.pad(x, (0, 0, 0, 0, 0, 2)), 10, 8, rows(8), rows(8)),
    'unfold': moved(
        lambda x: F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:]), 72, 8, rows(8), rows(8, 9)
    ),
    'unfold and fold': moved(
        lambda x: F.fold(F.unfold(x, 2, stride=2).tanh(), (4, 4), 2, stride=2), 8, 8, rows(8), rows(8)
    ),
    'unfold of the tensor': moved(
        lambda x: x.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), 8, 8, rows(8), rows(8)
    ),
    'rolled windows': moved(lambda x: x.roll((1, -1), (2, 3)), 8, 8, rows(8), rows(8)),
    'transposed back and forth': moved(
        lambda x: x.flatten(2).mT.contiguous().mT.unflatten(2, (4, 4)), 8, 8, rows(8), rows(8)
    ),
    'transposed in place': moved(
        lambda x: x.flatten(2).transpose_(1, 2).contiguous().mT.unflatten(2, (4, 4)), 8, 8, rows(8), rows(8)
    ),
    'squeezed and unsqueezed in place': moved(
        lambda x: x.mean(3, keepdim=True).squeeze_(3).unsqueeze_(-1), 8, 8, rows(8), rows(8)
    ),
    'a square transposed in place': moved(lambda x: by_pixel(x, lambda y: y.t_().t_()), 8, 8, rows(8), rows(8)),
    'reversed channels': moved(lambda x: x.flip(1), 8, 8, rows(8), rows(8)[::-1]),
    'the first of each two channels': moved(lambda x: x[:, ::2], 4, 4, rows(4, 2), rows(4)),
    'the last of each four channels': moved(lambda x: x[:, 3::4], 2, 2, rows(2, 4), rows(2)),
    'steps of which the first is over a fixed channel': moved(
        lambda x: torch.cat([x.new_ones(len(x), 1, 4, 4), x], 1)[:, ::3], 3, 2, rows(2, 3, 2), rows(2, 1, 1)
    ),
    'pairs of channels, turned': moved(lambda x: turn(x), 8, 4, rows(4, 2), rows(4, 2)),
    'rolled groups of channels': moved(
        lambda x: x.unflatten(1, (2, -1)).roll(1, 1).flatten(1, 2), 8, 4, strided(4, 2), strided(4, 2)
    ),
    'best places of each channel': moved(lambda x: x.flatten(2).topk(3).values[..., None], 8, 8, rows(8), rows(8)),
    'sorted places': moved(lambda x: x.sort().values, 8, 8, rows(8), rows(8)),
    'places in the order of another tensor': moved(
        lambda x: x.tanh().gather(3, x.cos().argsort()), 8, 8, rows(8), rows(8)
    ),
    'a triangle of places': moved(lambda x: x.tril(), 8, 8, rows(8), rows(8)),
    'a triangle of places in place': moved(lambda x: x.clone().triu_(1), 8, 8, rows(8), rows(8)),
    'space, picked by an index': moved(lambda x: x[:, :, [0, 2, 3]], 8, 8, rows(8), rows(8)),
    'tokens in an order': moved(
        lambda x: x.flatten(2).index_select(2, torch.arange(15, -1, -1)).unflatten(2, (4, 4)), 8, 8, rows(8), rows(8)
    ),
    'gathered places': moved(
        lambda x: x.flatten(2).gather(2, torch.tensor([3, 1, 2]).expand(len(x), x.shape[1], 3))[..., None],
        8,
        8,
        rows(8),
        rows(8),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', MOVED)
def test_data_movement(name):
    check_toy(MOVED[name])


AMBIGUOUS = {  # a rectangle whose last dimension is not the one that could go
    'sum over fours of channels': (lambda x: x.unflatten(1, (-1, 4)).sum(2), 2, 'a trial failed'),
}


@pytest.mark.parametrize('name', AMBIGUOUS)
def test_a_rectangle_of_which_nothing_can_go_freezes(name):
    move, into, reason = AMBIGUOUS[name]
    toy = moved(move, into, 0, [], [])
    toy.groups, toy.members, toy.frozen, toy.trial = {'mix': 5}, {}, {'stem.weight:0': reason}, True
    check_toy(toy)


DRAWN = {  # what takes the pictures that a linear layer draws: 7 channels of 8 x 8 places
    'a convolution': lambda m, y: y,
    'two views': lambda m, y: y.flatten(1).relu().view(-1, m.channels, 4, 16),
    'in two dimensions of channels': lambda m, y: y.view(-1, m.channels, 64).view(-1, m.channels, 8, 8),
    'enlarged': lambda m, y: F.interpolate(y, scale_factor=2, mode='bilinear'),
    'enlarged by the nearest': lambda m, y: F.interpolate(y, scale_factor=2),
    'pooled': lambda m, y: F.max_pool2d(y, 2),
    'pooled to a size': lambda m, y: F.adaptive_avg_pool2d(y, (3, 5)),
    'picked by a grid': lambda m, y: F.grid_sample(
        y, torch.linspace(-1, 1, 24).view(1, 3, 4, 2).expand(len(y), -1, -1, -1).to(y), align_corners=False
    ),
    'normalised': lambda m, y: F.group_norm(y, 1),
    'windows': lambda m, y: F.fold(F.unfold(y, 2, stride=2), (8, 8), 2, stride=2),
}


@pytest.mark.parametrize('name', DRAWN)
def test_channels_of_a_picture_that_a_linear_layer_draws(name):
    net = Net(
        lambda m, x: m.fc(pooled(m.mix(DRAWN[name](m, m.draw(x).relu().view(-1, m.channels, 8, 8))).tanh())),
        draw=nn.Linear(5, 7 * 64),
        mix=nn.Conv2d(7, 5, 3, padding=1),
        fc=nn.Linear(5, 2),
        channels=7,
    )
    exact(net, sample((3, 5)), {'draw': 7, 'mix': 5})


def test_channels_of_each_of_several_frames_go_not_frames():
    net = Net(
        lambda m, x: m.fc(
            m.mix(m.draw(x).view(-1, 4, m.channels, 8, 8).flatten(0, 1)).unflatten(0, (-1, 4)).mean((1, 3, 4))
        ),
        draw=nn.Linear(5, 4 * 7 * 64), mix=nn.Conv2d(7, 5, 3), fc=nn.Linear(5, 2), channels=7,
    )  # fmt: skip
    exact(net, sample((3, 5)), {'draw': 7, 'mix': 5})


def test_what_else_a_layer_makes_beside_a_picture_is_as_it_was():
    def run(m, x):
        q, k, picture = m.make(x).split([16, 16, m.channels * 64], 1)
        q, k = q.view(-1, 2, 8), k.view(-1, 2, 8)
        return m.fc(m.mix(picture.view(-1, m.channels, 8, 8)).mean((2, 3))) * (q @ k.mT).sum((1, 2))[:, None]

    net = Net(run, make=nn.Linear(5, 32 + 7 * 64), mix=nn.Conv2d(7, 5, 3), fc=nn.Linear(5, 2), channels=7)
    found = comb(randomise_(net), sample((3, 5)), trial=False)
    assert sorted(g.units for g in found.groups) == [5, 7, 8]


def test_positions_of_a_picture_that_is_no_channel_stay():
    net = Net(lambda m, x: m.fc(pooled(m.mix(m.draw(x).view(-1, 1, 8, 8)).tanh())),
              draw=nn.Linear(5, 64), mix=nn.Conv2d(1, 5, 3), fc=nn.Linear(5, 2))  # fmt: skip
    found = exact(net, sample((3, 5)), {'mix': 5})
    assert any('a spatial dimension in mix' in why for why in found.reasons())


UNEQUAL = {  # of 8 channels, what takes them by an offset or in steps that others do not fill
    'rolled': (lambda x: x.roll(1, 1), 8, 'picked by a fixed index (roll)'),
    'rolled over everything': (lambda x: x.roll(-3), 8, 'picked by a fixed index (roll)'),
    'one of each three': (lambda x: x[:, ::3], 3, 'a slice in unequal steps'),
    'steps that leave some out': (lambda x: x[:, 2::2], 3, 'a slice in unequal steps'),
    'steps from the end': (lambda x: x[:, -5::4], 2, 'a slice in unequal steps'),
    'steps that end before': (lambda x: x[:, :6:2], 3, 'a slice in unequal steps'),
    'a triangle of channels': (lambda x: x.transpose(1, 2).tril().transpose(1, 2), 8, 'a triangle of channels'),
    'channels in an order of their own': (lambda x: x.gather(1, x.argsort(1)), 8, 'sort over channels'),
}


@pytest.mark.parametrize('name', UNEQUAL)
def test_offsets_and_unequal_steps_freeze(name):
    move, into, reason = UNEQUAL[name]
    toy = moved(move, into, 0, [], [])
    toy.groups, toy.members, toy.frozen = {'mix': 5}, {}, {'stem.weight:0': reason}
    check_toy(toy)


def test_shuffle_units_of_shufflenet():
    """Split in halves, convolve one of them, put both together and shuffle: twice."""

    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            left, right = x.chunk(2, 1)
            return shuffle(torch.cat([left, self.outer(self.inner(right).tanh())], 1))

    def build():
        return Net(
            lambda m, x: m.fc(pooled(m.two(m.one(m.stem(x))))),
            stem=nn.Conv2d(3, 8, 1),
            one=Unit(),
            two=Unit(),
            fc=nn.Linear(8, 2),
        )

    # The halves tie (i, i + 4); halves of what was shuffled tie (i, i + 2) as well.
    _, found = check_toy(Toy(build, IMAGE, {'stem': 2, 'one.inner': 6, 'two.inner': 6}))
    assert found.group('stem').members[0].index.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]


class RepeatedHeads(nn.Module):
    """Heads in one dimension with the batch: with two samples it is as long as there are channels."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def heads_of(self, x):
        return x.transpose(0, 1).reshape(5, 4, -1).transpose(0, 1)  # (batch * heads, tokens, 2)

    def forward(self, x):
        q, k, v = self.heads_of(self.q(x)), self.heads_of(self.k(x)), self.heads_of(self.v(x))
        y = (q @ k.mT / 4).softmax(-1) @ v
        return self.fc(y.transpose(0, 1).reshape(5, 2, -1))


def test_heads_repeated_in_a_batch_are_no_channels():
    exact(RepeatedHeads(), sample((2, 5, 4)), {'q': 2, 'v': 2})
