"""The order of memory: what is masked and what is slim has the dense model's, in activations and in weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.layout import gathered, spread
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import masked, randomise_, sample

LAST = torch.channels_last
X = sample((2, 3, 6, 6))
NORMS = {
    'group norm': lambda m, x: m.norm(x),
    'softmax': lambda m, x: x * x.softmax(1),
    'largest': lambda m, x: x - x.amax(1, keepdim=True),
    'layer norm': lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (x.shape[1],)).permute(0, 3, 1, 2),
}


class Laid(nn.Module):
    """A statistic of channels, and then a view that only one order of memory allows."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm, self.out = nn.Conv2d(3, 12, 1), nn.GroupNorm(4, 12), nn.Linear(12 * 36, 5)
        self.of = norm

    def forward(self, x):
        x = self.of(self, self.stem(x).contiguous(memory_format=LAST))
        return self.out(x.permute(0, 2, 3, 1).view(x.shape[0], -1))


@pytest.mark.parametrize('norm', NORMS.values(), ids=list(NORMS))
def test_statistics_keep_the_order_of_memory(norm):
    exact(Laid(norm), X, {'stem': 3 if norm is NORMS['group norm'] else 12})


class Drawn(nn.Module):
    """Random numbers are drawn in the order of memory."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8)
        self.mean, self.out = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        mean = self.mean(self.norm(self.stem(x).contiguous(memory_format=LAST)))
        return mean, self.out(mean + torch.randn_like(mean))


def test_random_numbers_fall_on_the_same_places():
    found = comb(randomise_(Drawn()), X)
    assert {group.name: group.units for group in found.groups} == {'stem': 2}, found.reasons()


def test_weights_keep_theirs():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))).to(memory_format=LAST)
    found = comb(model, X)
    keep = random_keep(found, 0.5, 0)
    small = slim(model, found, keep)
    assert small[0].weight.is_contiguous(memory_format=LAST) and small[2].weight.is_contiguous(memory_format=LAST)
    for net in (model, masked(model, found, keep), small):
        assert net(X).is_contiguous(memory_format=LAST) and not net(X).is_contiguous()


@pytest.mark.parametrize('order', [(0, 1, 2, 3), (0, 2, 3, 1), (3, 1, 0, 2)])
@pytest.mark.parametrize('dim', [1, -1])
def test_positions_are_taken_and_put_back_in_any_order_of_memory(order, dim):
    back = [order.index(d) for d in range(4)]
    x = torch.rand(2, 4, 3, 5).permute(order).contiguous().permute(back)
    kept = torch.tensor([0, 2])
    part = gathered(x, dim, kept)
    assert torch.equal(part, x.index_select(dim, kept))
    assert part.permute(order).is_contiguous()
    whole = spread(part, dim, kept, x.shape[dim])
    assert torch.equal(whole.index_select(dim, kept), part) and whole.stride() == x.stride()
    assert whole.count_nonzero() == part.count_nonzero()


class Encoding(nn.Module):
    """Positions without a weight, the same memory for all samples."""

    def forward(self, x):
        places = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.arange(1, 13, dtype=x.dtype)
        return (places / 7).sin()[None].expand(x.shape[0], -1, -1)


class Encoded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.encoding, self.out = nn.Linear(3, 12), Encoding(), nn.Linear(12, 4)

    def forward(self, x):
        y, places = self.embed(x), self.encoding(x).tanh()
        return self.out(y.view(-1, y.shape[-1]) + places.view(-1, places.shape[-1]))


def test_what_shares_its_memory_is_laid_out_plainly():
    exact(Encoded(), sample((2, 5, 3)), {'embed': 12})
    shared = torch.rand(1, 7, 3).expand(2, -1, -1)
    assert gathered(shared, 2, torch.tensor([0, 2])).is_contiguous()
