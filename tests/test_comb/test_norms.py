"""Normalisations: what they couple, and their statistics over the units that stay."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.slim import slim
from tests.helpers import Net, rows, strided
from tests.toys import Toy, check_toy, pooled

IMAGE = ((2, 3, 4, 4),)


def image(norm: nn.Module) -> Net:
    return Net(
        lambda m, x: m.fc(pooled(m.b(m.norm(m.a(x)).tanh()))),
        a=nn.Conv2d(3, 6, 1),
        norm=norm,
        b=nn.Conv2d(6, 4, 3),
        fc=nn.Linear(4, 2),
    )


def tokens(norm: nn.Module) -> Net:
    return Net(
        lambda m, x: m.fc(m.b(m.norm(m.a(x)).tanh()).tanh().mean(1)),
        a=nn.Linear(3, 6),
        norm=norm,
        b=nn.Linear(6, 4),
        fc=nn.Linear(4, 2),
    )


def around(units: int, *names: str, k: int = 1) -> dict[str, list[list[int]]]:
    """Return the members of the group `a` beside the norm's own."""
    index = rows(units) if k == 1 else strided(units, k)
    return {f'{n}:0': index for n in ('a.weight', 'a.bias', *names)} | {'b.weight:1': index}


class ChannelFirst(nn.LayerNorm):
    """A layer norm over the channels of an image, which permutes inside."""

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class Gram(nn.Module):
    """Products of each two channels, (N, C, C)."""

    def forward(self, x):
        x = x.flatten(2)
        return x @ x.mT


class Root(nn.Module):
    """A root mean square norm by hand: its mean is one over the channels that stay."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.weight


class Response(nn.Module):
    """Global response normalisation: each channel's length over the mean length of all."""

    def __init__(self):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.empty(6)), nn.Parameter(torch.empty(6))

    def forward(self, x):
        length = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        scaled = x * (length / (length.mean(dim=1, keepdim=True) + 1e-6))
        return self.gamma.view(1, -1, 1, 1) * scaled + self.beta.view(1, -1, 1, 1) + x


