"""Data movement: shuffles, slices in steps, unfolding, windows, pictures that a linear layer draws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from tests.exact import exact
from tests.helpers import Net, randomise_, rows, sample, strided
from tests.toys import Toy, check_toy, pooled

IMAGE = ((2, 3, 4, 4),)


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
