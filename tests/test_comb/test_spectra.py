"""Bilinear layers, Fourier transforms and complex numbers: channels pass where they are not transformed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import Net, check_structure, randomise_, sample

TOKENS, PICTURES = sample((2, 5, 3)), sample((2, 3, 8, 8))


def two_inputs(bias=True):
    return Net(
        lambda m, x: m.fc(m.both(m.a(x), m.b(x).tanh()).relu()),
        a=nn.Linear(3, 6), b=nn.Linear(3, 5), both=nn.Bilinear(6, 5, 7, bias=bias), fc=nn.Linear(7, 2),
    )  # fmt: skip


@pytest.mark.parametrize('bias', [True, False])
def test_a_bilinear_layer_has_three_widths(bias):
    model = two_inputs(bias)
    found = exact(model, TOKENS, {'a': 6, 'b': 5, 'both': 7})
    small = slim(model, found, random_keep(found, 0.5, 0, awkward=True))
    layer = small.both
    assert (layer.out_features, layer.in1_features, layer.in2_features) == tuple(layer.weight.shape)
    check_structure(model, found, small, lambda: two_inputs(bias))


def test_the_cost_of_a_bilinear_layer_is_its_products():
    found = comb(randomise_(two_inputs()), TOKENS, trial=False)
    assert found.cost(found.keep()).macs == 10 * (3 * 6 + 3 * 5 + 7 * 6 * 5 + 7 * 2)


def test_a_bilinear_layer_of_one_input_couples_both():
    model = Net(
        lambda m, x: m.fc(m.both(y := m.a(x), y)), a=nn.Linear(3, 6), both=nn.Bilinear(6, 6, 4), fc=nn.Linear(4, 2)
    )
    exact(model, TOKENS, {'a': 6, 'both': 4})


def test_what_is_not_zero_where_a_unit_is_removed_meets_columns_that_are():
    model = Net(
        lambda m, x: m.fc(F.bilinear(m.a(x).sigmoid(), m.b(x).cos(), m.both.weight)),
        a=nn.Linear(3, 6), b=nn.Linear(3, 5), both=nn.Bilinear(6, 5, 4, bias=False), fc=nn.Linear(4, 2),
    )  # fmt: skip
    exact(model, TOKENS, {'a': 6, 'b': 5, 'both': 4})


class Filtered(nn.Module):
    """A global filter: the spectrum of each channel times a weight of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)
        self.weight = nn.Parameter(torch.randn(6, 8, 5, 2))

    def forward(self, x):
        spectrum = torch.fft.rfft2(self.conv(x), norm='ortho') * torch.view_as_complex(self.weight.contiguous())
        return self.after(torch.fft.irfft2(spectrum, s=x.shape[-2:], norm='ortho').relu()).mean((2, 3))


PASSING = {
    'mixing tokens': lambda y: torch.fft.fft(y, dim=1).real,
    'magnitude and phase': lambda y: (s := torch.fft.fft2(y)).abs() + s.angle(),
    'shifted': lambda y: torch.fft.ifft2(torch.fft.fftshift(torch.fft.fft2(y), (-2, -1))).real,
    'conjugate': lambda y: torch.fft.ifftn(torch.fft.fftn(y, dim=(2, 3)).conj(), dim=(2, 3)).real,
    'made of two': lambda y: torch.view_as_real(torch.complex(y, y.sin())).sum(-1),
    'correlated': lambda y: torch.fft.irfft2((s := torch.fft.rfft2(y)) * s.conj(), s=y.shape[-2:]),
}  # fmt: skip


def test_a_filter_of_each_channel():
    exact(Filtered(), PICTURES, {'conv': 6})


@pytest.mark.parametrize('name', PASSING)
def test_channels_pass_a_transform_over_other_dimensions(name):
    dims = (0, 2, 3, 1) if name == 'mixing tokens' else (0, 1, 2, 3)

    def run(m, x):
        y = PASSING[name](m.conv(x).permute(dims))
        return m.after(y.permute(0, 3, 1, 2) if name == 'mixing tokens' else y).mean((2, 3))

    exact(Net(run, conv=nn.Conv2d(3, 6, 3, padding=1), after=nn.Conv2d(6, 4, 1)), PICTURES, {'conv': 6})


def test_a_transform_over_channels_freezes_them_with_a_reason():
    model = Net(lambda m, x: m.fc(torch.fft.fft(m.a(x), dim=-1).real), a=nn.Linear(3, 6), fc=nn.Linear(6, 2))
    found = comb(randomise_(model), TOKENS, trial=False)
    assert not found.groups
    assert not found.unsupported
    assert 'a Fourier transform over channels in the model itself' in found.reasons()
