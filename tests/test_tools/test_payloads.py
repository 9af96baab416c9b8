"""Every way to hand a file over: what is in it does not run, and the tool says so in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmcpd.engine import reader
from mmcpd.engine.build import build_dense
from mmcpd.errors import SlimError

WORK = 'work_dirs/prune'


class Payload:
    """What an attacker writes: reading it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str, int, bool]]:
        return os.makedirs, (self.folder, 0o777, True)


@pytest.fixture(autouse=True)
def untrusting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, '_trusted', False)


@pytest.fixture
def strange(tmp_path: Path, pruning: Path) -> dict[str, Path]:
    """Files that hold the model's very weights, and a payload: as a checkpoint, and as a slim one."""
    weights = build_dense(Config.fromfile(pruning)).state_dict()
    files = {'dense': tmp_path / 'strange.pth', 'slim': tmp_path / 'strange_slim.pth'}
    payload = Payload(tmp_path / 'ran')
    torch.save({'state_dict': weights, 'meta': {'author': payload}}, files['dense'])
    torch.save({'state_dict': weights, 'structure': '{}', 'version': 2, 'meta': payload}, files['slim'])
    return files


COMMANDS = {
    'test': ('test', '{config}', '{dense}'),
    'test, slim': ('test', '{config}', '{slim}'),
    'slim': ('slim', '{config}', '{dense}'),
    'comb': ('comb', '{config}', '--checkpoint', '{dense}'),
    'prune': ('prune', '{config}', '{dense}', '--target', 'macs=0.5'),
    'prune, slim': ('prune', '{config}', '{slim}', '--target', 'macs=0.5'),
    'deploy': ('deploy', '{config}', '{slim}'),
    'deploy, dense': ('deploy', '{config}', '{dense}', '--dense', '{dense}', '--no-bench'),
    'train, load_from': ('train', '{config}', '--cfg-options', 'load_from={dense}'),
    'train, resume': ('train', '{config}', '--resume', '{dense}'),
    'train, slimmed': ('train', '{slimmed}'),
    'train, teacher': (
        'train', '{config}', '--cfg-options', 'model.teacher.config={plain}', 'model.teacher.checkpoint={dense}',
    ),
    'train, init_cfg': (
        'train', '{plain}', '--cfg-options', 'model.init_cfg.type=Pretrained', 'model.init_cfg.checkpoint={dense}',
    ),
}  # fmt: skip


@pytest.mark.parametrize('way', COMMANDS)
def test_no_tool_runs_what_a_file_holds(way: str, tool: Any, pruning: Path, strange: dict[str, Path]) -> None:
    names = {'config': pruning, 'plain': pruning.with_name('tiny.py'), **strange}
    names['slimmed'] = pruning.with_name('slimmed.py')
    model = f"dict(_delete_=True, type='mmcpd.slimmed', model=_base_.model, structure='{strange['slim']}')"
    names['slimmed'].write_text(f"_base_ = './tiny.py'\nmodel = {model}\n")
    code, _, err = tool(*(word.format(**names) for word in COMMANDS[way]))
    assert code == 1
    assert not pruning.with_name('ran').exists()
    line = err.strip().splitlines()[-1]
    assert 'strange' in line and ('refused' in line or 'holds more than weights' in line), err


def test_the_dense_model_beside_a_slim_one_runs_nothing(
    tool: Any, pruning: Path, strange: dict[str, Path], tmp_path: Path
) -> None:
    code, _, err = tool('train', pruning)
    assert code == 0, err
    (tmp_path / WORK / 'dense.pth').write_bytes(strange['dense'].read_bytes())
    code, _, err = tool('deploy', pruning, tmp_path / WORK / 'slim.pth', '--no-bench')
    assert code == 1 and 'dense.pth is refused: to read it is to run os.makedirs' in err
    assert not (tmp_path / 'ran').exists()


def test_a_strange_last_checkpoint_is_not_resumed(
    tool: Any, pruning: Path, strange: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / WORK).mkdir(parents=True)
    (tmp_path / WORK / 'epoch_1.pth').write_bytes(strange['dense'].read_bytes())
    (tmp_path / WORK / 'last_checkpoint').write_text(str(tmp_path / WORK / 'epoch_1.pth'))
    code, _, _ = tool('train', pruning, '--resume')
    assert code == 1
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('resume', (False, True))
def test_another_package_s_runner_reads_safely_where_a_hook_of_ours_is_in_the_config(
    resume: bool, pruning: Path, strange: dict[str, Path], tmp_path: Path
) -> None:
    cfg = Config.fromfile(pruning)
    cfg.work_dir, cfg.load_from, cfg.resume = str(tmp_path / 'run'), str(strange['dense']), resume
    with pytest.raises(SlimError, match='is refused: to read it is to run os'):
        Runner.from_cfg(cfg).train()
    assert not (tmp_path / 'ran').exists()


def test_a_file_may_be_trusted(tool: Any, pruning: Path, strange: dict[str, Path]) -> None:
    code, _, err = tool('test', pruning, strange['dense'], '--trust-checkpoint')
    assert code == 0, err
    assert pruning.with_name('ran').exists()


def test_a_hook_may_trust_too(pruning: Path, strange: dict[str, Path], tmp_path: Path) -> None:
    cfg = Config.fromfile(pruning)
    cfg.work_dir, cfg.load_from = str(tmp_path / 'run'), str(strange['dense'])
    cfg.default_hooks.prune.trust_checkpoint = True
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.prune.target = {'macs': 0.9}
    Runner.from_cfg(cfg).train()
    assert (tmp_path / 'ran').exists()


def test_the_config_inside_a_checkpoint_is_not_run_when_it_is_resumed(pruning: Path, tmp_path: Path) -> None:
    """`Runner.resume` parses the text `meta['config']` as a Python config, which is to run it."""
    cfg = Config.fromfile(pruning.with_name('tiny.py'))
    cfg.work_dir, cfg.train_cfg.max_epochs, cfg.train_cfg.val_interval = str(tmp_path / 'run'), 1, 1
    Runner.from_cfg(cfg).train()
    file = tmp_path / 'run' / 'epoch_1.pth'
    checkpoint = reader.load(file)
    checkpoint['meta']['config'] = f'import os\nos.makedirs({str(tmp_path / "ran")!r}, exist_ok=True)\n'
    torch.save(checkpoint, file)
    cfg.resume, cfg.load_from, cfg.train_cfg.max_epochs, cfg.experiment_name = True, str(file), 2, 'resumed'
    Runner.from_cfg(cfg).train()
    assert not (tmp_path / 'ran').exists()
    assert (tmp_path / 'run' / 'epoch_2.pth').exists()
