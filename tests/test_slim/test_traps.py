"""Forwards in which a mistake would stay unseen: on small weights, at one size of the input, in one of two masks."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.mask import unmask_statistics_
from mmcpd.slim.trial import random_keep
from tests.helpers import CONTROL, EXACT, Net, check_equal, gap, masked, randomise_, rotated, sample

IMAGE, TOKENS = sample((2, 3, 8, 8)), sample((2, 5, 3))


def conv(inside, outside, **options):
    return nn.Conv2d(inside, outside, 3, padding=1, **options)


def around(middle, width=12):
    """A net around one layer of convolutions."""
    return Net(
        lambda m, x: m.fc(m.last(F.relu(m.middle(F.relu(m.first(x))))).mean((2, 3))),
        first=conv(3, width), middle=middle, last=conv(width, 16), fc=nn.Linear(16, 4),
    )  # fmt: skip


def reasons(found):
    return ' | '.join(found.reasons())


# -- torch's fused encoder ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize('stacked', [False, True])
def test_an_encoder_of_torch_is_masked_and_slimmed_in_plain_eval_mode_too(stacked):
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
    net = Net(
        lambda m, x: m.fc(m.layer(m.stem(x)).tanh().mean(1)),
        stem=nn.Linear(3, 8), fc=nn.Linear(8, 2),
        layer=nn.TransformerEncoder(layer, 2) if stacked else layer,
    )  # fmt: skip
    found = comb(randomise_(net), TOKENS)
    keep = random_keep(found, 0.7, 0)
    other = rotated(found, 'stem', keep)
    twin, small = masked(net, found, keep), slim(net, found, keep)
    with torch.no_grad():
        assert gap(twin(TOKENS), small(TOKENS)) <= EXACT
        assert gap(masked(net, found, other)(TOKENS), small(TOKENS)) > CONTROL
        unmask_statistics_(twin)
        assert not any('forward' in vars(module) for module in twin.modules())


# -- what a trial has to see -------------------------------------------------------------------------------------------
def attention(q, k, v):
    """Divide by a width in a function, whose source belongs to no module."""
    return (q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))).softmax(-1) @ v


ATTENTIONS = [attention]  # where no method names it


class Attention(nn.Module):
    def __init__(self, width=32, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        nn.init.trunc_normal_(self.qkv.weight, std=0.02)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(ATTENTIONS[0](q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('scale', [1.0, 1e-6, 0.0])
def test_a_trial_sees_through_small_weights_and_branches_that_start_at_zero(scale):
    torch.manual_seed(0)
    net = Net(
        lambda m, x: m.fc((m.stem(x) + m.scale * m.block(m.stem(x))).mean(1)),
        stem=nn.Linear(3, 32), block=Attention(), fc=nn.Linear(32, 5), scale=nn.Parameter(torch.full((32,), scale)),
    )  # fmt: skip
    found = comb(net, TOKENS.float())
    assert [group.name for group in found.groups] == ['stem']
    assert 'differs from the masked one' in reasons(found)


def test_a_trial_compares_labels():
    net = Net(
        lambda m, x: m.fc(attention(m.q(x), m.k(x), m.v(x))).argmax(-1),
        q=nn.Linear(3, 8), k=nn.Linear(3, 8), v=nn.Linear(3, 8), fc=nn.Linear(8, 6),
    )  # fmt: skip
    found = comb(randomise_(net), sample((4, 50, 3)) * 9)
    assert not any(group.name == 'q' for group in found.groups)
    assert 'differs from the masked one' in reasons(found)


def test_a_trial_compares_what_a_data_class_holds():
    @dataclass
    class Output:
        features: Tensor

    net = Net(lambda m, x: Output(m.last(m.first(x))), first=conv(3, 12), last=conv(12, 16))
    found = comb(randomise_(net), IMAGE)
    assert [group.name for group in found.groups] == ['first']
    check_equal(net, found)


# -- weights that are made of others -----------------------------------------------------------------------------------
class LowRank(nn.Module):
    def __init__(self, outside, inside):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(outside, 2)), nn.Parameter(torch.randn(2, inside))

    def forward(self, weight):
        return weight + self.a @ self.b


class Gained(nn.Linear):
    """A linear layer that has no weight of its own."""

    def __init__(self, inside, outside):
        super().__init__(inside, outside)
        self.direction = self.weight
        del self.weight
        self.gain = nn.Parameter(torch.ones(outside))

    def forward(self, x):
        return F.linear(x, self.direction * self.gain[:, None], self.bias)


def pruned_by_torch():
    layer = nn.Linear(12, 12)
    prune.l1_unstructured(layer, 'weight', 0.3)
    return layer


def with_low_rank():
    layer = nn.Linear(12, 12)
    parametrize.register_parametrization(layer, 'weight', LowRank(12, 12))
    return layer


@pytest.mark.parametrize('make', [pruned_by_torch, with_low_rank, lambda: Gained(12, 12)])
def test_weights_that_are_made_of_others(make):
    net = nn.Sequential(nn.Linear(3, 12), nn.ReLU(), make(), nn.ReLU(), nn.Linear(12, 4))
    found = comb(randomise_(net), TOKENS)
    assert [group.name.partition('.')[0] for group in found.groups] == ['0', '2']
    small = check_equal(net, found)
    assert small[2](torch.zeros(1, small[0].out_features).double()).shape[1] == small[4].in_features < 12


# -- other inputs than the example -------------------------------------------------------------------------------------
class Gram(nn.Module):
    """Divide by a width times the size of the picture: no number can stand in its place."""

    def __init__(self):
        super().__init__()
        self.conv = conv(12, 12)

    def forward(self, x):
        _, channels, height, width = x.shape
        return self.conv(x) / ((x * x).sum((1, 2, 3), keepdim=True) / (channels * height * width) + 0.1)


class Depthwise(nn.Module):
    """Fold the channels into the batch."""

    def __init__(self):
        super().__init__()
        self.grow, self.one, self.shrink = conv(12, 24), conv(1, 1), conv(24, 12)

    def forward(self, x):
        batch, channels, height, width = x.shape
        y = self.one(self.grow(x).view(batch * channels * 2, 1, height, width))
        return self.shrink(y.view(batch, channels * 2, height, width))


@pytest.mark.parametrize('middle', [Gram, Depthwise])
def test_a_size_that_depends_on_the_input_is_never_a_number_in_the_source(middle):
    net = around(middle())
    found = comb(randomise_(net), IMAGE)
    if middle is Gram:
        assert 'depends on the input too' in reasons(found)
    else:  # -1 in its place is right for every input
        assert {'first', 'middle.grow', 'last'} <= {group.name for group in found.groups}
    assert any(group.name == 'last' for group in found.groups)
    keep = random_keep(found, 0.6, 0)
    twin, small = masked(net, found, keep), slim(net, found, keep)
    for picture in (IMAGE, IMAGE[:1], sample((3, 3, 12, 10))):
        with torch.no_grad():
            assert gap(twin(picture), small(picture)) <= EXACT


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv(12, 12)

    def forward(self, x):
        return self.conv(x) * (2.0 if x.shape[1] < 4 else 1.0)


def test_a_width_that_a_forward_compares_in_size_takes_the_same_branch():
    model = randomise_(around(Branch()))
    found = comb(model, IMAGE)
    assert [group.name for group in found.groups] == ['first', 'middle.conv', 'last']
    check_equal(model, found, ratio=0.2)


# -- what a forward leaves behind --------------------------------------------------------------------------------------
class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.weight = conv(12, 12), None

    def forward(self, x):
        if self.weight is None:
            self.weight = self.conv.weight * 2
        return F.conv2d(x, self.weight, padding=1)


def test_a_weight_that_a_forward_cached_leaves_no_trace():
    inner = around(Cached())
    found = comb(randomise_(inner), IMAGE)
    assert [group.name for group in found.groups] == ['first', 'middle.conv', 'last']
    assert inner.middle.weight is None
    check_equal(inner, found)
    outer = randomise_(Net(lambda m, x: m.inner(m.one(x)), one=conv(3, 3), inner=copy.deepcopy(inner)))
    assert {group.name: group.units for group in comb(outer, IMAGE).groups} == {'one': 3, 'inner.last': 16}


class CachedElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.store = conv(12, 12), SimpleNamespace(weight=None)

    def forward(self, x):
        if self.store.weight is None:
            self.store.weight = self.conv.weight * 2
        return F.conv2d(x, self.store.weight, padding=1)


def test_a_weight_that_is_cached_on_another_object_is_tried():
    inner = around(CachedElsewhere())
    found = comb(randomise_(inner), IMAGE)
    assert [group.name for group in found.groups] == ['last']
    check_equal(inner, found)


def test_a_forward_put_on_an_instance_is_tried():
    net = randomise_(around(conv(12, 12)))
    plain = net.middle.forward
    net.middle.forward = lambda x: plain(x) * 2  # a copy's forward still runs the old module
    found = comb(net, IMAGE)
    assert [group.name for group in found.groups] == ['last']
    check_equal(net, found)


# -- the root mean square ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize('affine', [True, False])
def test_a_root_mean_square_norm_is_over_the_units_that_stay(affine):
    net = Net(
        lambda m, x: m.fc(m.norm(m.stem(x)).tanh().mean(1)),
        stem=nn.Linear(3, 12), norm=nn.RMSNorm(12, elementwise_affine=affine), fc=nn.Linear(12, 4),
    )  # fmt: skip
    found = comb(randomise_(net), TOKENS)
    assert [group.name for group in found.groups] == ['stem']
    small = check_equal(net, found)
    assert small.norm.normalized_shape == (small.stem.out_features,)
