"""Statistics over weights, weights viewed as a matrix, constants that are plain tensors, factors by channel."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from mmcpd.comb import comb
from tests.exact import exact
from tests.helpers import Net, randomise_, sample

X, TOKENS, ROWS = sample((2, 3, 8, 8)), sample((2, 5, 3)), sample((4, 3))


class Standardised(nn.Conv2d):
    def forward(self, x):
        mean, std = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return self._conv_forward(x, (self.weight - mean) / (std + 1e-5), self.bias)


class StepByStep(nn.Conv2d):
    def forward(self, x):
        mean = self.weight.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True).mean(dim=3, keepdim=True)
        weight = self.weight - mean
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(x, weight / std, self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    def forward(self, x):
        var, mean = torch.var_mean(self.weight.flatten(1), 1, unbiased=False)
        weight = (self.weight - mean[:, None, None, None]) * (var + 1e-5).rsqrt()[:, None, None, None]
        return self._conv_forward(x, weight * 0.7, self.bias)


class ByBatchNorm(nn.Conv2d):
    """As timm's residual nets have it."""

    def forward(self, x):
        weight = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class ByBatchNormWithGain(nn.Conv2d):
    """As nets without norms of activations have it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain, self.scale = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1)), 0.3

    def forward(self, x):
        rows = self.weight.reshape(1, self.out_channels, -1)
        gain = (self.gain * self.scale).view(-1)
        weight = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6)
        return self._conv_forward(x, weight.reshape_as(self.weight), self.bias)


class Demodulated(nn.Conv2d):
    """Weights over the root of their squares, as generators have them."""

    def forward(self, x):
        norm = (self.weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        return self._conv_forward(x, self.weight / norm, self.bias)


@pytest.mark.parametrize('kind', [Standardised, StepByStep, Scaled, ByBatchNorm, ByBatchNormWithGain, Demodulated])
def test_statistics_over_the_inputs_of_a_weight(kind):
    parts = {'a': nn.Conv2d(3, 6, 3, padding=1), 'b': kind(6, 8, 3, padding=1), 'c': nn.Conv2d(8, 2, 1)}
    exact(Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), **parts), X, {'a': 6, 'b': 8})


class StandardisedLinear(nn.Linear):
    def forward(self, x):
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight / (self.weight.std(1, keepdim=True) + 1e-5), self.bias)


def test_statistics_over_the_inputs_of_a_linear_layer():
    model = Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=nn.Linear(3, 6), b=StandardisedLinear(6, 8), c=nn.Linear(8, 2))
    exact(model, TOKENS, {'a': 6, 'b': 8})


@pytest.mark.parametrize('norm', [spectral_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize('kind', ['conv', 'linear'])
def test_spectral_norm(norm, kind):
    if kind == 'conv':
        parts = {'a': nn.Conv2d(3, 6, 3), 'b': norm(nn.Conv2d(6, 8, 3)), 'c': nn.Conv2d(8, 2, 1)}
    else:
        parts = {'a': nn.Linear(3, 6), 'b': norm(nn.Linear(6, 8)), 'c': nn.Linear(8, 2)}
    model = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), **parts)
    found = comb(randomise_(model), X if kind == 'conv' else TOKENS, trial=False)
    name = 'b' if norm is spectral_norm else 'b.parametrizations.weight'
    exact(model, X if kind == 'conv' else TOKENS, {'a': 6, name: 8})
    assert not found.unsupported


@pytest.mark.parametrize('norm', [weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings('ignore:.*weight_norm.* is deprecated')
@pytest.mark.parametrize('kind', ['conv', 'linear', 'two'])
def test_weight_norm(norm, kind):
    if kind == 'linear':
        parts = {'a': nn.Linear(3, 6), 'b': norm(nn.Linear(6, 8)), 'c': nn.Linear(8, 2)}
    else:
        first = norm(nn.Conv2d(3, 6, 3)) if kind == 'two' else nn.Conv2d(3, 6, 3)
        parts = {'a': first, 'b': norm(nn.Conv2d(6, 8, 3)), 'c': nn.Conv2d(8, 2, 1)}
    model = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), **parts)
    inputs = TOKENS if kind == 'linear' else X
    found = comb(randomise_(model), inputs, trial=False)
    assert sorted(group.units for group in found.groups) == [6, 8] and not found.unsupported
    exact(model, inputs, {group.name: group.units for group in found.groups})
    assert not [frozen for frozen in comb(model, inputs).frozen if 'trial' in frozen.reason]


class Steered(nn.Linear):
    """A weight norm of what is computed from a parameter."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.scale = nn.Parameter(torch.ones(outputs, 1))

    def forward(self, x):
        return F.linear(x, torch._weight_norm(self.weight.flip(0), self.scale, 0))


