"""Export and parity: what is written computes what the model computes, and what does not is found out."""

from __future__ import annotations

from pathlib import Path

import mmseg.models  # noqa: F401 - registers
import numpy as np
import onnx
import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from onnx import numpy_helper
from torch import nn

from mmcpd.deploy import DeployError, check_parity, deploy, export_onnx
from mmcpd.deploy import onnx as module


def test_notes_of_the_exporter_go_from_branches_too(tmp_path):
    node, condition = onnx.helper.make_node('RandomNormal', [], ['y'], shape=[1]), onnx.TensorProto.BOOL
    node.metadata_props.add(key='source', value='jane/net.py')
    out = onnx.helper.make_tensor_value_info('y', onnx.TensorProto.FLOAT, [1])
    branch = onnx.helper.make_graph([node], 'branch', [], [out])
    both = onnx.helper.make_node('If', ['c'], ['y'], then_branch=branch, else_branch=branch)
    graph = onnx.helper.make_graph([both], 'net', [onnx.helper.make_tensor_value_info('c', condition, [1])], [out])
    onnx.save(onnx.helper.make_model(graph), tmp_path / 'x.onnx')
    assert b'jane' in (tmp_path / 'x.onnx').read_bytes()
    assert module.drawing_nodes(tmp_path / 'x.onnx') == ['RandomNormal']
    module._without_traces(tmp_path / 'x.onnx')
    assert b'jane' not in (tmp_path / 'x.onnx').read_bytes()


class Toy(nn.Module):
    """Convolution, batch norm whose statistics matter, dropout that must be off, pooling, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 5)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(self.drop(x.mean((2, 3))))


class Pair(nn.Module):
    """Two inputs and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x, y):
        return {'sum': self.fc(x) + y, 'rest': (torch.sigmoid(y), x * 2)}