BATCH = {f'norm.{n}' for n in ('weight', 'bias', 'running_mean', 'running_var')}
TOYS = {
    'batch norm': Toy(lambda: image(nn.BatchNorm2d(6)), IMAGE, {'a': 6, 'b': 4}, {'a': around(6, *BATCH)}),
    'batch norm without weights': Toy(
        lambda: image(nn.BatchNorm2d(6, affine=False)),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, 'norm.running_mean', 'norm.running_var')},
    ),
    'batch norm without statistics': Toy(
        lambda: image(nn.BatchNorm2d(6, track_running_stats=False)),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, 'norm.weight', 'norm.bias')},
    ),
    'batch norm before the convolution': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.norm(m.a(x)).relu() + m.a(x)))),
            a=nn.Conv2d(3, 6, 1),
            norm=nn.BatchNorm2d(6),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, *BATCH)},
    ),
    'batch norm of one dimension': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.norm(m.a(x)).tanh()), a=nn.Linear(3, 6), norm=nn.BatchNorm1d(6), fc=nn.Linear(6, 2)
        ),
        ((2, 3),),
        {'a': 6},
    ),
    'layer norm': Toy(
        lambda: tokens(nn.LayerNorm(6)), ((2, 5, 3),), {'a': 6, 'b': 4}, {'a': around(6, 'norm.weight', 'norm.bias')}
    ),
    'layer norm without bias': Toy(
        lambda: tokens(nn.LayerNorm(6, bias=False)), ((2, 5, 3),), {'a': 6, 'b': 4}, {'a': around(6, 'norm.weight')}
    ),
    'layer norm without weights': Toy(
        lambda: tokens(nn.LayerNorm(6, elementwise_affine=False)), ((2, 5, 3),), {'a': 6, 'b': 4}, {'a': around(6)}
    ),
    'layer norm over channels of an image': Toy(
        lambda: image(ChannelFirst(6)), IMAGE, {'a': 6, 'b': 4}, {'a': around(6, 'norm.weight', 'norm.bias')}
    ),
    'layer norm over channels and single pixels': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.b(m.norm(m.a(x.mean((2, 3), keepdim=True))).tanh()).flatten(1)),
            a=nn.Conv2d(3, 6, 1),
            norm=nn.LayerNorm([6, 1, 1]),
            b=nn.Conv2d(6, 4, 1),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, 'norm.weight', 'norm.bias')},
    ),
    'layer norm over channels and places': Toy(
        lambda: image(nn.LayerNorm((6, 4, 4))),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, 'norm.weight', 'norm.bias')},
        {f'norm.weight:{dim}': 'layer norm with channels that no layer produces in norm' for dim in (1, 2)},
    ),
    'layer norm over places and channels, without an affine': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.norm(m.a(x).movedim(1, -1)).movedim(-1, 1).tanh()))),
            a=nn.Conv2d(3, 6, 1),
            norm=nn.LayerNorm((4, 6), elementwise_affine=False),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6)},
    ),
    'layer norm by a function over all but samples': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(F.layer_norm(m.a(x), m.a(x).shape[1:]).tanh()))),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6)},
    ),
    'layer norm over two dimensions of channels': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.a(x).tanh() * m.norm(m.of(m.a(x))).mean((1, 2))[:, None, None, None]))),
            a=nn.Conv2d(3, 6, 1),
            norm=nn.LayerNorm((6, 6)),
            of=Gram(),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'b': 4},
        frozen={'a.weight:0': 'a layer norm over two dimensions of channels in norm'},
    ),
    'layer norm over space': Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(m.norm(m.a(x))))),
            a=nn.Conv2d(3, 6, 1),
            norm=nn.LayerNorm(4),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6)},
        {'norm.weight:0': 'channels that no layer produces'},
    ),
    'group norm of one group': Toy(
        lambda: image(nn.GroupNorm(1, 6)), IMAGE, {'a': 6, 'b': 4}, {'a': around(6, 'norm.weight', 'norm.bias')}
    ),
    'group norm of two groups': Toy(
        lambda: image(nn.GroupNorm(2, 6)), IMAGE, {'a': 3, 'b': 4}, {'a': around(3, 'norm.weight', 'norm.bias', k=2)}
    ),
    'group norm without weights': Toy(
        lambda: image(nn.GroupNorm(3, 6, affine=False)), IMAGE, {'a': 2, 'b': 4}, {'a': around(2, k=3)}
    ),
    'group norm, a group for each channel': Toy(
        lambda: image(nn.GroupNorm(6, 6)), IMAGE, {'a': 6, 'b': 4}, {'a': around(6, 'norm.weight', 'norm.bias')}
    ),
    'instance norm': Toy(lambda: image(nn.InstanceNorm2d(6)), IMAGE, {'a': 6, 'b': 4}, {'a': around(6)}),
    'instance norm with weights': Toy(
        lambda: image(nn.InstanceNorm2d(6, affine=True)),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, 'norm.weight', 'norm.bias')},
    ),
    'instance norm with statistics': Toy(
        lambda: image(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': around(6, *BATCH)},
    ),
    'root mean square norm by hand': Toy(
        lambda: tokens(Root()), ((2, 5, 3),), {'a': 6, 'b': 4}, {'a': around(6, 'norm.weight')}
    ),
    'global response norm by hand': Toy(
        lambda: image(Response()), IMAGE, {'a': 6, 'b': 4}, {'a': around(6, 'norm.gamma', 'norm.beta')}
    ),
    'unit length over channels': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.b(F.normalize(m.a(x), dim=-1)).mean(1)),
            a=nn.Linear(3, 6),
            b=nn.Linear(6, 4),
            fc=nn.Linear(4, 2),
        ),
        ((2, 5, 3),),
        {'a': 6, 'b': 4},
        {'a': around(6)},
    ),
    'standardised weights': Toy(lambda: standardised(), IMAGE, {'a': 6, 'b': 4}),
    'local response norm': Toy(
        lambda: image(nn.LocalResponseNorm(3)), IMAGE, {'b': 4}, frozen={'a.weight:0': ''}
    ),
}  # fmt: skip


class Standardised(nn.Conv2d):
    """A convolution whose filters are standardised by their mean and variance over inputs and taps."""

    def forward(self, x):
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / (weight.var(1, keepdim=True) + 1e-5).sqrt()
        return F.conv2d(x, weight.view_as(self.weight), self.bias)


def standardised() -> nn.Module:
    """Return a net whose first, unpruned input is standardised, so that only its outputs can go."""
    model = image(nn.Identity())
    model.a = Standardised(3, 6, 1)
    return model


@pytest.mark.parametrize('name', TOYS)
def test_norm(name):
    check_toy(TOYS[name])


def test_filters_that_are_standardised_over_their_inputs():
    def build():
        model = image(nn.Identity())
        model.b = Standardised(6, 4, 3)
        return model

    check_toy(Toy(build, IMAGE, {'a': 6, 'b': 4}, frozen={'b.weight:2': 'two axes in one dimension (view) in b'}))


@pytest.mark.parametrize(
    ('name', 'attribute', 'value'),
    [
        ('batch norm', 'num_features', 4),
        ('batch norm without weights', 'num_features', 4),
        ('layer norm', 'normalized_shape', (4,)),
        ('layer norm without weights', 'normalized_shape', (4,)),
        ('group norm of two groups', 'num_channels', 4),
    ],
)
def test_attributes_of_norms_follow(name, attribute, value):
    net, found = check_toy(TOYS[name])
    keep = found.keep()
    keep['a'][: len(keep['a']) // 3] = False
    assert getattr(slim(net, found, keep).norm, attribute) == value
