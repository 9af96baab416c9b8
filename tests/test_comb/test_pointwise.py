"""Element-wise operations with broadcasting, reductions, softmax and in-place writes."""

from __future__ import annotations

import math
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers import Net, rows
from tests.toys import Toy, check_toy, pooled

IMAGE = ((2, 3, 4, 4),)
PATTERN = torch.linspace(0, 1, 6, dtype=torch.float64)


def conv(function, **parts) -> Toy:
    """Return a toy: conv, some function of its output, conv, classifier. All channels may go."""
    return Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(function(m, m.a(x))).tanh())),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
            **{n: p() for n, p in parts.items()},
        ),
        IMAGE,
        {'a': 6, 'b': 4},
    )


def parameter(*shape: int):
    return lambda: nn.Parameter(torch.empty(shape))


ACTIVATIONS = (
    'relu relu6 gelu silu hardswish mish tanh elu celu selu leaky_relu hardtanh softsign tanhshrink '
    'sigmoid logsigmoid hardsigmoid softplus'
).split()
FREE = {
    **{name: conv(lambda m, x, name=name: getattr(F, name)(x)) for name in ACTIVATIONS},
    'exp': conv(lambda m, x: x.exp()),
    'cosine': conv(lambda m, x: x.cos()),
    'one minus': conv(lambda m, x: 1 - x),
    'power': conv(lambda m, x: x.abs() ** 1.5),
    'reciprocal of something positive': conv(lambda m, x: 1 / (1 + x.square())),
    'clamp': conv(lambda m, x: x.clamp(-0.5, 0.7)),
    'clamp above zero': conv(lambda m, x: x.clamp(min=0.2)),
    'clamp below a bound for each channel': conv(lambda m, x: x.clamp(max=m.top[:, None, None]), top=parameter(6)),
    'clamp between bounds for each channel': conv(
        lambda m, x: x.clamp(-m.top, m.top).sum(1, keepdim=True) * x, top=parameter(6, 1, 1)
    ),
    'where': conv(lambda m, x: torch.where(x > 0.1, x, 0.3 * x - 1)),
    'masked_fill': conv(lambda m, x: x.masked_fill(x < 0, -1.0)),
    'prelu with one slope': conv(lambda m, x: m.act(x), act=lambda: nn.PReLU()),
    'h_sigmoid gate': conv(lambda m, x: x * F.relu6(x + 3) / 6),
    'scalar parameter': conv(lambda m, x: x * m.scale + m.shift, scale=parameter(), shift=parameter(1)),
    'lerp': conv(lambda m, x: torch.lerp(x, x.tanh(), 0.3)),
    'addcmul': conv(lambda m, x: torch.addcmul(x, x.tanh(), x.sigmoid(), value=0.5)),
    'maximum': conv(lambda m, x: torch.maximum(x, x.neg().tanh())),
    'dropout': conv(lambda m, x: F.dropout(x, 0.5, training=False)),
    'cast': conv(lambda m, x: x.to(torch.float64).contiguous(memory_format=torch.channels_last).clone()),
    'in place': conv(lambda m, x: x.relu_().mul_(2).add_(0.5)),
    'in place, added to itself': conv(lambda m, x: x.clone().add_(x.tanh())),
    'in place into a slice of space': conv(lambda m, x: write(x.clone(), (slice(None), slice(None), 0), 1.0)),
    'in place, one part onto another': conv(lambda m, x: write(x.clone(), (..., 0), x[..., 1].tanh())),
    'fresh tensor of the same shape': conv(lambda m, x: torch.zeros_like(x).copy_(x)),
    'a fresh tensor, written in places': conv(lambda m, x: write(torch.zeros_like(x), (..., slice(0, 2)), x[..., 2:])),
    'softmax over space': conv(lambda m, x: x * x.flatten(2).softmax(-1).view_as(x)),
    'sum of the channels': conv(lambda m, x: x * x.sum(1, keepdim=True)),
    'norm of the channels': conv(lambda m, x: x * x.norm(dim=1, keepdim=True)),
    'broadcast from one channel': conv(lambda m, x: x * m.one(x).sigmoid(), one=lambda: nn.Conv2d(6, 1, 1)),
    'stochastic depth in eval': conv(lambda m, x: x + x.tanh() * x.new_ones(len(x), 1, 1, 1)),
}


def write(x, place, value):
    x[place] = value
    return x


