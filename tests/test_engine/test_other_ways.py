"""New-style configs, models of no OpenMMLab package, and OpenMMLab's own tools and scripts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mmcpd.__main__ import main
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.slim_file import read_slim
from mmcpd.slim import restructure_

from .tiny_runs import config

torch.set_num_threads(1)
MODEL = """
from mmpretrain.models import CrossEntropyLoss, GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet

model = dict(
    type=ImageClassifier,
    backbone=dict(type=ResNet, depth=18),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=1000, in_channels=512, loss=dict(type=CrossEntropyLoss), topk=(1, 5)))
"""
NEW_STYLE = """
from mmengine.config import read_base

with read_base():
    from .model import *

from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapper
from mmpretrain.datasets import PackInputs
from mmpretrain.evaluation import Accuracy
from torch.optim import SGD

from mmcpd.datasets import DigitsDataset
from mmcpd.distill import KDLoss
from mmcpd.engine import Distiller, PruneHook

model['backbone'].update(base_channels=8, stem_channels=8)
model['head'].update(num_classes=10, in_channels=64, topk=(1,))
model = dict(type=Distiller, student=model, losses=[dict(type=KDLoss)])
default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=10, mean=[79.5] * 3, std=[90.7] * 3)
train_dataloader = dict(
    batch_size=16, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=DigitsDataset, split='train', indices=64, pipeline=[dict(type=PackInputs)]))
val_dataloader = dict(
    batch_size=16, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=DigitsDataset, split='train', indices=32, pipeline=[dict(type=PackInputs)]))
val_evaluator = dict(type=Accuracy, topk=(1,))
test_dataloader, test_evaluator = val_dataloader, val_evaluator
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.02, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_cfg = test_cfg = dict()
prune = dict(type=PruneHook, target=dict(macs=0.5), begin=4, end=12, interval=2)
default_hooks = dict(prune=prune, checkpoint=dict(type=CheckpointHook, interval=1))
"""


@pytest.fixture(autouse=True)
def scopes():
    yield
    DefaultScope._instance_dict.clear()


def test_a_new_style_config_with_a_base_that_is_not_there_is_one_line(tmp_path, capsys):
    (tmp_path / 'new.py').write_text(NEW_STYLE)
    assert run('comb', tmp_path / 'new.py') == 1
    message = capsys.readouterr().err
    assert message.count('\n') == 1 and 'model.py not found' in message


def run(*words):
    with pytest.raises(SystemExit) as status:
        main([str(word) for word in words])
    return status.value.code


def test_a_new_style_config_works_in_every_tool(tmp_path, capsys):
    (tmp_path / 'model.py').write_text(MODEL)
    new = tmp_path / 'new.py'
    new.write_text(NEW_STYLE)
    work = tmp_path / 'work'
    assert run('comb', new) == 0
    assert '12 groups' in capsys.readouterr().out
    option = 'default_hooks.prune.target.macs=0.6'
    assert run('train', new, '--work-dir', work, '--cfg-options', option) == 0
    meta = read_slim(work / 'slim.pth')['meta']
    assert 0.5 < meta['slim']['macs'] / meta['dense']['macs'] <= 0.6
    assert run('test', new, work / 'slim.pth', '--work-dir', work, '--out', tmp_path / 'metrics.json') == 0
    assert (
        json.loads((tmp_path / 'metrics.json').read_text())['accuracy/top1'] == meta['slim']['metrics']['accuracy/top1']
    )
    assert run('slim', new, work / 'epoch_4.pth', '--out', tmp_path / 'again.pth') == 0
    assert read_slim(tmp_path / 'again.pth')['meta']['slim']['macs'] == meta['slim']['macs']
    assert run('prune', new, work / 'dense.pth', '--pictures', 16, '--out', tmp_path / 'once') == 0
    assert run('deploy', new, work / 'slim.pth', '--out', tmp_path / 'deployed', '--runs', 2) == 0
    assert (tmp_path / 'deployed' / 'slim.onnx').is_file()


class Tutorial(BaseModel):
    """The model of MMEngine's first example: no default of any argument, and no mode 'tensor'."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.norm, self.fc = nn.BatchNorm2d(16), nn.Linear(32, 10)

    def forward(self, imgs, labels, mode):
        x = self.norm(self.conv(imgs)).relu()
        x = self.fc(self.wide(x).relu().mean((2, 3)))
        if mode == 'loss':
            return {'loss': F.cross_entropy(x, labels)}
        if mode == 'predict':
            return x, labels
        return None


class Share(BaseMetric):
    """The share of right answers."""

    def process(self, data_batch, data_samples):
        scores, labels = data_samples
        self.results += (scores.argmax(1) == labels).tolist()

    def compute_metrics(self, results):
        return {'accuracy': 100 * sum(results) / len(results)}


def test_a_model_of_no_package_prunes_with_a_default_hook_alone(tmp_path):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 3, 8, 8), torch.randint(10, (32,)))
    runner = Runner(
        Tutorial(),
        str(tmp_path),
        DataLoader(data, 8),
        DataLoader(data, 8),
        train_cfg=dict(by_epoch=True, max_epochs=3),
        val_cfg={},
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)),
        val_evaluator=dict(type=Share),
        default_hooks=dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=2, end=8, interval=2)),
    )
    runner.train()
    content = read_slim(tmp_path / 'slim.pth')
    assert content['meta']['input_shape'] == [3, 8, 8] and content['meta']['slim']['metrics']
    small = restructure_(Tutorial(), content['structure'])
    small.load_state_dict(content['state_dict'])
    assert small.conv.out_channels < 16 and small.eval()(data.tensors[0], data.tensors[1], 'predict')[0].shape == (
        32,
        10,
    )


def in_a_new_process(code, folder):
    environment = os.environ | {'PYTHONPATH': str(Path(__file__).resolve().parents[2]), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_scripts_and_interfaces_that_never_name_mmcpd(tmp_path):
    """A Runner of one's own trains and tests; mmpretrain's interface builds the slim model from a config."""
    cfg = config(tmp_path / 'run', test_cfg={}, epochs=2, **{'prune.begin': 0, 'prune.end': 4})
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    cfg.dump(str(tmp_path / 'prune.py'))
    runner = 'from mmengine.config import Config; from mmengine.runner import Runner; import sys\n'
    runner += "assert 'mmcpd' not in sys.modules; cfg = Config.fromfile({!r})\n"
    in_a_new_process(runner.format('prune.py') + 'Runner.from_cfg(cfg).train()', tmp_path)
    student = cfg.model.pop('student')
    cfg.model = {'type': 'mmcpd.slimmed', 'model': student, 'structure': str(tmp_path / 'run' / 'slim.pth')}
    cfg.default_hooks.pop('prune')
    cfg.load_from = None
    cfg.dump(str(tmp_path / 'slim.py'))
    found = in_a_new_process(runner.format('slim.py') + 'print(Runner.from_cfg(cfg).test())', tmp_path)
    wanted = read_slim(tmp_path / 'run' / 'slim.pth')['meta']['slim']['metrics']['accuracy/top1']
    assert f"'accuracy/top1': {wanted}" in found
    interface = "from mmpretrain import get_model; print(sum(p.numel() for p in get_model('slim.py').parameters()))"
    small = load_slim(Config.fromfile(tmp_path / 'prune.py'), tmp_path / 'run' / 'slim.pth')
    assert in_a_new_process(interface, tmp_path).split()[-1] == str(sum(p.numel() for p in small.parameters()))
