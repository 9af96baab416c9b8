"""Statistics over channels that are merged with places or samples: masked on inputs of other sizes too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.slim import slim
from tests.helpers import Net, gap, masked, randomise_, sample

X = (2, 3, 4, 4)


def halves(x):
    n, c, h, w = x.shape
    y = x.view(n, 2, -1)
    return ((y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True) + 1e-5).sqrt()).view(n, c, h, w)


def tokens(x):
    n, c, h, w = x.shape
    y = x.flatten(2).mT.flatten(1)  # (N, places * C)
    return (y - y.logsumexp(1, keepdim=True)).view(n, h * w, c).mT.reshape(n, c, h, w)


INSIDE = {
    'a group norm by hand': halves,
    'a layer norm by hand': lambda x: ((y := x.flatten(1)) / (y.std(1, keepdim=True) + 1e-5)).view_as(x),
    'a layer norm of all': lambda x: F.layer_norm(x.flatten(1), (x[0].numel(),)).view_as(x),
    'a softmax over all': lambda x: x.flatten(1).softmax(1).view_as(x) * 9,
    'a mean over samples': lambda x: x - x.flatten(0, 1).mean(0),
    'tokens before channels': tokens,
}


def built(inside):
    torch.manual_seed(0)
    net = Net(lambda m, x: m.out(inside(m.conv(x))), conv=nn.Conv2d(3, 8, 1), out=nn.Conv2d(8, 2, 1))
    return randomise_(net).eval()


@pytest.mark.parametrize('name', INSIDE)
def test_other_sizes_and_batches(name):
    net = built(INSIDE[name])
    coupling = comb(net, sample(X))
    keep = coupling.keep()
    units = len(keep['conv'])
    keep['conv'][: units // 2] = False
    dull, small = masked(net, coupling, keep), slim(net, coupling, keep)
    turned = slim(net, coupling, {'conv': keep['conv'].roll(1)})
    for shape in (X, (2, 3, 6, 8), (5, 3, 4, 4), (3, 3, 2, 5)):
        x = sample(shape)
        assert gap(dull(x), small(x)) < 1e-12, shape
        assert gap(dull(x), turned(x)) > 1e-4, shape


def test_a_width_that_does_not_say_where_the_channels_are_is_refused():
    net = built(INSIDE['a layer norm by hand'])
    coupling = comb(net, sample((2, 3, 1, 1)))  # one place: places and channels cannot be told apart
    keep = coupling.keep()
    keep['conv'][:3] = False
    dull = masked(net, coupling, keep)
    dull(sample((4, 3, 1, 1)))
    with pytest.raises(SlimError, match='goes over 32 positions, and went over 8 channels when the model was combed'):
        dull(sample((4, 3, 2, 2)))


def by_module(m, x):
    return m.norm(x)


def by_function(m, x):
    return F.group_norm(x, x.shape[1])


@pytest.mark.parametrize('norm', [by_module, by_function])
def test_a_group_norm_of_single_channels_couples_none(norm):
    parts = dict(conv=nn.Conv2d(3, 8, 1), out=nn.Conv2d(8, 2, 1))
    parts |= {'norm': nn.GroupNorm(8, 8)} if norm is by_module else {}
    net = randomise_(Net(lambda m, x: m.out(norm(m, m.conv(x)).relu()), **parts)).eval()
    x = sample(X)
    coupling = comb(net, x)
    keep = coupling.keep()
    keep['conv'][:3] = False
    small = slim(net, coupling, keep)
    assert gap(masked(net, coupling, keep)(x), small(x)) < 1e-12 and small.conv.out_channels == 5
    other = slim(net, coupling, {'conv': keep['conv'].roll(1)})
    assert gap(small(x), other(x)) > 1e-3
