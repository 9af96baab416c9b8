"""What a killed run or a full disk leaves: training goes on from it, or says in one line why it cannot."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from mmcpd.cli.checks import use_whole_checkpoints
from mmcpd.deploy.onnx import export_onnx
from mmcpd.engine.checkpoint_hook import CheckpointHook as WholeCheckpointHook
from mmcpd.files import WriteError, whole, why_unwritten

ROOT = Path(__file__).resolve().parents[2]


def test_resume_passes_over_a_damaged_checkpoint_and_never_starts_anew(tool, tiny, tmp_path):
    code, out, err = tool('train', tiny, '--cfg-options', 'train_cfg.max_epochs=2')
    assert code == 0, err
    work = tmp_path / 'work_dirs' / 'tiny'
    second = work / 'epoch_2.pth'
    second.write_bytes(second.read_bytes()[:5000])
    code, out, err = tool('train', tiny, '--resume')
    assert code == 0, err
    assert 'epoch_2.pth is truncated' in out + err and 'epoch_1.pth is taken' in out + err
    assert 'Epoch(train) [2]' in out + err and 'Epoch(train) [1]' not in out + err
    for file in work.glob('epoch_*.pth'):
        file.write_bytes(file.read_bytes()[:5000])
    before = sorted(os.listdir(work))
    code, out, err = tool('train', tiny, '--resume')
    lines = [line for line in err.splitlines() if line]
    assert code == 1 and len(lines) == 1, err
    assert 'has checkpoints and none that is whole' in lines[0]
    assert sorted(os.listdir(work)) == before
    (work / 'last_checkpoint').unlink()
    assert tool('train', tiny, '--resume')[0] == 1, 'nor does it where nothing is named'


def test_a_config_that_says_resume_is_one_that_resumes(tool, tiny, tmp_path):
    assert tool('train', tiny, '--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
    (tmp_path / 'work_dirs' / 'tiny' / 'last_checkpoint').unlink()
    code, out, err = tool('train', tiny, '--cfg-options', 'resume=True')
    assert code == 0, err
    assert 'Epoch(train) [2]' in out + err and 'Epoch(train) [1]' not in out + err


def test_our_hook_takes_the_place_of_a_plain_one_only():
    cfg = Config(
        {
            'default_hooks': {'checkpoint': {'type': 'CheckpointHook', 'interval': 3}},
            'custom_hooks': [{'type': 'MyCheckpointHook'}, {'type': 'mmengine.CheckpointHook'}],
        }
    )
    use_whole_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint == {'type': 'mmcpd.CheckpointHook', 'interval': 3}
    assert [hook.type for hook in cfg.custom_hooks] == ['MyCheckpointHook', 'mmcpd.CheckpointHook']
    for hooks in ({}, {'default_hooks': None}, {'default_hooks': {'checkpoint': None}}):
        cfg = Config(hooks)
        use_whole_checkpoints(cfg)
        none = 'checkpoint' in (hooks.get('default_hooks') or {})
        assert (cfg.default_hooks.checkpoint is None) == none


@pytest.mark.parametrize('name', ['groups.json', 'groups.png', 'metrics.json'])
def test_tables_and_pictures_that_do_not_fit_leave_the_old_ones(tool, tiny, tmp_path, monkeypatch, name):
    file = tmp_path / name
    file.write_text('old')

    def full(path, *args, **kwargs) -> None:
        Path(path).write_bytes(b'ha')
        raise OSError(errno.ENOSPC, 'No space left on device')

    if name == 'metrics.json':
        assert tool('train', tiny, '--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
        monkeypatch.setattr('mmengine.dump', lambda _metrics, path, **_: full(path))
        command = ['test', tiny, tmp_path / 'work_dirs/tiny/epoch_1.pth', '--out', file, '--out-item', 'metrics']
    else:
        monkeypatch.setattr('matplotlib.figure.Figure.savefig', lambda _figure, path, **_: full(path))
        monkeypatch.setattr(Path, 'write_text', full)
        command = ['comb', tiny, '--json' if name.endswith('json') else '--plot', file]
    code, _, err = tool(*command)
    assert code == 1
    assert re.search(rf'error: cannot write {name} into {tmp_path}: no space is left \(\d+\.\d MB free\)', err), err
    assert file.read_bytes() == b'old'


def test_a_hook_of_the_users_own_is_left_as_it_is_and_that_is_said(monkeypatch):
    said = []  # whichever logger is the current one
    monkeypatch.setattr('mmcpd.cli.checks.print_log', lambda text, *_: said.append(text))

    @HOOKS.register_module(force=True)
    class OddCheckpointHook(CheckpointHook):
        pass

    @HOOKS.register_module(force=True)
    class GoodCheckpointHook(WholeCheckpointHook):
        pass

    cfg = Config({'default_hooks': {'checkpoint': {'type': 'OddCheckpointHook'}}})
    use_whole_checkpoints(cfg)
    assert cfg.default_hooks.checkpoint.type == 'OddCheckpointHook'
    assert said.pop().startswith('OddCheckpointHook saves the checkpoints: a kill may leave half a one')
    use_whole_checkpoints(Config({'default_hooks': {'checkpoint': {'type': 'GoodCheckpointHook'}}}))
    assert not said


SMALL_DISK = """
import resource, runpy, signal, sys
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ['tools/train.py', *{arguments}]
runpy.run_path({tool!r}, run_name='__main__')
"""


def on_a_small_disk(folder: Path, limit: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    tool = str(ROOT / 'tools' / 'train.py')
    code = SMALL_DISK.format(limit=limit, arguments=[*map(str, arguments)], tool=tool)
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=folder, timeout=300)


@pytest.mark.slow
def test_a_file_that_does_not_fit_ends_training_in_one_line_and_the_old_one_is_whole(tiny, tmp_path):
    work = tmp_path / 'w'
    first = on_a_small_disk(tmp_path, 2**30, tiny, '--work-dir', 'w', '--cfg-options', 'train_cfg.max_epochs=1')
    assert first.returncode == 0, first.stderr[-2000:]
    before = (work / 'epoch_1.pth').read_bytes()
    limit = len(before) // 2
    second = on_a_small_disk(tmp_path, limit, tiny, '--work-dir', 'w', '--resume')
    assert second.returncode == 1
    assert 'Traceback' not in second.stderr
    last = second.stderr.strip().splitlines()[-1]
    assert re.fullmatch(
        r'error: cannot write epoch_2\.pth into \S+/w: the file would be larger than the limit \(\d+\.\d MB free\)\. '
        r'Make room .*; the last whole checkpoint is \S*w/epoch_1\.pth',
        last,
    ), last
    assert (work / 'epoch_1.pth').read_bytes() == before
    assert not list(work.glob('.*unfinished')) and not (work / 'epoch_2.pth').exists()
    third = on_a_small_disk(tmp_path, 2**30, tiny, '--work-dir', 'w', '--resume')
    assert third.returncode == 0 and (work / 'epoch_2.pth').is_file(), third.stderr[-2000:]


def test_torchs_own_error_is_said_too(tmp_path):
    code = f"""
