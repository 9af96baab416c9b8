"""Nets that a refit is tried on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim.trial import random_keep
from tests.helpers import randomise_, sample

IMAGES = sample((6, 3, 8, 8))


class Block(nn.Module):
    """A stem, a block that ends in a sum by way of a norm, a bias-free convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.bn2 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.last, self.fc = nn.Conv2d(8, 6, 3, bias=False), nn.Linear(6, 4)

    def forward(self, x):
        x = self.bn0(self.stem(x)).tanh()
        out = self.bn2(self.conv2(self.bn1(self.conv1(x)).tanh()))
        out += x
        return self.fc(self.last(out.tanh()).relu().mean((2, 3)))


class Attention(nn.Module):
    """torch's attention and an MLP around sums of tokens."""

    def __init__(self):
        super().__init__()
        self.embed, self.att = nn.Conv2d(3, 12, 2, 2), nn.MultiheadAttention(12, 2, batch_first=True)
        self.n1, self.n2, self.up, self.down = nn.LayerNorm(12), nn.LayerNorm(12), nn.Linear(12, 16), nn.Linear(16, 12)
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        x = self.embed(x).flatten(2).mT
        y = self.n1(x)
        x = x + self.att(y, y, y)[0]
        return self.fc((x + self.down(self.up(self.n2(x)).tanh())).mean(1))


class Kinds(nn.Module):
    """Every other kind of layer, padding in the forward, a layer that is called twice, and parts of one weight."""

    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.grouped, self.shared = nn.Conv2d(8, 8, 3, groups=2, padding=1), nn.Conv2d(8, 8, 1)
        self.up, self.line = nn.ConvTranspose2d(8, 6, 2, 2), nn.Conv1d(6, 6, 3)
        self.kv, self.fc = nn.Linear(6, 10), nn.Linear(5, 4)

    def forward(self, x):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.stem.weight, self.stem.bias).tanh()
        x = self.grouped(self.depth(x).tanh()).tanh()
        x = self.shared(self.shared(x).tanh()).tanh()
        x = self.line(self.up(x).tanh().flatten(2)).tanh().mT
        k, v = self.kv.weight.chunk(2)
        return self.fc((F.linear(x, k, self.kv.bias[:5]).tanh() * F.linear(x, v, self.kv.bias[5:]).tanh()).mean(1))


MODELS = {'block': Block, 'attention': Attention, 'kinds': Kinds}


def combed(build, seed=0):
    torch.manual_seed(seed)
    model = randomise_(build())
    coupling = comb(model, IMAGES[:1])
    return model, coupling, random_keep(coupling, 0.6, 1)
