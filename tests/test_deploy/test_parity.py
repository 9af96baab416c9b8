"""Parity says when it means nothing, and counts labels by their share."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.deploy import check_parity, deploy, export_onnx


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5))


def silent(bias: float) -> nn.Module:
    """A net whose last layer has weights of zero."""
    model = net()
    nn.init.zeros_(model[-1].weight)
    nn.init.constant_(model[-1].bias, bias)
    model[-1].bias.data[0] *= 2  # constant, yet not the same for each class
    return model


BATCHES = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 1)]


@pytest.mark.parametrize('bias', [0.0, 3.0])
def test_a_comparison_of_constants_says_that_it_means_nothing(tmp_path, bias):
    made = deploy({'silent': silent(bias), 'live': net()}, BATCHES, tmp_path, opset=17, runs=0)
    silent_one, live = (model.parity for model in made.models)
    assert silent_one.ok and silent_one.constant and 'means nothing' in str(silent_one)
    assert live.ok and not live.constant and 'means nothing' not in str(live)
    lines = [line for line in str(made).splitlines() if 'means nothing' in line]
    assert [line.split(':')[0] for line in lines] == ['silent']


def test_one_picture_twice_does_not_make_a_model_constant(tmp_path):
    model = net()
    path = export_onnx(model, BATCHES[0], tmp_path / 'net.onnx', 17)
    picture = BATCHES[0][:1]
    assert not check_parity(path, model, [picture, picture]).constant
    path = export_onnx(silent(0.0), BATCHES[0], tmp_path / 'silent.onnx', 17)
    assert check_parity(path, silent(0.0), picture).constant


class Labels(nn.Module):
    """Return the sign of each pixel, with this share of them turned."""

    def __init__(self, turned: float) -> None:
        super().__init__()
        self.register_buffer('turned', torch.arange(10_000).view(1, 100, 100) < turned * 10_000)

    def forward(self, x):
        return ((x[:, 0] >= 0).long() + self.turned.long()) % 2


@pytest.mark.parametrize(('turned', 'ok'), [(0.0, True), (0.0005, True), (0.01, False)])
def test_labels_differ_by_their_share(tmp_path, turned, ok):
    pictures = torch.randn(2, 1, 100, 100, generator=torch.Generator().manual_seed(0))
    path = export_onnx(Labels(turned), pictures, tmp_path / 'labels.onnx', 17)
    parity = check_parity(path, Labels(0.0), pictures)
    assert parity.ok == ok and parity.max_rel == pytest.approx(turned) and not parity.constant