import resource, torch
from pathlib import Path
from mmcpd.files import WriteError, whole
resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
path = Path({str(tmp_path)!r}, 'slim.pth')
path.write_text('old')
try:
    with whole(path) as unfinished:
        torch.save(torch.zeros(10000), unfinished)
except WriteError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert f'cannot write slim.pth into {tmp_path}: ' in result.stdout and len(result.stdout.splitlines()) == 1
    assert (tmp_path / 'slim.pth').read_text() == 'old' and os.listdir(tmp_path) == ['slim.pth']


@pytest.mark.parametrize('name', ['ENOSPC', 'EROFS', 'EDQUOT', 'EACCES', 'EFBIG'])
def test_each_of_a_disks_refusals_is_one_line(tmp_path, name):
    path = tmp_path / 'a.pth'
    path.write_text('old')
    with pytest.raises(WriteError, match=r'cannot write a\.pth into .*MB free') as error, whole(path):
        raise OSError(getattr(errno, name), 'no')
    assert '\n' not in str(error.value) and path.read_text() == 'old'


def test_files_that_appear_together_name_the_one_that_does_not_fit(tmp_path):
    both = whole(tmp_path / 'a.txt'), whole(tmp_path / 'b.txt')
    with pytest.raises(WriteError, match=r'cannot write b\.txt into') as error, both[0] as first, both[1] as second:
        first.write_text('a')
        second.write_text('b')
        raise OSError(errno.ENOSPC, 'no')
    causes = [error.value, error.value.__cause__, error.value.__cause__.__cause__]
    assert [type(cause) for cause in causes] == [WriteError, OSError, type(None)], 'no circle, which has no end'
    assert not os.listdir(tmp_path)


def test_an_export_that_does_not_fit_is_no_fault_of_the_model(tmp_path, monkeypatch):
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('torch.onnx.export', full)
    with pytest.raises(WriteError, match=r'cannot write a\.onnx into .*: no space is left'):
        export_onnx(torch.nn.Linear(2, 2), torch.rand(2, 2), tmp_path / 'a.onnx')


def test_other_errors_stay_what_they_are(tmp_path):
    assert why_unwritten(FileNotFoundError(2, 'no')) is None
    with pytest.raises(RuntimeError, match=r'^a model$') as error, whole(tmp_path / 'a.pth'):
        raise RuntimeError('a model')
    assert type(error.value) is RuntimeError and not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason='root writes everywhere')
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(WriteError, match='permission denied'), whole(tmp_path / 'a.pth') as unfinished:
        unfinished.write_text('new')


def test_the_states_are_in_what_the_tool_writes(tool, tiny, tmp_path):
    assert tool('train', tiny, '--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
    content = torch.load(tmp_path / 'work_dirs' / 'tiny' / 'epoch_1.pth', weights_only=False)
    assert len(content['mmcpd_random']) == 1
