"""Scopes of configs under both families of distribution names, and processes without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE

from mmcpd.engine import compat


@pytest.fixture
def scopes(monkeypatch):
    """MMEngine's own table, put back afterwards."""
    original = {**MODULE2PACKAGE, 'mmseg': 'mmsegmentation'}
    original.pop('mmcpd', None)
    monkeypatch.setattr(compat, 'MODULE2PACKAGE', original)
    return original


def test_a_scope_without_its_distribution_becomes_its_module(scopes, monkeypatch):
    monkeypatch.setattr(compat, 'installed', lambda names: None)
    compat.mend_scopes()
    assert scopes['mmseg'] == 'mmseg'
    assert scopes['mmcpd'] == 'mmcpd'
    assert scopes['mmaction'] == 'mmaction2'  # not installed here at all: MMEngine's message stays right


def test_a_scope_with_its_distribution_stays(scopes, monkeypatch):
    monkeypatch.setattr(compat, 'installed', lambda names: (names[0], '1.2.2'))
    compat.mend_scopes()
    assert scopes['mmseg'] == 'mmsegmentation'


@pytest.mark.parametrize('base', ['mmseg::_base_/models/fcn_r50-d8.py', 'mmpretrain::_base_/models/resnet18.py'])
def test_configs_of_both_packages_can_be_inherited(tmp_path, base):
    compat.mend_scopes()
    file = tmp_path / 'config.py'
    file.write_text(f'_base_ = {base!r}\n')
    assert Config.fromfile(file).model.backbone.type.startswith('ResNet')


def test_one_process_joins_nothing():
    cfg = Config({'launcher': 'none'})
    compat.start_processes(cfg)
    assert 'model_wrapper_cfg' not in cfg


def test_a_cluster_launcher_needs_an_accelerator(monkeypatch):
    monkeypatch.setattr(compat, 'get_device', lambda: 'cpu')
    with pytest.raises(ValueError, match='--launcher slurm needs an accelerator'):
        compat.start_processes(Config({'launcher': 'slurm'}))


def test_two_processes_on_a_cpu_use_gloo_and_no_device(monkeypatch):
    joined = []
    monkeypatch.setattr(compat, 'get_device', lambda: 'cpu')
    monkeypatch.setattr(compat.torch.distributed, 'init_process_group', joined.append)
    cfg = Config({'launcher': 'pytorch', 'find_unused_parameters': True})
    compat.start_processes(cfg)
    assert joined == ['gloo']
    assert cfg.model_wrapper_cfg == {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': True,
        'device_ids': None,
    }


@pytest.mark.parametrize('status', [0, 3])
def test_a_process_of_a_gloo_group_leaves_without_finalisation(tmp_path, status):
    script = (
        'import atexit, torch.distributed as dist\n'
        'from mmcpd.engine.compat import leave\n'
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1)\n"
        'class Late:\n'
        '    def __del__(self): print("finalised")\n'
        'late = Late()\n'
        'atexit.register(print, "handled")\n'
        f'leave({status})\n'
    )
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if not line.startswith('[Gloo]')]  # torch 2.9 tells of its peers
    assert (done.returncode, said) == (status, ['handled']), done.stderr


def test_a_process_alone_leaves_as_always():
    with pytest.raises(SystemExit) as error:
        compat.leave(3)
    assert error.value.code == 3


NEW_TRANSFORMERS = r"""
import importlib.metadata, sys
real = importlib.metadata.version, importlib.metadata.distribution
class Found(importlib.metadata.Distribution):
    def read_text(self, filename):
        return 'Name: transformers\nVersion: 5.1.0\n' if filename == 'METADATA' else None
    def locate_file(self, path):
        return path
importlib.metadata.distribution = lambda name: Found() if name == 'transformers' else real[1](name)
importlib.metadata.version = lambda name: '5.1.0' if name == 'transformers' else real[0](name)
"""


def run_beside_new_transformers(code):
    """Run code where transformers 5.1 is installed, whose modules lack what MMPretrain imports."""
    done = subprocess.run([sys.executable, '-c', NEW_TRANSFORMERS + code], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_transformers_that_are_too_new_leave_classifiers_as_they_are():
    pytest.importorskip('pycocotools', reason='without pycocotools MMPretrain has no multimodal models')
    code, said = run_beside_new_transformers('import mmpretrain.models')
    assert code == 1 and "No module named 'transformers'" in said, 'MMPretrain no longer asks for them'
    code, said = run_beside_new_transformers(
        'import mmcpd.engine\n'
        'from mmpretrain.registry import MODELS\n'
        "assert MODELS.build(dict(type='ResNet', depth=18)).depth == 18\n"
        "MODELS.build(dict(type='BlipCaption'))"
    )
    assert 'transformers 5.1.0 is too new for the multimodal models of mmpretrain: they are left out' in said
    assert code == 1 and said.rstrip().splitlines()[-1].startswith('ImportError: ')
    assert 'requires extra multi-modal dependencies' in said
