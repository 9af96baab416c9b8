"""Sizes that a call takes from another tensor, or from memory: no number in the source could follow a width."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from tests.helpers import check_cost, check_equal, randomise_, sample

X = sample((2, 3, 4, 4))


class Two(nn.Module):
    """Two layers of one width, beside each other; and a third of one channel."""

    def __init__(self, join):
        super().__init__()
        self.join = join
        self.left, self.right, self.one = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.Conv2d(3, 1, 1)
        self.fc = nn.Conv2d(12, 4, 1)

    def forward(self, x):
        return self.fc(torch.cat(self.join(self.left(x), self.right(x), self.one(x)), 1))


def pooled(x):
    return x.mean((2, 3), keepdim=True)


TOGETHER = {
    'expand_as': lambda a, b, one: (pooled(a).expand_as(b), b),
    'expand_as of fewer dimensions': lambda a, b, one: (a[0, :, :1, :1].expand_as(b), b),
    'view_as': lambda a, b, one: (a.flatten(2).view_as(b), b),
    'reshape_as': lambda a, b, one: (a.flatten(1).reshape_as(other=b), b),
    'broadcast_tensors': lambda a, b, one: torch.broadcast_tensors(pooled(a), b),
    'broadcast_to': lambda a, b, one: (pooled(a).broadcast_to(b.shape), b),
    'written into an empty tensor': lambda a, b, one: (torch.mul(a, b, out=a.new_empty(0)), b),
}
APART = {
    'one value over a width': lambda a, b, one: (a, b * one.expand_as(b)),
    'one value over a width, summed': lambda a, b, one: (a * one.expand_as(b.detach()).sum(1, keepdim=True), b),
    'a keyword': lambda a, b, one: (a, one.expand_as(other=b)),
    'ones': lambda a, b, one: (a, b * b.new_ones(1, 4, 4).expand_as(b)),
    'itself': lambda a, b, one: (a.expand_as(a), b.view_as(b)),
    'broadcast_tensors': lambda a, b, one: (a, b * torch.broadcast_tensors(one, b)[0]),
    'space alone': lambda a, b, one: (a, b + torch.broadcast_tensors(one, b.new_ones(2, 1, 4, 1))[0]),
    'written into an empty tensor': lambda a, b, one: (torch.add(a, 1.0, out=a.new_empty(0)), b),
    'unsqueezed in place': lambda a, b, one: (a.clone().unsqueeze_(0).squeeze_(0), b),
}
COUNT = torch.arange(6.0)[:, None, None]
FROZEN = {
    'positions as many as channels': ({'right'}, lambda a, b, one: (a, b + COUNT.expand_as(b))),
    'a transposed view': ({'left', 'right'}, lambda a, b, one: (a, b.transpose(1, 2).reshape_as(a))),
    'strides': ({'left'}, lambda a, b, one: (a.clone().as_strided_((2, 6, 4, 4), (96, 16, 4, 1)), b)),
    'resized': ({'left'}, lambda a, b, one: (a.clone().resize_(2, 6, 4, 4), b)),
    'resized as another': ({'right'}, lambda a, b, one: (a, b + b.new_zeros(0).resize_as_(b).zero_())),
    'memory of another': ({'left'}, lambda a, b, one: (a.new_empty(0).set_(a.clone()), b)),
}  # fmt: skip


def groups(found):
    return {group.name: group.units for group in found.groups}


@pytest.mark.parametrize('name', TOGETHER)
@pytest.mark.parametrize('trial', [False, True])
def test_two_tensors_of_one_size_keep_one_width(name, trial):
    model = randomise_(Two(TOGETHER[name]))
    found = comb(model, X, trial=trial)
    assert groups(found) == {'left': 6}
    check_equal(model, found)
    check_cost(model, found)


@pytest.mark.parametrize('name', APART)
@pytest.mark.parametrize('trial', [False, True])
def test_what_takes_the_size_of_another_follows_it(name, trial):
    model = randomise_(Two(APART[name]))
    found = comb(model, X, trial=trial)
    assert groups(found) == {'left': 6, 'right': 6}
    check_equal(model, found)


@pytest.mark.parametrize('name', FROZEN)
def test_sizes_that_cannot_follow_freeze_without_a_trial(name):
    lost, join = FROZEN[name]
    model = randomise_(Two(join))
    found = comb(model, X, trial=False)
    assert groups(found).keys() == {'left', 'right'} - lost
    if found.groups:
        check_equal(model, found)
