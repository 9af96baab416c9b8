"""tools/deploy.py: from a slim checkpoint to two ONNX files and a measurement, or one clear line."""

from __future__ import annotations

import json

import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from torch import nn
from torch.utils.data import Dataset

from mmcpd.comb import comb
from mmcpd.engine.build import build_dense
from mmcpd.engine.examples import example_inputs
from mmcpd.engine.slim_file import save_slim
from mmcpd.slim import slim, structure


@pytest.fixture
def checkpoint(tiny):
    """The path of a slim checkpoint that keeps half of each group."""
    torch.manual_seed(1)
    cfg = Config.fromfile(tiny)
    dense = build_dense(cfg)
    coupling = comb(dense, example_inputs(cfg, build_dense(cfg)))
    keep = coupling.keep()
    for units in keep.values():
        units[len(units) // 2 :] = False
    small = slim(dense, coupling, keep)
    path = tiny.parent / 'run' / 'slim.pth'
    save_slim(path, small, structure(dense, small), {})
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_it_exports_checks_and_measures_on_test_data(tool, tiny, checkpoint):
    code, out, err = tool('deploy', tiny, checkpoint, '--runs', 4, '--threads', 1)
    assert code == 0, err
    assert names(checkpoint.parent) == ['dense.onnx', 'latency.json', 'slim.onnx', 'slim.pth']
    content = json.loads((checkpoint.parent / 'latency.json').read_text())
    dense, small = content['models']
    assert small['params'] < 0.5 * dense['params']
    assert [len(m['parity']['batches']) for m in content['models']] == [3, 3]
    assert [size for size, _ in small['parity']['batches']] == [1, 3, 4]
    assert [(entry['n'], entry['threads']) for entry in content['latency']] == [(4, 1), (4, 1)]
    assert content['facts']['inputs'] == 'test data (mmcpd.DigitsDataset)'
    assert content['facts']['dense_weights'] == 'initial, seed 0'
    assert 'ratio to dense' in out
    assert '4/4 rounds' in err


def test_options_reach_the_files(tool, tiny, checkpoint):
    dense = build_dense(Config.fromfile(tiny))
    torch.save({'state_dict': dense.state_dict()}, checkpoint.with_name('dense.pth'))
    arguments = '--static --batch 2 --opset 17 --shape 48 40 --no-bench --random-input'.split()
    code, out, err = tool('deploy', tiny, checkpoint, '--out', 'there/small.onnx', *arguments)
    assert code == 0, err
    folder = tiny.parent / 'there'
    assert names(folder) == ['dense.onnx', 'latency.json', 'small.onnx']
    content = json.loads((folder / 'latency.json').read_text())
    assert content['latency'] == []
    assert content['facts']['dense_weights'].endswith('dense.pth')
    written = onnx.load(folder / 'small.onnx')
    shape = written.graph.input[0].type.tensor_type.shape
    assert [entry.dim_value for entry in shape.dim] == [2, 3, 48, 40]
    assert written.opset_import[0].version == 17
    assert 'normal noise' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--cfg-options', 'model.head.num_classes=7'], 'another model'),
        (['--runs', '0'], '--runs must be 1 or more, not 0'),
        (['--threads', '-1'], '--threads must be 1 or more, not -1'),
        (['--out', 'x/dense.onnx'], 'choose another name'),
        (['--out', 'x/dense-int8.onnx'], 'choose another name'),
        (['--dense', 'nowhere.pth'], 'no checkpoint nowhere.pth'),
        (['--out', '/proc/x'], 'cannot write'),
        (['--opset', '99'], 'opset 99: torch and the installed onnx'),
        (['--opset', '0'], 'opset 0: torch and the installed onnx'),
        (['--shape', '0', '32'], '--shape must be 1 or more, not [0, 32]'),
        (['--time-limit', '0'], '--time-limit must be above 0'),
        (
            [
                '--cfg-options',
                'test_dataloader.dataset.type=CustomDataset',
                'test_dataloader.dataset.data_root=nowhere',
            ],
            'or add --random-input',
        ),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tool, tiny, checkpoint, arguments, message):
    code, _, err = tool('deploy', tiny, checkpoint, *arguments)
    assert code == 1
    (line,) = err.strip().splitlines()
    assert message in line
    assert names(checkpoint.parent) == ['slim.pth']
    assert names(tiny.parent) == ['run', 'tiny.py']


def test_damaged_and_missing_checkpoints_are_named(tool, tiny, checkpoint):
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    assert 'truncated' in tool('deploy', tiny, checkpoint)[2]
    code, _, err = tool('deploy', tiny, checkpoint.with_name('no.pth'))
    assert code == 1
    assert 'no checkpoint' in err


class Pairs(Dataset):
    """Pictures and labels in tuples, as torch's own data sets have them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3, 16, 16), index / 8), index % 4


class Tutorial(BaseModel):
    """A model of no package; without a default for its labels only its own loops can call it."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 16, 3), nn.Linear(16, 4)

    def forward(self, imgs, labels, mode):
        scores = self.fc(self.conv(imgs).relu().mean((2, 3)))
        return (scores, labels) if mode == 'predict' else scores


class Deployable(Tutorial):
    def forward(self, imgs, labels=None, mode='loss'):
        return super().forward(imgs, labels, mode)


@pytest.mark.parametrize('kind', [Tutorial, Deployable])
def test_a_model_of_no_package_is_deployed_or_told_what_it_lacks(tool, tmp_path, kind):
    torch.manual_seed(0)
    small = kind()
    small.conv, small.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)
    save_slim(tmp_path / 'slim.pth', small, structure(kind(), small), {})
    MODELS.register_module(name='ofNoPackage', module=kind, force=True)
    DATASETS.register_module(name='Pairs', module=Pairs, force=True)
    config = tmp_path / 'own.py'
    config.write_text(
        "model, loader = dict(type='ofNoPackage'), dict(type='default_collate')\n"
        "test_dataloader = dict(dataset=dict(type='Pairs'), batch_size=2, collate_fn=loader)\n"
    )
    code, _, err = tool('deploy', config, tmp_path / 'slim.pth', '--runs', 1, '--threads', 1, '--out', tmp_path / 'out')
    if kind is Deployable:
        assert code == 0, err
        assert [
            size
            for size, _ in json.loads((tmp_path / 'out' / 'latency.json').read_text())['models'][1]['parity']['batches']
        ] == [1, 3, 4]
    else:
        assert code == 1 and err.count('\n') == 1
        assert "forward(pictures, mode='tensor')" in err and "missing 1 required positional argument: 'labels'" in err
        assert not (tmp_path / 'out' / 'slim.onnx').exists()
