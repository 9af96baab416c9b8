"""Other people's tools train, prune and test with mmcpd, in processes that import nothing of it by themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers import not_beside_lite, without_old_warning

ROOT = Path(__file__).resolve().parents[1]
PRUNE = """
_base_ = './theirs.py'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.{loss}')])
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), interval=2))
"""
SLIM = """
_base_ = './theirs.py'
model = dict(_delete_=True, type='mmcpd.slimmed', model=_base_.model, structure='work_dirs/prune/slim.pth')
"""
LOADER = """
train_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, pin_memory=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='mmcpd.{data}', split='train', indices=64, pipeline={pipeline}{more}),
)
val_dataloader = dict(
    batch_size=8, num_workers=0, persistent_workers=False, pin_memory=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='mmcpd.{data}', split='{test}', indices=16, pipeline={pipeline}{more}),
)
test_dataloader = val_dataloader
val_cfg = dict()
test_cfg = dict()
"""
CLASSIFIER = (
    LOADER.format(data='DigitsDataset', test='test', pipeline="[dict(type='PackInputs')]", more='')
    + """
default_scope = 'mmpretrain'
data_preprocessor = dict(num_classes=10, mean=[79.5] * 3, std=[90.7] * 3)
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss')),
)
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(by_epoch=True, max_epochs=2)
"""
)
SEGMENTOR = (
    LOADER.format(
        data='DigitScenesDataset', test='val', pipeline="[dict(type='PackSegInputs')]", more=', size=(64, 64)'
    )
    + """
default_scope = 'mmseg'
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, size=(64, 64)),
    backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
    decode_head=dict(type='FCNHead', in_channels=64, in_index=3, channels=8, num_convs=1, num_classes=11),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
val_evaluator = test_evaluator = dict(type='IoUMetric')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=16, val_interval=16)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
log_processor = dict(by_epoch=False)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=16))
"""
)
BLAMES = ('not installed', 'Failed to', 'make sure the registry', 'Traceback')


def run(folder: Path, *command: object) -> str:
    """Run Python in a folder that is not the project's, and return what it says."""
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=folder, env=environment, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    assert not [line for line in said.splitlines() if any(blame in line for blame in BLAMES)]
    return said


def tool(package: str, name: str) -> Path:
    """Return a tool that a package ships, and which knows nothing of mmcpd."""
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent / '.mim' / 'tools' / f'{name}.py'
    assert 'mmcpd' not in file.read_text()
    return file


@pytest.mark.parametrize(
    ('package', 'config', 'loss', 'metric'),
    [
        ('mmpretrain', CLASSIFIER, 'KDLoss', 'accuracy/top1'),
        pytest.param('mmseg', SEGMENTOR, 'CWDLoss', 'mIoU', marks=[pytest.mark.slow, not_beside_lite]),
    ],
)
def test_the_tools_of_a_package_prune_by_a_config_of_three_statements(tmp_path, package, config, loss, metric):
    for name, text in (('theirs', config), ('prune', PRUNE.format(loss=loss)), ('slim', SLIM)):
        (tmp_path / f'{name}.py').write_text(text)
    said = run(tmp_path, tool(package, 'train'), 'prune.py')
    assert 'slim / dense' in said
    slim = tmp_path / 'work_dirs' / 'prune' / 'slim.pth'
    assert slim.is_file()
    assert metric in run(tmp_path, tool(package, 'test'), 'slim.py', slim)


def test_mmengine_s_own_runner_finds_every_part_by_its_one_name(tmp_path):
    (tmp_path / 'parts.py').write_text(
        'from mmengine.registry import DATASETS, HOOKS, MODELS\n'
        "for registry, names in ((DATASETS, 'DigitsDataset DigitScenesDataset'), (HOOKS, 'CombHook PruneHook'),\n"
        "                        (MODELS, 'Distiller slimmed SeaFormer LightHead')):\n"
        '    for name in names.split():\n'
        "        print(name, registry.get(f'mmcpd.{name}').__name__ == name)\n"
    )
    assert run(tmp_path, 'parts.py').split().count('True') == 8
    (tmp_path / 'theirs.py').write_text(CLASSIFIER)
    (tmp_path / 'prune.py').write_text(PRUNE.format(loss='KDLoss'))
    (tmp_path / 'run.py').write_text(
        'from mmengine.config import Config\n'
        'from mmengine.runner import Runner\n'
        "cfg = Config.fromfile('prune.py')\n"
        "cfg.work_dir = 'work'\n"
        'Runner.from_cfg(cfg).train()\n'
    )
    assert 'slim / dense' in run(tmp_path, 'run.py')
    assert (tmp_path / 'work' / 'slim.pth').is_file()


def test_a_config_of_mmcpd_can_be_inherited_where_nothing_imported_it(tmp_path):
    (tmp_path / 'heir.py').write_text(
        "_base_ = __import__('mmcpd.engine') and 'mmcpd::cpd/resnet50_prune.py'\n"
        'model = dict(student=dict(backbone=dict(depth=18), head=dict(in_channels=512)))\n'
        'train_cfg = dict(max_epochs=12)\n'
        'train_dataloader = dict(dataset=dict(indices=8))\n'
        'val_dataloader = dict(dataset=dict(indices=8))\n'
        'default_hooks = dict(prune=dict(interval=1))\n'
    )
    assert 'slim / dense' in run(tmp_path, tool('mmpretrain', 'train'), 'heir.py')


def test_every_part_has_one_name(tmp_path):
    (tmp_path / 'parts.py').write_text(
        'import mmcpd.engine\n'
        'from mmengine.registry import DATASETS, HOOKS, MODELS\n'
        'for registry in (DATASETS, HOOKS, MODELS):\n'
        '    print(*(part.__module__ for part in registry.module_dict.values()))\n'
        '    print(*(part.__module__ for part in registry.children["mmcpd"].module_dict.values()))\n'
        'assert MODELS.get("mmcpd.KDLoss").__module__ == "mmcpd.distill.losses"\n'
    )
    modules = without_old_warning(run(tmp_path, 'parts.py')).splitlines()
    roots, nodes = modules[::2], modules[1::2]
    assert all('mmengine' in line and 'mmcpd' not in line for line in roots)
    assert [len(line.split()) for line in nodes] == [3, 3, 10]
