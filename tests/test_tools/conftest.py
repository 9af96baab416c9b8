"""Run the tools as users do, in this process, on a ResNet of four channels and a handful of digits."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from mmengine.logging import MMLogger

ROOT = Path(__file__).resolve().parents[2]
TINY = """
_base_ = {root!r} + '/configs/_base_/datasets/digits.py'
default_scope = 'mmpretrain'
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss')),
)
train_dataloader = dict(batch_size=16, dataset=dict(indices=64))
val_dataloader = dict(batch_size=16, dataset=dict(indices=32))
test_dataloader = dict(batch_size=16, dataset=dict(indices=32))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=2, val_interval=2)
val_cfg = dict()
test_cfg = dict()
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1))
randomness = dict(seed=0)
"""
PRUNE = """
_base_ = './tiny.py'
model = dict(
    _delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss', tap='head.fc')]
)
train_cfg = dict(max_epochs=4, val_interval=4)
default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=0.25, end=0.75, interval=2)
)
"""


@pytest.fixture
def tiny(tmp_path) -> Path:
    """The path of a config that trains in a second."""
    file = tmp_path / 'tiny.py'
    file.write_text(TINY.format(root=str(ROOT)))
    return file


@pytest.fixture
def pruning(tiny) -> Path:
    """The path of a config that prunes it to half of its MACs, with distillation."""
    file = tiny.with_name('prune.py')
    file.write_text(PRUNE)
    return file


@pytest.fixture
def tool(monkeypatch, capfd, tmp_path):
    """Give `run(name, *arguments) -> (exit status, stdout, stderr)`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MMLogger, '_instance_dict', {})  # those of other tests write to an output that is closed

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', [f'tools/{name}.py', *map(str, arguments)])
        forget_loggers()  # two runs that begin within one second have one name, and would share a log
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')
        out, err = capfd.readouterr()
        code = stop.value.code
        return code if isinstance(code, int) else int(bool(code)), out, err

    yield run
    forget_loggers()


def forget_loggers() -> None:
    """Close the logs of the runs so far; what is logged next begins a new one."""
    for logger in MMLogger._instance_dict.values():
        for handler in logger.handlers:
            handler.close()
    MMLogger._instance_dict.clear()
