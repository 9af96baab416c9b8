"""The trial of a rotation runs in float64 where that can be, and in the model's own type elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.example import Example
from mmcpd.rotate import rotate_
from mmcpd.slim.trial import double, in_double, randomised


class OnMps:
    """What a tensor of Apple's GPU does: it has no float64."""

    device = torch.device('mps')

    def __init__(self, values):
        self.values = values

    def double(self):
        raise TypeError('no float64 on this device')

    def cpu(self):
        return self.values


def test_float64_is_reached_over_the_cpu_where_the_device_has_none():
    values = torch.rand(3)
    assert torch.equal(double(OnMps(values)), values.double()) and double(values).dtype == torch.float64


class Single(nn.TransformerEncoderLayer):
    def forward(self, src, *args, **kwargs):
        if src.dtype == torch.float64:
            raise TypeError('no float64 here')
        return super().forward(src, *args, **kwargs)


@pytest.mark.parametrize(('cls', 'dtype'), [(nn.TransformerEncoderLayer, torch.float64), (Single, torch.float32)])
def test_a_model_without_float64_is_tried_in_its_own_type(cls, dtype):
    torch.manual_seed(0)
    model, x = cls(8, 2, 16).eval(), torch.rand(5, 1, 8, requires_grad=True) * 2
    twin, example = in_double(model, Example((x,), lambda net, tokens: net(tokens)))
    assert next(twin.parameters()).dtype == example.inputs[0].dtype == dtype
    assert twin is not model and next(model.parameters()).dtype == torch.float32
    before = model(x)
    assert rotate_(model, x).heads == 2
    assert torch.allclose(model(x), before, atol=1e-5)


def test_no_two_weights_of_a_trial_are_alike():
    """Queries and keys of the same values would hide that one was taken for the other."""
    twin = randomised(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(2000, 600)))
    assert not bool((twin[0].weight == twin[1].weight).any())
    assert len(twin[2].weight.flatten().unique()) > 9e5, 'more values than are drawn, and still they vary'
