"""Open sizes of pictures, exporters by name, what a file says of itself, and a line while an export runs."""

from __future__ import annotations

import io
import json
import time

import onnx
import pytest
import torch
from torch import nn

from mmcpd.deploy import DeployError, Exporter, check_parity, deploy, export_onnx, read_metadata
from mmcpd.deploy import waiting as module
from mmcpd.deploy.onnx import HAS_NEW_EXPORTER
from mmcpd.deploy.waiting import waiting
from mmcpd.progress import ProgressLine

BATCHES = [torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]


class Dense(nn.Module):
    """Predict each pixel at half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.head(self.conv(x).relu())


class Positions(Dense):
    """Add a table of positions, so that pictures have one size."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 8, 8))

    def forward(self, x):
        return self.head(self.conv(x) + self.table)


class Baked(Dense):
    """Write the picture's size into the graph, without a word where TorchScript traces it."""

    def forward(self, x):
        return super().forward(x) * float(x.shape[-1])


@pytest.mark.parametrize('exporter', [each for each in Exporter if HAS_NEW_EXPORTER or each is Exporter.TORCHSCRIPT])
def test_each_exporter_leaves_height_and_width_open(tmp_path, exporter):
    torch.manual_seed(0)
    model, sizes = Dense(), [torch.randn(1, 3, 48, 32), torch.randn(3, 3, 16, 64)]
    path = export_onnx(model, BATCHES[0], tmp_path / 'a.onnx', 18, dynamic_size=True, exporter=exporter)
    assert check_parity(path, model, [*BATCHES, *sizes]).ok
    fixed = export_onnx(model, BATCHES[0], tmp_path / 'b.onnx', 18, exporter=exporter)
    assert check_parity(fixed, model, BATCHES).ok
    assert not check_parity(fixed, model, sizes).ok
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [bool(dim.dim_param) for dim in shape] == [True, False, True, True]
    producers = {Exporter.TORCH_EXPORT: 'torch.export', Exporter.TORCHSCRIPT: 'TorchScript'}
    made = deploy({'dense': model}, BATCHES, tmp_path, runs=0, exporter=exporter, dynamic_size=True)
    assert made.facts['exporter'] == producers[exporter] and len(made.models[0].parity.batches) == 3


class OnlyTraced(Dense):
    """Compute with the picture's shape as a tensor, as mmdet's Deformable DETR does: torch.export refuses that."""

    def forward(self, x):
        return super().forward(x) / torch._shape_as_tensor(x)[2:].prod()


@pytest.mark.skipif(not HAS_NEW_EXPORTER, reason='there is one exporter')
def test_what_torch_export_refuses_is_traced_and_that_is_said(tmp_path):
    """All models of a report by one exporter, whichever of them is refused."""
    for number, models in enumerate(
        [{'dense': OnlyTraced(), 'slim': Dense()}, {'dense': Dense(), 'slim': OnlyTraced()}]
    ):
        made = deploy(models, BATCHES, tmp_path / f'{number}', runs=0, dynamic_size=True)
        assert made.facts['exporter'] == 'TorchScript'
        assert {producer(tmp_path / f'{number}' / f'{name}.onnx') for name in models} == {'TorchScript'}
        assert str(made).endswith('torch.export cannot write these models, TorchScript can')
    plain = deploy({'dense': Dense()}, BATCHES, tmp_path / 'plain', runs=0)
    assert plain.facts['exporter'] == producer(tmp_path / 'plain' / 'dense.onnx') == 'torch.export'
    assert 'cannot' not in str(plain)


def producer(path):
    """Tell the exporters' files apart: TorchScript's names nodes by modules."""
    return 'TorchScript' if any(node.name.startswith('/') for node in onnx.load(path).graph.node) else 'torch.export'


@pytest.mark.skipif(not HAS_NEW_EXPORTER, reason='there is one exporter')
def test_an_exporter_that_is_asked_for_is_the_only_one(tmp_path):
    with pytest.raises(DeployError, match='torch cannot export OnlyTraced') as error:
        deploy({'dense': OnlyTraced()}, BATCHES, tmp_path, runs=0, exporter=Exporter.TORCH_EXPORT)
    assert 'By TorchScript' not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', [Positions, Baked])
def test_a_model_of_one_size_is_found_out(tmp_path, kind):
    torch.manual_seed(0)
    deploy({'fixed': kind()}, BATCHES, tmp_path / 'ok', opset=17, runs=0)
    with pytest.raises(DeployError, match='size'):
        deploy({'fixed': kind()}, BATCHES, tmp_path / 'no', opset=17, runs=0, dynamic_size=True)
    assert not list((tmp_path / 'no').iterdir())


def test_a_file_says_what_it_is_in_json(tmp_path):
    model, facts = Dense(), {'classes': ['a', 'b'], 'input': {'size': None}}
    deploy({'one': model, 'two': model}, BATCHES, tmp_path, opset=17, runs=0, metadata={'one': facts})
    found = read_metadata(tmp_path / 'one.onnx')
    assert found.items() >= facts.items() and found['mmcpd']
    assert read_metadata(tmp_path / 'two.onnx').keys() == {'mmcpd'}
    entries = {entry.key: entry.value for entry in onnx.load(tmp_path / 'one.onnx').metadata_props}
    assert json.loads(entries['classes']) == ['a', 'b']
    bare = onnx.load(tmp_path / 'one.onnx')
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / 'bare.onnx')
    with pytest.raises(ValueError, match='mmcpd did not write it'):
        read_metadata(tmp_path / 'bare.onnx')


def test_what_takes_long_says_so(tmp_path, monkeypatch):
    stages = []

    def stage(what):
        stages.append(what)
        return waiting(what)

    deploy({'net': Dense()}, BATCHES, tmp_path, opset=17, runs=0, waiting=stage, calibration=BATCHES)
    assert stages == ['exporting net', 'quantising net']
    monkeypatch.setattr(module, 'TICK', 0.01)
    stream = io.StringIO()
    with waiting('', ProgressLine('exporting net', 'seconds', stream, every=0)):
        time.sleep(0.2)
    lines = stream.getvalue().splitlines()
    assert (
        len(lines) > 1
        and lines[0] == 'exporting net: 0 seconds'
        and lines[-1] == 'exporting net: 1/1 seconds, 0:00 left'
    )
    stream = io.StringIO()
    with pytest.raises(KeyError), waiting('', ProgressLine('short', 'seconds', stream, every=9)):
        raise KeyError
    assert stream.getvalue() == ''
