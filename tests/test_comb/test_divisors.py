"""Scales, variances and periods that a forward divides by: masking leaves them, for a layer before them is masked."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.slim import mask_
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import randomise_, sample


class Scaled(nn.Module):
    """A linear layer, something with a vector for each of its channels, and a classifier."""

    def __init__(self, function):
        super().__init__()
        self.a, self.fc, self.function = nn.Linear(3, 8), nn.Linear(8, 2), function
        self.scale, self.other = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
        self.register_buffer('variance', torch.ones(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self, self.a(x).tanh()))


def positive(model: nn.Module) -> nn.Module:
    """Draw all weights at random; what is divided by lies about one."""
    randomise_(model)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.numel() == max(tensor.shape):
                tensor.abs_().add_(0.5)
    return model.double()


DIVIDED = {
    'by a parameter': lambda m, x: x / m.scale,
    'by a buffer': lambda m, x: x / m.variance,
    'by a standard deviation': lambda m, x: x / m.variance.sqrt() * m.other,
    'times a reciprocal': lambda m, x: x * m.scale.reciprocal(),
    'times a root of one': lambda m, x: x * m.variance.rsqrt(),
    'times a negative power': lambda m, x: x * m.scale**-1.5,
    'times a logarithm': lambda m, x: x * m.scale.log(),
    'times an angle': lambda m, x: x * (3 / m.scale).cos(),
    'by one in a new shape': lambda m, x: (x[:, None] / m.variance[0][None, None].expand(2, 1, -1)).mean(1),
    'in place': lambda m, x: x.clone().div_(m.scale),
    'by a batch norm without epsilon': lambda m, x: F.batch_norm(
        x.flatten(0, 1), torch.zeros_like(m.scale), m.variance[0], m.scale, eps=0.0
    ).unflatten(0, (2, 5)),
    'twice': lambda m, x: x / m.scale / m.variance - x / m.scale,
}


@pytest.mark.parametrize('name', DIVIDED)
def test_what_is_divided_by_follows(name):
    exact(positive(Scaled(DIVIDED[name])), sample((2, 5, 3)), {'a': 8})


def test_a_scale_that_is_not_zero_is_not_taken_for_zero_elsewhere():
    """The product of `sigmoid` and the scale would be zero where masked if the scale were; its mean tells."""
    model = positive(Scaled(lambda m, x: x / m.scale + (x.sigmoid() * m.scale).mean(-1, keepdim=True)))
    found = exact(model, sample((2, 5, 3)), {'a': 8})
    assert found.fixes.statistics, 'the mean is one over the kept channels'


UNDEFINED = {
    'a product of two': lambda m, x: x / (m.scale * m.other),
    'activations': lambda m, x: x / x.abs(),
    'activations and a vector': lambda m, x: x / (x.abs() + m.scale),
}


@pytest.mark.parametrize('name', UNDEFINED)
def test_what_stays_zero_freezes(name):
    found = comb(positive(Scaled(UNDEFINED[name])), sample((2, 5, 3)))
    assert not found.groups
    assert any('as if something divided by them' in reason for reason in found.reasons())


def test_masking_leaves_what_is_divided_by_and_gradients_are_numbers():
    model = positive(Scaled(DIVIDED['by a parameter']))
    x = sample((2, 5, 3))
    found = comb(model, x)
    keep, before = random_keep(found, 0.5, 0), model.scale.detach().clone()
    mask_(model, found, keep)
    assert torch.equal(model.scale, before)
    assert not model.a.bias[~keep['a']].any()
    model(x).sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert not model.scale.grad[~keep['a']].any(), 'no gradient reaches what belongs to a removed unit'


class PlanarRotary(nn.Module):
    """An attention turned by angles of height and width over a buffer of periods."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.proj = nn.Linear(3, 16), nn.Linear(16, 3 * 2 * 8), nn.Linear(16, 4)
        self.register_buffer('periods', 100 ** (torch.arange(2) / 2))

    def angles(self, height: int, width: int) -> Tensor:
        rows, columns = (torch.arange(n).to(self.periods) for n in (height, width))
        places = torch.stack(torch.meshgrid(rows, columns, indexing='ij'), -1).flatten(0, 1)
        return (2 * math.pi * places[:, :, None] / self.periods[None, None]).flatten(1, 2).tile(2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        angles = self.angles(2, tokens // 2)
        q, k, v = self.qkv(self.stem(x)).reshape(batch, tokens, 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(*(self.turned(each, angles) for each in (q, k)), v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))

    def turned(self, x: Tensor, angles: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat((-right, left), -1) * angles.sin()


def test_periods_of_a_planar_rotary_embedding_go_with_their_four_channels():
    exact(positive(PlanarRotary()), sample((2, 6, 3)), {'stem': 16, 'qkv': 2})
