"""Convolutions: dense, grouped, depthwise, transposed; pooling and interpolation; what follows a flatten."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from tests.exact import exact
from tests.helpers import Net, rows, sample, strided
from tests.toys import Toy, check_toy, pooled

IMAGE = ((2, 3, 6, 6),)


def chain(middle: nn.Module, after: nn.Module, **parts: nn.Module) -> Net:
    """Return conv (3 to 8 channels), the layer in question, the one that reads it, a classifier."""
    out = after.out_channels
    return Net(
        lambda m, x: m.fc(pooled(m.after(m.middle(m.first(x)).relu()).tanh())),
        first=nn.Conv2d(3, 8, 1),
        middle=middle,
        after=after,
        fc=nn.Linear(out, 2),
    )


TOYS = {
    'conv': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.a(x).relu()).relu())),
            a=nn.Conv2d(3, 6, 3),
            b=nn.Conv2d(6, 4, 3, stride=2),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {
            'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'b.weight:1': rows(6)},
            'b': {'b.weight:0': rows(4), 'b.bias:0': rows(4), 'fc.weight:1': rows(4)},
        },
        {
            'a.weight:2': 'kernel size',
            'a.weight:1': "the model's input channels (read by a)",
            'fc.weight:0': 'model output',
        },
    ),
    'conv without bias': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.a(x).relu())), a=nn.Conv2d(3, 6, 3, bias=False), fc=nn.Linear(6, 2, bias=False)
        ),
        IMAGE,
        {'a': 6},
        {'a': {'a.weight:0': rows(6), 'fc.weight:1': rows(6)}},
    ),
    'one channel in the middle': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.c(m.b(m.a(x).relu())).relu())),
            a=nn.Conv2d(3, 5, 1),
            b=nn.Conv2d(5, 1, 3),
            c=nn.Conv2d(1, 4, 1),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 5, 'c': 4},
        {'c': {'c.weight:0': rows(4), 'c.bias:0': rows(4), 'fc.weight:1': rows(4)}},
    ),
    'conv1d': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.a(x).tanh()).tanh())),
            a=nn.Conv1d(3, 6, 3),
            b=nn.Conv1d(6, 4, 3, dilation=2),
            fc=nn.Linear(4, 2),
        ),
        ((2, 3, 12),),
        {'a': 6, 'b': 4},
    ),
    'conv3d': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.a(x).relu()).relu())),
            a=nn.Conv3d(3, 6, 2),
            b=nn.Conv3d(6, 4, 2),
            fc=nn.Linear(4, 2),
        ),
        ((2, 3, 4, 4, 4),),
        {'a': 6, 'b': 4},
    ),
    'unbatched conv': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.b(m.a(x).relu()).mean((1, 2))),
            a=nn.Conv2d(3, 6, 3),
            b=nn.Conv2d(6, 4, 1),
            fc=nn.Linear(4, 2),
        ),
        ((3, 6, 6),),
        {'a': 6, 'b': 4},
    ),
    'grouped': Toy(
        lambda: chain(nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(12, 5, 1)),
        IMAGE,
        {'first': 4, 'after': 5},
        {
            'first': {
                'first.weight:0': rows(4, 2),
                'first.bias:0': rows(4, 2),
                'middle.weight:0': rows(4, 3),
                'middle.bias:0': rows(4, 3),
                'after.weight:1': rows(4, 3),
            }
        },
        {'middle.weight:1': 'inside a convolution group'},
    ),
    'depthwise': Toy(
        lambda: chain(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1)),
        IMAGE,
        {'first': 8, 'after': 5},
        {
            'first': {
                'first.weight:0': rows(8),
                'first.bias:0': rows(8),
                'middle.weight:0': rows(8),
                'middle.bias:0': rows(8),
                'after.weight:1': rows(8),
            }
        },
    ),
    'depthwise, twice the channels': Toy(
        lambda: chain(nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 5, 1)),
        IMAGE,
        {'first': 8, 'after': 5},
        {
            'first': {
                'first.weight:0': rows(8),
                'first.bias:0': rows(8),
                'middle.weight:0': rows(8, 2),
                'middle.bias:0': rows(8, 2),
                'after.weight:1': rows(8, 2),
            }
        },
    ),
    'grouped after grouped': Toy(
        lambda: chain(nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 6, 1, groups=2)),
        IMAGE,
        {'first': 2},
        {
            'first': {
                'first.weight:0': rows(2, 4),
                'first.bias:0': rows(2, 4),
                'middle.weight:0': rows(2, 4),
                'middle.bias:0': rows(2, 4),
                'after.weight:0': rows(2, 3),
                'after.bias:0': rows(2, 3),
                'fc.weight:1': rows(2, 3),
            }
        },
    ),
    'grouped, shuffled, grouped': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.c(m.b(torch.channel_shuffle(m.a(m.first(x)).relu(), 2)).tanh()).tanh())),
            first=nn.Conv2d(3, 8, 1),
            a=nn.Conv2d(8, 16, 1, groups=2),
            b=nn.Conv2d(16, 12, 3, groups=2),
            c=nn.Conv2d(12, 4, 1),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'first': 4, 'a': 4, 'b': 6, 'c': 4},
        {
            'first': {
                'first.weight:0': [[0, 4], [1, 5], [2, 6], [3, 7]],
                'first.bias:0': [[0, 4], [1, 5], [2, 6], [3, 7]],
                'a.weight:1': rows(4),
            },
            'a': {
                'a.weight:0': [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
                'a.bias:0': [[0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15]],
                'b.weight:1': rows(4, 2),
            },
            'b': {
                'b.weight:0': [[n, n + 6] for n in range(6)],
                'b.bias:0': [[n, n + 6] for n in range(6)],
                'c.weight:1': [[n, n + 6] for n in range(6)],
            },
        },
    ),
    'grouped, shuffled, grouped and transposed': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(torch.channel_shuffle(m.a(m.first(x)).relu(), 2)).tanh())),
            first=nn.Conv2d(3, 8, 1),
            a=nn.Conv2d(8, 16, 1, groups=2),
            b=nn.ConvTranspose2d(16, 12, 2, stride=2, groups=2),
            fc=nn.Linear(12, 2),
        ),
        IMAGE,
        {'first': 4, 'a': 4, 'b': 6},
        {
            'b': {
                'b.weight:1': rows(6),
                'b.bias:0': [[n, n + 6] for n in range(6)],
                'fc.weight:1': [[n, n + 6] for n in range(6)],
            },
        },
    ),
    'grouped on the input': Toy(
        lambda: Net(lambda m, x: m.fc(pooled(m.a(x))), a=nn.Conv2d(3, 6, 1, groups=3), fc=nn.Linear(6, 2)),
        IMAGE,
        {},
        frozen={'a.weight:0': "the model's input channels (read by a)"},
    ),
    'transposed': Toy(
        lambda: chain(nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 5, 1)),
        IMAGE,
        {'first': 8, 'middle': 6, 'after': 5},
        {
            'first': {'first.weight:0': rows(8), 'first.bias:0': rows(8), 'middle.weight:0': rows(8)},
            'middle': {'middle.weight:1': rows(6), 'middle.bias:0': rows(6), 'after.weight:1': rows(6)},
        },
    ),
    'transposed and grouped': Toy(
        lambda: chain(nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), nn.Conv2d(12, 5, 1)),
        IMAGE,
        {'first': 4, 'after': 5},
        {
            'first': {
                'first.weight:0': rows(4, 2),
                'first.bias:0': rows(4, 2),
                'middle.weight:0': rows(4, 2),
                'middle.bias:0': rows(4, 3),
                'after.weight:1': rows(4, 3),
            }
        },
    ),
    'transposed and depthwise': Toy(
        lambda: chain(nn.ConvTranspose2d(8, 8, 2, groups=8), nn.Conv2d(8, 5, 1)), IMAGE, {'first': 8, 'after': 5}
    ),
    'flatten': Toy(
        lambda: Net(lambda m, x: m.fc(m.a(x).relu().flatten(1)), a=nn.Conv2d(3, 5, 5), fc=nn.Linear(20, 2)),
        IMAGE,
        {'a': 5},
        {'a': {'a.weight:0': rows(5), 'a.bias:0': rows(5), 'fc.weight:1': rows(5, 4)}},
    ),
    'flatten by view, channels last': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.a(x).relu().permute(0, 2, 3, 1).reshape(x.shape[0], -1)),
            a=nn.Conv2d(3, 5, 5),
            fc=nn.Linear(20, 2),
        ),
        IMAGE,
        {'a': 5},
        {'a': {'a.weight:0': rows(5), 'a.bias:0': rows(5), 'fc.weight:1': strided(5, 4)}},
    ),
    'flatten by a literal': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.a(x).relu().view(-1, 20)),
            a=nn.Conv2d(3, 5, 5),
            fc=nn.Linear(20, 2),
        ),
        IMAGE,
        {},
        frozen={'a.weight:0': 'a trial failed'},
        trial=True,
    ),
    'weights shared by two layers': Toy(
        lambda: shared(),
        IMAGE,
        {'a': 6, 'b': 6},
        {'b': {'b.weight:0': rows(6), 'b.bias:0': rows(6), 'fc.weight:1': rows(6)}},
    ),
}  # fmt: skip


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(pooled(self.b(self.a(x).relu()) + self.b(self.a(x).tanh())))


def shared() -> nn.Module:
    """Run each of two layers twice."""
    return Shared()


def spatial(operation) -> Toy:
    return Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(operation(m.a(x))))),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 4, 1),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'b.weight:1': rows(6)}},
    )


def warp(x):
    theta = torch.tensor([[0.9, 0.1, 0.0], [-0.1, 0.8, 0.1]], dtype=x.dtype).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)


SPATIAL = {
    'max_pool': lambda x: F.max_pool2d(x, 3, stride=2, padding=1),
    'avg_pool': lambda x: F.avg_pool2d(x, 2),
    'lp_pool': lambda x: F.lp_pool2d(x.relu(), 2, 2),
    'adaptive_avg_pool': lambda x: F.adaptive_avg_pool2d(x, 2),
    'adaptive_avg_pool to one': lambda x: F.adaptive_avg_pool2d(x, 1),
    'adaptive_max_pool': lambda x: F.adaptive_max_pool2d(x, 2),
    'nearest': lambda x: F.interpolate(x, scale_factor=2),
    'nearest-exact': lambda x: F.interpolate(x, size=(5, 5), mode='nearest-exact'),
    'bilinear': lambda x: F.interpolate(x, size=(9, 9), mode='bilinear', align_corners=False),
    'bilinear, antialiased': lambda x: F.interpolate(x, size=(4, 4), mode='bilinear', antialias=True),
    'bicubic': lambda x: F.interpolate(x, size=(9, 9), mode='bicubic'),
    'grid_sample': warp,
    'zero padding': lambda x: F.pad(x, (1, 1, 1, 1)),
    'padding by one': lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    'reflection padding': lambda x: F.pad(x, (1, 1, 1, 1), mode='reflect'),
    'replication padding': lambda x: F.pad(x, (1, 1, 1, 1), mode='replicate'),
    'circular padding': lambda x: F.pad(x, (1, 2, 1, 1), mode='circular'),
    'circular padding, and a sum of what is nowhere zero': lambda x: (
        x + F.pad(x.sigmoid(), (1, 0, 0, 1), mode='circular').sum(1, keepdim=True)[:, :, 1:, 1:]
    ),
    'flip': lambda x: x.flip(2),
    'roll': lambda x: x.roll((1, 1), (2, 3)),
    'crop': lambda x: x[:, :, 1:5, ::2],
    'softmax over space': lambda x: x.flatten(2).softmax(-1).reshape(x.shape),
    'sum over space': lambda x: x.sum((2, 3), keepdim=True),
    'amax over space': lambda x: x.amax((2, 3), keepdim=True),
    'max over a dimension': lambda x: x.max(2, keepdim=True).values,
    'var over space': lambda x: x.var((2, 3), keepdim=True),
    'cumsum over space': lambda x: x.cumsum(2),
    'nansum over space': lambda x: x.nansum((2, 3), keepdim=True),
    'cummax over space': lambda x: x.cummax(3).values,
    'cummin over space': lambda x: x.cummin(2).values,
    'a quantile over a dimension': lambda x: x.kthvalue(2, dim=3, keepdim=True).values,
    'median over a dimension': lambda x: x.nanmedian(2, keepdim=True).values,
    'mode over a dimension': lambda x: x.mode(3, keepdim=True).values,
    'smallest and largest over a dimension': lambda x: sum(x.aminmax(dim=2, keepdim=True)),
    'logsumexp over space': lambda x: x.logsumexp((2, 3), keepdim=True),
}


@pytest.mark.parametrize('name', TOYS)
def test_convolution(name):
    check_toy(TOYS[name])


@pytest.mark.parametrize('name', SPATIAL)
def test_spatial_operations_leave_the_channels_alone(name):
    check_toy(spatial(SPATIAL[name]))


@pytest.mark.parametrize('space', [1, 2, 3])
def test_convolutions_that_wrap_around(space):
    conv = partial((nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1], kernel_size=3, padding=1, padding_mode='circular')
    net = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.Sigmoid(), conv(6, 6, groups=6), conv(6, 2))
    exact(net, sample((2, 3, *[5] * space)), {'0': 8, '2': 6})


@pytest.mark.parametrize('pad', [(3, 0), (0, 3), (4, 4)])
def test_channels_that_are_padded_around_freeze(pad):
    net = Net(lambda m, x: m.fc(F.pad(m.a(x).sigmoid(), pad, mode='circular')), a=nn.Linear(3, 12),
              fc=nn.Linear(12 + sum(pad), 2))  # fmt: skip
    found = comb(net.double(), sample((2, 5, 3)), trial=False)
    assert not found.groups and any('copy with channels' in frozen.reason for frozen in found.frozen)


def test_a_grouped_convolution_keeps_its_attributes_in_step():
    from mmcpd.slim import slim

    model, found = check_toy(TOYS['grouped'])
    keep = found.keep()
    keep['first'][1] = False
    small = slim(model, found, keep)
    middle = small.middle
    assert (middle.in_channels, middle.out_channels, middle.groups) == (6, 9, 3)
    assert tuple(middle.weight.shape) == (9, 2, 3, 3)
    assert type(middle.groups) is int
    assert isinstance(small, Net) and type(middle) is nn.Conv2d