def test_a_weight_norm_of_other_rows_freezes_them():
    model = Net(lambda m, x: m.c(m.b(m.a(x)).relu()), a=nn.Linear(3, 6), b=Steered(6, 8), c=nn.Linear(8, 2))
    found = comb(randomise_(model), TOKENS, trial=False, unused='leave')
    assert any('a weight norm divides by the norm of a unit' in why for why in found.reasons())


class Splines(nn.Module):
    """A layer of functions on edges: a table of basis functions for each input, weights seen as a matrix."""

    def __init__(self, inputs: int, outputs: int, basis: int = 4) -> None:
        super().__init__()
        self.outputs = outputs
        self.spline, self.base = nn.Parameter(torch.rand(outputs, inputs, basis)), nn.Linear(inputs, outputs)
        self.scaler = nn.Parameter(torch.rand(outputs, inputs))
        self.register_buffer('grid', torch.linspace(-1, 1, basis).expand(inputs, -1).contiguous())

    def forward(self, x):
        basis = torch.exp(-((x.unsqueeze(-1) - self.grid) ** 2))
        weight = (self.spline * self.scaler.unsqueeze(-1)).view(self.outputs, -1)
        return self.base(F.silu(x)) + F.linear(basis.view(x.size(0), -1), weight)


class Harmonics(Splines):
    def forward(self, x):
        basis = torch.cos(x[..., None] * (1 + torch.arange(4)))
        return torch.einsum('big,oig->bo', basis, self.spline)


@pytest.mark.parametrize('kind', [Splines, Harmonics])
def test_functions_on_edges(kind):
    model = Net(lambda m, x: m.c(m.b(m.a(x))), a=kind(3, 6), b=kind(6, 5), c=kind(5, 2))
    found = comb(randomise_(model), ROWS, trial=False)
    exact(model, ROWS, {group.name: units for group, units in zip(found.groups, (6, 5), strict=True)})


class Dynamic(nn.Module):
    """Two slopes and two offsets for each channel, worked out from the pooled picture."""

    def __init__(self, channels: int, k: int = 2) -> None:
        super().__init__()
        self.channels, self.k = channels, k
        self.fc = nn.Linear(channels, 2 * k * channels)

    def forward(self, x):
        theta = self.fc(x.mean((2, 3))).view(-1, self.channels, 2 * self.k).sigmoid()
        out = x[..., None] * theta[:, :, None, None, : self.k] + theta[:, :, None, None, self.k :]
        return out.max(-1)[0]


class Affine(nn.Module):
    """A scale and an offset for each channel, for each picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, 2 * channels)

    def forward(self, x):
        scale, offset = self.fc(x.mean((2, 3))).view(x.size(0), x.size(1), 2, 1, 1).unbind(2)
        return x * scale + offset


@pytest.mark.parametrize('kind', [Dynamic, Affine])
def test_factors_by_channel_keep_the_channels(kind):
    parts = {'a': nn.Conv2d(3, 6, 3), 'act': kind(6), 'b': nn.Conv2d(6, 2, 1)}
    exact(Net(lambda m, x: m.b(m.act(m.a(x))), **parts), X, {'a': 6})


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)
        self.scales = {'first': torch.rand(8).double()}

    def forward(self, x):
        return self.b(self.a(x) * self.scales['first'])


def test_a_plain_tensor_on_a_module_says_what_to_do():
    model = randomise_(Constants())
    found = comb(model, TOKENS, trial=False)
    assert not found.groups
    reason = 'scales.first is neither a parameter nor a buffer: `register_buffer` lets it be cut'
    assert {f.reason for f in found.frozen if f.tensor == 'a.weight' and f.dim == 0} == {reason}


def test_a_constant_that_meets_no_channels_freezes_nothing():
    model = Net(lambda m, x: m.b(m.a(x) * m.weights[:, None]), a=nn.Linear(3, 8), b=nn.Linear(8, 2))
    model.weights = torch.rand(5).double()
    exact(model, TOKENS, {'a': 8})


def test_of_two_axes_of_activations_in_one_dimension_the_first_stays():
    def outer(m, x):
        return m.c((m.a(x)[:, :, None] * m.b(x)[:, None, :]).flatten(1))

    found = exact(Net(outer, a=nn.Linear(3, 5), b=nn.Linear(3, 4), c=nn.Linear(20, 2)), ROWS, {'b': 4})
    assert any('two axes in one dimension' in f.reason for f in found.frozen if f.tensor == 'a.weight')
