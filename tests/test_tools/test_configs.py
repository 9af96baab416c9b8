"""What ships in configs/cpd: read, listed for mim, and stopped with one line where its data are missing."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from mmengine.config import Config
from mmengine.hub import get_config

from mmcpd.cli.checks import check_hooks
from tests.helpers import config_params

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path.name for path in (ROOT / 'configs' / 'cpd').glob('*.py'))


@pytest.mark.parametrize('name', config_params(CONFIGS))
def test_it_is_read_and_its_options_make_sense(name):
    cfg = Config.fromfile(ROOT / 'configs' / 'cpd' / name)
    check_hooks(cfg)
    assert cfg.model.type == 'mmcpd.Distiller'
    assert cfg.default_hooks.prune.type == 'mmcpd.PruneHook'


def test_mim_lists_every_config():
    listed = yaml.safe_load((ROOT / 'configs' / 'cpd' / 'metafile.yml').read_text())['Models']
    assert sorted(model['Config'] for model in listed) == [f'configs/cpd/{name}' for name in CONFIGS]


def test_other_people_s_configs_can_inherit_ours():
    cfg = get_config('mmcpd::cpd/resnet50_prune.py')
    assert cfg.default_hooks.prune.type == 'mmcpd.PruneHook'


@pytest.mark.parametrize(
    ('name', 'folder', 'layout'),
    [
        ('resnet50_prune_in1k.py', 'data/imagenet', 'data/imagenet/val/<class>/*.JPEG'),
        ('resnet50_prune_cifar10.py', 'data/cifar10', 'data/cifar10/test/<class>/*.png'),
    ],
)
def test_without_its_data_a_config_says_what_is_missing(tool, tmp_path, name, folder, layout):
    code, _, err = tool('train', ROOT / 'configs' / 'cpd' / name)
    assert code == 1
    (line,) = err.strip().splitlines()
    for word in (folder, layout, 'mmcpd::cpd/resnet50_prune.py'):
        assert word in line
    assert not (tmp_path / 'work_dirs').exists()


def test_the_full_scale_config_is_mmpretrain_s_own_with_openmmlab_s_checkpoint():
    cfg = Config.fromfile(ROOT / 'configs' / 'cpd' / 'resnet50_prune_in1k.py')
    base = get_config('mmpretrain::resnet/resnet50_8xb32_in1k.py')
    assert cfg.load_from.startswith('https://download.openmmlab.com/')
    for ours, theirs in (
        (cfg.train_dataloader.dataset, base.train_dataloader.dataset),
        (cfg.model.student, base.model),
        (cfg.optim_wrapper.optimizer, base.optim_wrapper.optimizer),
    ):
        assert {key: ours[key] for key in theirs} == theirs  # ours may add the scope
