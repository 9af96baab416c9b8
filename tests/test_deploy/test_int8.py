"""Quantised files: small, near, and calibrated on what they were given."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from mmcpd.deploy import DeployError, Scores, WholeForward, check_parity, deploy, export_onnx, read_metadata
from mmcpd.deploy.exported import _pieces
from mmcpd.deploy.int8 import quantize


class Net(nn.Module):
    """Convolutions with a residual sum and channels of very different scales, attention-like product, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(32), nn.Linear(32, 10)
        self.second.weight.data *= torch.logspace(-2, 0, 32)[:, None, None, None]

    def forward(self, x):
        x = self.first(x).relu()
        x = x + self.norm(self.second(x)).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval()


PICTURES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def weights(path):
    return [numpy_helper.to_array(entry) for entry in onnx.load(path).graph.initializer]


@pytest.mark.parametrize('opset', [17, 18])
def test_a_quantised_file_is_small_and_near(tmp_path, model, opset):
    path = export_onnx(model, PICTURES, tmp_path / 'a.onnx', opset, metadata={'classes': ['x']})
    small = quantize(path, tmp_path / 'a-int8.onnx', [PICTURES])
    assert small.stat().st_size < 0.6 * path.stat().st_size
    parity = check_parity(small, model, [PICTURES, PICTURES[:3]])
    assert 1e-4 < parity.max_rel < 0.05 and not parity.ok
    kinds = {node.op_type for node in onnx.load(small).graph.node}
    assert {'QuantizeLinear', 'DequantizeLinear'} <= kinds and 'BatchNormalization' not in kinds
    assert any(array.dtype == np.int8 and array.shape == (32, 32, 3, 3) for array in weights(small))
    assert any(
        array.dtype == np.float32 and array.shape == (32,) for array in weights(small)
    )  # a scale for each channel
    found = read_metadata(small)
    assert found.keys() == {'mmcpd', 'classes', 'int8'} and found['int8'] == {'pictures': 8}
    assert sorted(each.name for each in tmp_path.iterdir()) == ['a-int8.onnx', 'a.onnx']


def test_the_range_is_that_of_the_pictures(tmp_path, model):
    """Control: calibrated on faint pictures, bright ones are cut off."""
    path = export_onnx(model, PICTURES, tmp_path / 'a.onnx', 17)
    good = quantize(path, tmp_path / 'good.onnx', [PICTURES[:4], PICTURES[4:]])
    bad = quantize(path, tmp_path / 'bad.onnx', [PICTURES * 0.1])
    off = [check_parity(each, model, PICTURES).max_rel for each in (good, bad)]
    assert off[1] > 5 * off[0]


def test_deploy_puts_them_beside_the_others_and_measures_them(tmp_path, model):
    forward = WholeForward(lambda net, x: net(x), after=Scores())
    made = deploy(
        {'dense': model},
        [PICTURES[:2]],
        tmp_path,
        17,
        False,
        forward,
        runs=3,
        threads=1,
        calibration=[PICTURES[:1], PICTURES[1:2], PICTURES[2:5]],
    )
    assert [each.file for each in made.models] == ['dense.onnx', 'dense-int8.onnx']
    assert [each.name for each in made.latency] == ['dense', 'dense-int8']
    assert made.models[1].bytes == (tmp_path / 'dense-int8.onnx').stat().st_size < made.models[0].bytes
    assert made.models[1].parity.max_rel > made.models[0].parity.max_rel
    assert read_metadata(tmp_path / 'dense-int8.onnx')['int8'] == {'pictures': 4}  # whole batches of two
    assert 'dense-int8 ' in str(made)


def test_pictures_come_in_batches_of_the_file_whatever_they_are_read_in(tmp_path, model):
    pairs = [(each, each[:, 0]) for each in PICTURES.split(3)]
    (piece,) = _pieces(pairs, 8)
    assert torch.equal(piece[0], PICTURES) and torch.equal(piece[1], PICTURES[:, 0])
    assert [len(each) for each in _pieces(PICTURES.split(3), 2)] == [2] * 4
    options = dict(dynamic_batch=False, runs=0, calibration=PICTURES[:3].split(2))
    with pytest.raises(DeployError, match='3 pictures to calibrate on are less than a batch of 4'):
        deploy({'dense': model}, [PICTURES[:4]], tmp_path, 17, **options)
    assert not any(tmp_path.iterdir())


def test_what_cannot_be_quantised_is_one_line(tmp_path, model):
    path = export_onnx(model, PICTURES, tmp_path / 'a.onnx', 17, dynamic_batch=False)
    with pytest.raises(ValueError, match='no pictures to calibrate on'):
        quantize(path, tmp_path / 'b.onnx', [])
    with pytest.raises(DeployError, match='cannot quantise it: '):
        quantize(path, tmp_path / 'b.onnx', [PICTURES[:3]])
    assert [each.name for each in tmp_path.iterdir()] == ['a.onnx']
