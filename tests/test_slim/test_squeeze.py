"""Channels whose dimension a forward squeezes away where one is left."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import gap, masked, randomise_, sample

X = sample((2, 3, 6, 6))


class Pooled(nn.Module):
    """A convolution whose only kept channel would be squeezed away."""

    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Conv2d(3, 8, 1), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.scaled(F.adaptive_avg_pool2d(self.a(x).relu(), 1)))

    def scaled(self, y):
        raise NotImplementedError


class All(Pooled):
    def scaled(self, y):
        return y.squeeze()


class Named(Pooled):
    def scaled(self, y):
        return y.squeeze(dim=1).flatten(1)


class Several(Pooled):
    def scaled(self, y):
        return y.squeeze((1, 2, 3))


class Space(Pooled):
    def scaled(self, y):
        return y.squeeze(-1).squeeze(dim=-1)


@pytest.mark.parametrize(('kind', 'least'), [(All, 2), (Named, 2), (Several, 2), (Space, 1)])
def test_channels_that_are_squeezed_are_several(kind, least):
    model = randomise_(kind())
    found = comb(model, X)
    assert found.floors['a'] == least
    keep = {'a': torch.arange(8) < least}
    assert gap(masked(model, found, keep)(X), slim(model, found, keep)(X)) < 1e-12
    if least > 1:
        with pytest.raises(ValueError, match=r'leaves 1 of 8 units, and the forward squeezes their dimension'):
            slim(model, found, {'a': torch.arange(8) < 1})
    assert int(random_keep(found, 0.01, 0)['a'].sum()) == least


class Joined(nn.Module):
    """Squeezed with another group beside it: never one channel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 4, 1), nn.Linear(12, 2)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(torch.cat([self.a(x), self.b(x)], 1), 1).squeeze())


def test_two_groups_that_are_squeezed_together_need_no_floor():
    assert comb(randomise_(Joined()), X).floors == {'a': 1, 'b': 1}
