"""Nets that take a gate for each unit, so that autograd can tell what a score should be."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcpd.comb import comb

Gate = dict[str, Tensor]


def gated(x: Tensor, gates: Gate, name: str, dim: int = 1) -> Tensor:
    """Multiply an activation by its gates, (units,) or (N, units), where there are any."""
    if name not in gates:
        return x
    gate = gates[name]
    shape = [1] * x.dim()
    shape[dim] = gate.shape[-1]
    if gate.dim() == 2:
        shape[0] = gate.shape[0]
    return x * gate.reshape(shape)


class ConvBNReLU(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv1': 7, 'conv2': 6}

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 6, 3)
        self.fc = nn.Linear(6 * 4, 4)

    def forward(self, x, gates):
        x = gated(self.bn1(self.conv1(x)).relu(), gates, 'conv1')
        x = gated(self.conv2(x).tanh(), gates, 'conv2')
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Residual(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'stem': 6, 'conv1': 4}

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.conv1, self.bn1, self.conv2 = (
            nn.Conv2d(6, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 1),
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x, gates):
        x = self.bn(self.stem(x)).relu()
        y = self.conv2(gated(self.bn1(self.conv1(gated(x, gates, 'stem'))).relu(), gates, 'conv1'))
        # The stem's unit is one stream: gated where it is read, by conv1 and by the classifier.
        return self.fc(gated((x + y).relu(), gates, 'stem').mean((2, 3)))


class Concat(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'left': 3, 'right': 5}

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, x, gates):
        left, right = gated(self.left(x).relu(), gates, 'left'), gated(self.right(x).relu(), gates, 'right')
        return self.mix(torch.cat([left, right], 1)).mean((2, 3))


class Depthwise(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 6}

    def __init__(self):
        super().__init__()
        self.conv, self.dw = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.bn, self.out = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x, gates):
        return self.out(gated(self.bn(self.dw(self.conv(x).relu())).relu(), gates, 'conv')).mean((2, 3))


class Grouped(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 3}

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 3, groups=3)
        self.out = nn.Conv2d(9, 4, 1)

    def forward(self, x, gates):
        x = self.grouped(self.conv(x).relu()).relu()
        if 'conv' in gates:  # a unit is a whole convolution group: 3 channels of the 9
            x = gated(x, {'conv': gates['conv'].repeat_interleave(3, dim=-1)}, 'conv')
        return self.out(x).mean((2, 3))


class Attention(nn.Module):
    """Two heads of four; the widths of query and value are gated, each the same index in both heads."""

    inputs = (5, 7, 3)
    sites: ClassVar = {'q': 4, 'v': 4}

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8)
        self.proj = nn.Linear(8, 4)
        self.heads, self.scale = 2, 4**-0.5

    def forward(self, x, gates):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, v = gated(q, gates, 'q', -1), gated(v, gates, 'v', -1)
        x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2)).mean(1)


NETS = [ConvBNReLU, Residual, Concat, Depthwise, Grouped, Attention]


def built(cls, seed=0):
    torch.manual_seed(seed)
    net = cls().double()
    x = torch.randn(*cls.inputs, dtype=torch.float64)
    target = torch.randint(4, (cls.inputs[0],))
    coupling = comb(net, (x[:1], {}))
    assert {g.name: g.units for g in coupling.groups} == cls.sites, coupling
    return net.train(), coupling, x, target


def loss_of(net, x, target, gates=None):
    return F.cross_entropy(net(x, gates or {}), target)


def ones(net, *size):
    return {n: torch.ones(*size, u, dtype=torch.float64, requires_grad=True) for n, u in net.sites.items()}


def step(net, x, target):
    net.zero_grad()
    loss_of(net, x, target).backward()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-12, f'{name}: the reference is zero, this compares nothing'
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * float(value.abs().max()), msg=name)