LIVE = {  # function of the channels that notices when one is gone, and that masking takes over those that stay
    'mean of the channels': lambda x: x * x.mean(1, keepdim=True),
    'maximum of the channels': lambda x: x * x.amax(1, keepdim=True),
    'max and its index': lambda x: x * x.max(1, keepdim=True).values,
    'minimum of the channels': lambda x: x - x.amin(1, keepdim=True),
    'variance of the channels': lambda x: x * x.var(1, keepdim=True),
    'logsumexp of the channels': lambda x: x * x.logsumexp(1, keepdim=True),
    'softmax of the channels': lambda x: x * x.softmax(1),
    'log_softmax of the channels': lambda x: x * x.log_softmax(1),
    'sum of exponentials': lambda x: x / x.exp().sum(1, keepdim=True),
    'sum of sigmoids': lambda x: x * x.sigmoid().sum(1, keepdim=True),
    'sum after a shift': lambda x: x * (x + 1).sum(1, keepdim=True),
    'sum of what is above a bound for all': (
        lambda x: x * x.clamp(min=torch.full((1,), 0.1, dtype=x.dtype)).sum(1, keepdim=True)
    ),
    'sum of clamped': lambda x: x * x.clamp(min=0.1).sum(1, keepdim=True),
    'mean and variance at once': lambda x: x - torch.var_mean(x, dim=(1, 2), keepdim=True)[1],
    'as many rows as channels': lambda x: x * F.interpolate(x, (6, 6)).mean(2, True).mean(-1, True) * x.mean(1, True),
    'median of the channels': lambda x: x - x.median(1, keepdim=True).values,
    'median of everything but what is no number': lambda x: x - x.log().nanmedian(),
    'smallest and largest of the channels': lambda x: x * sum(torch.aminmax(x, dim=1, keepdim=True)),
    'where all channels are above a bound': lambda x: x * (x > -0.05).all(1, keepdim=True),
    'where any channel is below a bound': lambda x: x * (x.cos() < 0.999).any(1, keepdim=True).add(0.5),
    'how many channels are above a bound': lambda x: x * (x > -0.1).count_nonzero(1)[:, None],
    'whether all is finite': lambda x: x * (2 if x.add(1).isfinite().all() else 1) * (x + 1).mean(1, keepdim=True),
    'product of the channels': lambda x: x * x.prod(1, keepdim=True),
    'mean over everything': lambda x: x - x.mean(),
    'mean over an axis by its other name': lambda x: x - x.mean(axis=-3, keepdim=True),
    'a larger of two beside a largest': lambda x: torch.max(x, other=x.max(1, True)[0] - 1) + torch.max(x, x.tanh()),
    'softmax by a function': lambda x: x * F.softmax(x, dim=1),
    'softmin': lambda x: x * F.softmin(x, 1),
    'norm of sigmoids': lambda x: x * x.sigmoid().norm(dim=1, keepdim=True),
    'norm by a function, its order by number': lambda x: x * torch.norm(x.sigmoid(), 1, 1, True),
    'norm of a vector': lambda x: x * torch.linalg.vector_norm(x.sigmoid(), 3, (1, 2), True),
    'norm of torch.linalg': lambda x: x * torch.linalg.norm(x.exp(), dim=1, keepdim=True),
    'norm whose input has a name': lambda x: x * torch.linalg.vector_norm(x=x.exp(), dim=1, keepdim=True),
    'softmax whose input has a name': lambda x: x * torch.softmax(dim=1, input=x),
    'norm over everything': lambda x: x * x.sigmoid().norm(),
    'unit length': lambda x: x + F.normalize(x.sigmoid()),
    'unit length in another order': lambda x: x + F.normalize(x.exp(), 1.0, 1),
    'unit length over two dimensions': lambda x: x + F.normalize(x.sigmoid(), dim=(1, 2)),
    'smallest norm': lambda x: x * torch.linalg.vector_norm(x, -math.inf, 1, True),
    'norm of a negative order': lambda x: x * (x + 0.1).norm(-1, 1, True),
    'unit length by a negative order': lambda x: x + F.normalize(x + 0.1, -1.0),
    'positions of the largest so far': lambda x: x * x.relu().cummax(3).indices.to(x).sum(1, keepdim=True),
    'positions of medians': lambda x: x * x.relu().median(3, True).indices.to(x).sum(1, keepdim=True),
    'mean of numbers': lambda x: x * x.exp().nanmean(1, keepdim=True),
}
FROZEN = {  # function of the channels that notices when one is gone -> the reason
    'cumulated channels': (lambda x: x.cumsum(1), 'cumsum over channels'),
    'sorted channels': (lambda x: x.sort(1).values, 'sort over channels'),
    'best channels': (lambda x: x * x.topk(3, 1).values.sum(1, keepdim=True), 'topk over channels'),
    'sum of a fixed pattern': (lambda x: x * PATTERN[:, None, None], 'mul with channels that no layer produces'),
    'added to a fixed pattern': (
        lambda x: x + PATTERN[:, None, None].repeat(1, 4, 4),
        'add with channels that no layer produces',
    ),
    'reversed into itself': (lambda x: x[:, [5, 4, 3, 2, 1, 0]], 'picked by a fixed index'),
    'one channel for all': (lambda x: x * x[:, 2:3], ''),
    'one channel by number': (lambda x: x * x.select(1, 2)[:, None], 'picked by a fixed index'),
}  # fmt: skip