class Baked(nn.Module):
    """Compute with the batch size as a Python number, which both exporters bake in silently."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        windows = x.reshape(-1, 2)
        count = int(windows.shape[0] / 2)
        return self.fc(windows.view(count, 4)) * count


class Spectral(nn.Module):
    """Use an operation that ONNX has no counterpart for."""

    def forward(self, x):
        return torch.linalg.eigvals(x).real


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


OPSETS = pytest.mark.parametrize('opset', [17, 18])


def test_each_torch_writes_the_default_opset_by_an_exporter_that_it_has(tmp_path, monkeypatch):
    exporters = []
    export = torch.onnx.export

    def observed(*args, dynamo, **options):
        exporters.append(dynamo)
        assert 'external_data' not in options or dynamo  # torch 2.4 has no such argument
        return export(*args, dynamo=dynamo, **options)

    monkeypatch.setattr(torch.onnx, 'export', observed)
    for has in {module.HAS_NEW_EXPORTER, False}:
        monkeypatch.setattr(module, 'HAS_NEW_EXPORTER', has)
        exporters.clear()
        made = deploy({'toy': Toy()}, [torch.randn(2, 3, 8, 8)], tmp_path, runs=0)
        assert exporters == [has]
        assert f'opset 18 by {"torch.export" if has else "TorchScript"}' in str(made)
        assert made.models[0].parity.ok


@OPSETS
@pytest.mark.parametrize('dynamic', [True, False])
def test_a_file_computes_what_its_model_computes(tmp_path, opset, dynamic):
    model = Toy()
    path = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / 'a' / 'toy.onnx', opset, dynamic)
    sizes = (1, 2, 5) if dynamic else (1, 1)
    parity = check_parity(path, model, [torch.randn(n, 3, 8, 8) for n in sizes])
    assert parity.ok
    assert tuple(n for n, _ in parity.batches) == sizes
    assert parity.max_rel == max(relative for _, relative in parity.batches) < 1e-5
    assert 0 < parity.max_abs < 1e-4
    assert [p.name for p in path.parent.iterdir()] == ['toy.onnx']  # weights inside, nothing left over
    written = onnx.load(path)
    assert [entry.version for entry in written.opset_import if entry.domain == ''] == [opset]
    assert ([x.name for x in written.graph.input], [x.name for x in written.graph.output]) == (['input'], ['output'])
    batch = written.graph.input[0].type.tensor_type.shape.dim[0]
    assert bool(batch.dim_param) == dynamic


@OPSETS
def test_a_perturbed_file_is_found_out(tmp_path, opset):
    model = Toy()
    path = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / 'toy.onnx', opset)
    inputs = torch.randn(3, 3, 8, 8)
    assert check_parity(path, model, inputs).ok
    written = onnx.load(path)
    weights = next(w for w in written.graph.initializer if list(w.dims) in ([5, 8], [8, 5]))
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights) * np.float32(1.01), weights.name))
    onnx.save(written, path)
    parity = check_parity(path, model, inputs)
    assert not parity.ok
    assert 1e-3 < parity.max_rel < 0.1


def test_another_model_is_found_out(tmp_path):
    model = Toy()
    path = export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / 'toy.onnx')
    assert not check_parity(path, Toy(), torch.randn(2, 3, 8, 8)).ok
    wider = Toy()
    wider.fc = nn.Linear(8, 6)
    assert check_parity(path, wider, torch.randn(2, 3, 8, 8)).max_abs == float('inf')  # another shape
    broken = Toy()
    broken.fc.bias.data[0] = float('nan')
    assert not check_parity(path, broken, torch.randn(2, 3, 8, 8)).ok


@OPSETS
def test_a_baked_batch_size_shows_at_another_size_only(tmp_path, opset):
    model = Baked()
    path = export_onnx(model, torch.randn(2, 4), tmp_path / 'baked.onnx', opset)
    assert check_parity(path, model, torch.randn(2, 4)).ok
    parity = check_parity(path, model, [torch.randn(2, 4), torch.randn(3, 4)])
    assert not parity.ok
    assert parity.batches[0][1] < 1e-5 < parity.batches[1][1]


@OPSETS
def test_several_inputs_and_outputs(tmp_path, opset):
    model = Pair()
    inputs = torch.randn(3, 4), torch.randn(3, 3)
    path = export_onnx(model, inputs, tmp_path / 'pair.onnx', opset)
    graph = onnx.load(path).graph
    assert [x.name for x in graph.input] == ['input_0', 'input_1']
    assert [x.name for x in graph.output] == ['output_0', 'output_1', 'output_2']
    assert check_parity(path, model, [inputs, (torch.randn(5, 4), torch.randn(5, 3))]).ok


@OPSETS
def test_a_forward_of_ones_own(tmp_path, opset):
    def forward(model, x):
        return model(x).softmax(1)

    model = Toy()
    path = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / 'toy.onnx', opset, forward=forward)
    x = torch.randn(3, 3, 8, 8)
    assert check_parity(path, model, x, forward).ok
    assert not check_parity(path, model, x).ok


def test_each_module_gets_its_own_mode_back(tmp_path):
    model = Toy()
    model.norm.eval()
    before = {name: m.training for name, m in model.named_modules()}
    path = export_onnx(model, torch.randn(1, 3, 8, 8), tmp_path / 'toy.onnx')
    check_parity(path, model, torch.randn(2, 3, 8, 8))
    assert {name: m.training for name, m in model.named_modules()} == before
    assert before['']
    assert not before['norm']


@OPSETS
def test_a_failed_export_says_why_and_leaves_the_old_file(tmp_path, opset):
    path = tmp_path / 'model.onnx'
    path.write_bytes(b'old')
    with pytest.raises(DeployError, match=f'cannot export Spectral to ONNX at opset {opset}: .+ Try '):
        export_onnx(Spectral(), torch.randn(2, 3, 3), path, opset)
    assert path.read_bytes() == b'old'
    assert list(tmp_path.iterdir()) == [path]


def test_an_opset_that_torch_does_not_write_yet_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx.defs, 'onnx_opset_version', lambda: 99)
    with pytest.raises(DeployError, match=r'wrote opset 18 where 99 was asked for|ONNX at opset 99'):
        export_onnx(Toy(), torch.randn(1, 3, 8, 8), tmp_path / 'toy.onnx', opset=99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('opset', [6, 99])
def test_an_opset_that_nobody_writes_is_refused(tmp_path, opset):
    with pytest.raises(DeployError, match=f'opset {opset}: torch and the installed onnx .+ know 7 to '):
        export_onnx(Toy(), torch.randn(1, 3, 8, 8), tmp_path / 'toy.onnx', opset=opset)
    assert not list(tmp_path.iterdir())


def test_more_than_one_file_can_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'LARGEST', 100)
    with pytest.raises(ValueError, match='less than 2 GB'):
        export_onnx(Toy(), torch.randn(1, 3, 8, 8), tmp_path / 'toy.onnx')


def test_nothing_to_compare_is_an_error(tmp_path):
    with pytest.raises(ValueError, match='no inputs'):
        check_parity(Path('x.onnx'), Toy(), [])


RESNET = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8)
VIT = dict(
    type='VisionTransformer',
    arch=dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48),
    img_size=32,
    patch_size=8,
)
CLASSIFIERS = {
    'resnet18': dict(
        backbone=RESNET,
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=7, in_channels=64),
    ),
    'vit': dict(backbone=VIT, head=dict(type='VisionTransformerClsHead', num_classes=7, in_channels=24)),
}


@OPSETS
@pytest.mark.parametrize('name', CLASSIFIERS)
def test_classifiers_export_their_logits(tmp_path, name, opset):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='ImageClassifier', **CLASSIFIERS[name]))
    model.init_weights()
    path = export_onnx(model, torch.randn(1, 3, 32, 32), tmp_path / 'model.onnx', opset)
    batches = [torch.randn(n, 3, 32, 32) for n in (1, 3, 2)]
    assert check_parity(path, model, batches).ok
    model.eval()
    (got,) = module.open_session(path, 1).run(None, {'input': batches[1].numpy()})
    logits = model.head(model.extract_feat(batches[1])).detach().numpy()
    assert got.shape == (3, 7)
    np.testing.assert_allclose(got, logits, atol=1e-4)
    assert not np.allclose(got.sum(1), 1)  # logits, not scores


@pytest.mark.skipif(not module.HAS_NEW_EXPORTER, reason='the TorchScript exporter pools to factors of a size only')
def test_segmentors_export_logits_at_the_heads_resolution(tmp_path):
    head = dict(
        type='PSPHead', in_channels=64, in_index=3, channels=8, pool_scales=(1, 2, 3), num_classes=5, dropout_ratio=0.1
    )
    backbone = dict(RESNET, type='ResNetV1c', strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), contract_dilation=True)
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(dict(type='EncoderDecoder', backbone=backbone, decode_head=head))
    x = torch.randn(2, 3, 64, 64)
    path = export_onnx(model, x, tmp_path / 'model.onnx')
    assert check_parity(path, model, [x, torch.randn(3, 3, 64, 64)]).ok
    (got,) = module.open_session(path, 1).run(None, {'input': x.numpy()})
    assert got.shape == (2, 5, 8, 8)


@pytest.mark.skipif(not module.HAS_NEW_EXPORTER, reason='TorchScript notes nothing')
def test_a_file_does_not_name_source_files_of_the_machine(tmp_path):
    here = Path(__file__).name.encode()
    pictures, plain = torch.rand(2, 3, 8, 8), tmp_path / 'plain.onnx'
    with module.evaluated(toy := Toy()), module.quiet('torch.onnx', 'onnxscript', 'onnx_ir'):
        torch.onnx.export(toy, (pictures,), plain, opset_version=18, dynamo=True, external_data=False, verbose=False)
    assert here in plain.read_bytes()
    assert here not in export_onnx(toy, pictures, tmp_path / 'ours.onnx', opset=18).read_bytes()
