"""The report: everything in one folder when all is well, and nothing there when it is not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from mmcpd.deploy import DeployError, deploy, exported


def net(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4))


@pytest.fixture
def models():
    torch.manual_seed(0)
    return {'dense': net(16), 'slim': net(4)}


BATCHES = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 2)]


def test_it_writes_files_and_figures(tmp_path, models):
    out = tmp_path / 'out'
    made = deploy(models, BATCHES, out, runs=5, threads=1, facts={'config': 'a.py', 'seed': 0})
    assert sorted(p.name for p in out.iterdir()) == ['dense.onnx', 'latency.json', 'slim.onnx']
    content = json.loads((out / 'latency.json').read_text())
    assert [m['params'] for m in content['models']] == [16 * 27 + 16 + 68, 4 * 27 + 4 + 20]
    assert [m['bytes'] for m in content['models']] == [(out / f'{n}.onnx').stat().st_size for n in models]
    assert [m['name'] for m in content['latency']] == ['dense', 'slim']
    assert content['latency'][0]['n'] == 5
    assert content['facts'].items() >= {'config': 'a.py', 'seed': 0, 'opset': 18, 'shape': [[1, 3, 8, 8]]}.items()
    assert {'torch', 'onnx', 'onnxruntime', 'mmcpd', 'cpu', 'cores', 'date'} <= content['facts'].keys()
    text = str(made)
    assert content['facts']['cpu'] in text
    assert '1 threads, 5 paired runs; ratio to dense' in text
    rows = [line.split() for line in text.splitlines()[-2:]]
    assert [row[:2] for row in rows] == [['dense', '516'], ['slim', '132']]
    assert rows[0][7] == '1.000'


def test_without_runs_there_are_no_times(tmp_path, models):
    made = deploy(models, BATCHES, tmp_path, opset=17, runs=0)
    assert made.latency == ()
    assert 'median' not in str(made)
    assert json.loads((tmp_path / 'latency.json').read_text())['latency'] == []


def test_a_wrong_file_is_never_delivered(tmp_path, models, monkeypatch):
    right = exported.export_onnx
    strange = net(4)

    def wrong(model, *args, **options):
        return right(strange if model is models['slim'] else model, *args, **options)

    monkeypatch.setattr(exported, 'export_onnx', wrong)
    with pytest.raises(DeployError, match=r'^slim: the ONNX file is not what the model computes .*batch of 3: '):
        deploy(models, BATCHES, tmp_path, opset=17, runs=3)
    assert not list(tmp_path.iterdir())


def test_nothing_to_deploy_is_an_error(tmp_path, models):
    with pytest.raises(ValueError, match='0 models'):
        deploy({}, BATCHES, tmp_path)
    with pytest.raises(ValueError, match='0 batches'):
        deploy(models, [], tmp_path)