class Gate(nn.Module):
    """Squeeze and excitation, whose sigmoid of a removed channel is a half."""

    def __init__(self, act=torch.sigmoid):
        super().__init__()
        self.down, self.up, self.act = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 6, 1), act

    def forward(self, x):
        return x * self.act(self.up(self.down(x.mean((2, 3), keepdim=True)).tanh()))


def gated(act) -> Toy:
    toy = conv(lambda m, x: m.gate(x), gate=lambda: Gate(act))
    toy.groups = {'a': 6, 'gate.down': 5, 'b': 4}
    toy.members = {
        'a': {
            'a.weight:0': rows(6),
            'a.bias:0': rows(6),
            'gate.down.weight:1': rows(6),
            'gate.up.weight:0': rows(6),
            'gate.up.bias:0': rows(6),
            'b.weight:1': rows(6),
        }
    }
    return toy


def coupled(function, left: str = 'a', right: str = 'other') -> Toy:
    """Return a toy: two convolutions of the same input meet in a function of two arguments."""
    return Toy(
        lambda: Net(
            lambda m, x: m.fc(pooled(m.b(function(m.a(x), m.other(x))).tanh())),
            a=nn.Conv2d(3, 6, 1),
            other=nn.Conv2d(3, 6, 1, bias=False),
            b=nn.Conv2d(6, 4, 3),
            fc=nn.Linear(4, 2),
        ),
        IMAGE,
        {'a': 6, 'b': 4},
        {'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'other.weight:0': rows(6), 'b.weight:1': rows(6)}},
    )


COUPLED = {
    'add': operator.add,
    'subtract': operator.sub,
    'multiply': operator.mul,
    'divide by something positive': lambda x, y: x / (1 + y.square()),
    'minimum': torch.minimum,
    'atan2': lambda x, y: torch.atan2(x, y + 3),
    'where': lambda x, y: torch.where(x > y, x, y.tanh()),
    'add in place': lambda x, y: x.add_(y, alpha=2),
    'multiply in place': lambda x, y: x.mul_(y.sigmoid()),
    'broadcast': lambda x, y: x + y.mean((2, 3), keepdim=True),
    'stacked and added': lambda x, y: torch.stack([x, y]).sum(0),
    'stacked behind and weighted': lambda x, y: torch.stack([x, y], -1) @ torch.tensor([0.3, 0.7], dtype=x.dtype),
    'one is fused over space': lambda x, y: x * y.flatten(2).softmax(-1).amax(-1)[..., None, None],
}


@pytest.mark.parametrize('name', FREE)
def test_a_function_of_each_channel_alone_is_free(name):
    toy = FREE[name]
    if 'one channel' in name:
        toy.groups = {'a': 6, 'b': 4}
    check_toy(toy)


@pytest.mark.parametrize('name', FROZEN)
def test_a_function_that_notices_a_missing_channel_freezes(name):
    function, reason = FROZEN[name]
    toy = conv(lambda m, x: function(x))
    toy.groups, toy.frozen = {'b': 4}, {'a.weight:0': reason}
    if name == 'one channel for all':  # the slice does not say which channel it is once others are gone
        toy.trial = True
    check_toy(toy)


@pytest.mark.parametrize('name', LIVE)
def test_a_statistic_over_channels_is_one_over_those_that_stay(name):
    check_toy(conv(lambda m, x: LIVE[name](x)))


@pytest.mark.parametrize('name', COUPLED)
def test_what_meets_is_coupled(name):
    check_toy(coupled(COUPLED[name]))


@pytest.mark.parametrize('act', [torch.sigmoid, F.hardsigmoid, lambda x: F.relu6(x + 3) / 6, torch.tanh])
def test_gates(act):
    check_toy(gated(act))


def test_layer_scale_and_position_are_free_members():
    def build():
        return Net(
            lambda m, x: m.fc((m.stem(x) + m.position + m.scale * m.down(m.up(m.stem(x)).tanh())).tanh().mean(1)),
            stem=nn.Linear(3, 6),
            up=nn.Linear(6, 8),
            down=nn.Linear(8, 6),
            fc=nn.Linear(6, 2),
            position=nn.Parameter(torch.empty(1, 5, 6)),
            scale=nn.Parameter(torch.empty(6)),
        )

    stem = {f'{n}:0': rows(6) for n in ('stem.weight', 'stem.bias', 'scale', 'down.weight', 'down.bias')}
    stem |= {'position:2': rows(6), 'up.weight:1': rows(6), 'fc.weight:1': rows(6)}
    toy = Toy(
        build,
        ((2, 5, 3),),
        {'stem': 6, 'up': 8},
        {'stem': stem},
        {'position:1': 'add with channels that no layer produces'},
    )
    _, found = check_toy(toy)
    roles = {m.tensor: m.role for m in found.group('stem').members}
    assert roles == {
        'stem.weight': 'out',
        'stem.bias': 'out',
        'scale': 'free',
        'position': 'free',
        'down.weight': 'out',
        'down.bias': 'out',
        'up.weight': 'in',
        'fc.weight': 'in',
    }


def test_a_class_token_is_a_free_member():
    def build():
        return Net(
            lambda m, x: m.fc(torch.cat([m.token.expand(len(x), -1, -1), m.stem(x)], 1).tanh().cumsum(1)[:, -1]),
            stem=nn.Linear(3, 6),
            fc=nn.Linear(6, 2),
            token=nn.Parameter(torch.empty(1, 1, 6)),
        )

    stem = {'stem.weight:0': rows(6), 'stem.bias:0': rows(6), 'token:2': rows(6), 'fc.weight:1': rows(6)}
    check_toy(Toy(build, ((2, 5, 3),), {'stem': 6}, {'stem': stem}))


def test_a_slope_for_each_channel():
    toy = conv(lambda m, x: m.act(x), act=lambda: nn.PReLU(6))
    toy.members = {'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'act.weight:0': rows(6), 'b.weight:1': rows(6)}}
    check_toy(toy)


def test_a_parameter_beside_one_channel_of_an_activation():
    toy = conv(lambda m, x: x * m.scale[:, None, None] + m.shift, scale=parameter(6), shift=parameter(1, 6, 1, 1))
    toy.members = {
        'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'scale:0': rows(6), 'shift:1': rows(6), 'b.weight:1': rows(6)}
    }
    check_toy(toy)


def test_a_statistic_inside_another_function_freezes():
    """Only the outermost function can be taken over the channels that stay, and this one hides its norms."""
    toy = conv(lambda m, x: x * F.cosine_similarity(x.sigmoid(), x.exp())[:, None])
    toy.groups, toy.frozen = {'b': 4}, {'a.weight:0': 'linalg_vector_norm over channels'}
    check_toy(toy)


def test_dividing_by_what_masking_makes_zero_is_found_by_the_trial():
    toy = coupled(lambda x, y: x / y.square())
    toy.groups, toy.members, toy.trial = {'b': 4}, {}, True
    toy.frozen = {'a.weight:0': 'a trial failed'}
    check_toy(toy)


def test_a_view_of_what_no_longer_vanishes_is_found_by_the_trial():
    def run(m, x):
        x = m.a(x)
        gate = m.gate(pooled(x))
        gate.detach().sigmoid_()
        return m.fc(pooled(m.b(x * (gate @ gate.t()).mean())))

    toy = Toy(
        lambda: Net(run, a=nn.Conv2d(3, 6, 1), gate=nn.Linear(6, 5), b=nn.Conv2d(6, 4, 3), fc=nn.Linear(4, 2)),
        IMAGE,
        {'a': 6, 'b': 4},
        frozen={'gate.weight:0': 'a trial failed'},
        trial=True,
    )
    check_toy(toy)
