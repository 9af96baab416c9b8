"""tools/train.py: OpenMMLab's options, and one clear line on bad input with nothing written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from mmcpd.cli.runner import run
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import check_start
from mmcpd.engine.slim_file import save_slim

ROOT = Path(__file__).resolve().parents[2]


def only_line(err: str) -> str:
    """Return the one line of an error."""
    lines = [line for line in err.strip().splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith('error: ')
    return lines[0]


def test_it_trains_and_goes_on_from_its_checkpoint(tool, tiny, tmp_path):
    code, _, err = tool('train', tiny, '--cfg-options', 'train_cfg.max_epochs=1')
    assert code == 0, err
    work = tmp_path / 'work_dirs' / 'tiny'
    first = torch.load(work / 'epoch_1.pth', weights_only=False)
    code, out, err = tool('train', tiny, '--resume')
    assert code == 0, err
    assert 'Epoch(train) [2]' in out + err
    assert 'Epoch(train) [1]' not in out + err
    second = torch.load(work / 'epoch_2.pth', weights_only=False)
    assert not torch.equal(first['state_dict']['head.fc.weight'], second['state_dict']['head.fc.weight'])
    assert second['meta']['epoch'] == 2


def test_options_reach_the_config(tool, tiny, tmp_path):
    code, _, err = tool(
        'train',
        *(tiny, '--work-dir', 'here', '--seed', 7, '--no-validate', '--auto-scale-lr'),
        *('--cfg-options', 'train_cfg.max_epochs=1', 'auto_scale_lr.base_batch_size=32'),
    )
    assert code == 0, err
    dumped = Config.fromfile(tmp_path / 'here' / 'tiny.py')
    assert dumped.randomness.seed == 7
    assert dumped.auto_scale_lr == dict(base_batch_size=32, enable=True)
    assert dumped.get('val_dataloader') is None
    assert dumped.train_dataloader.persistent_workers is False


def test_resume_without_a_checkpoint_starts_from_load_from(tool, tiny, tmp_path):
    assert tool('train', tiny, '--work-dir', 'a', '--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
    start = tmp_path / 'a' / 'epoch_1.pth'
    code, _, err = tool('train', tiny, '--work-dir', 'b', '--resume', '--cfg-options', f'load_from={start}')
    assert code == 0, err
    (log,) = (tmp_path / 'b').glob('*/*.log')
    assert f'Load checkpoint from {start}' in log.read_text()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.py'], 'none.py: there is no such config'),
        (['{tiny}', '--resume', 'none.pth'], '--resume: there is no checkpoint none.pth'),
        (['{tiny}', '--cfg-options', 'load_from=none.pth'], 'load_from: there is no checkpoint none.pth'),
        (['{tiny}', '--auto-scale-lr'], 'has no auto_scale_lr.base_batch_size'),
        (['{tiny}', '--cfg-options', 'train_cfg.max_epochs.x=1'], '--cfg-options does not fit'),
        (['{tiny}', '--work-dir', '{tiny}/inside'], '--work-dir: cannot write to the folder'),
        (['{tiny}', '--work-dir', '/proc/nothing/here'], '--work-dir: cannot write to the folder'),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(tool, tiny, tmp_path, arguments, message):
    code, _, err = tool('train', *(argument.format(tiny=tiny) for argument in arguments))
    assert code == 1
    assert message in only_line(err)
    assert os.listdir(tmp_path) == ['tiny.py']


def test_a_start_from_another_model_or_half_a_file_is_refused(tool, tiny, tmp_path):
    dense = build_dense(tiny).state_dict()
    new_head = {name: value[:5] if name.startswith('head') else value for name, value in dense.items()}
    other = {name: torch.cat([value, value]) if value.dim() else value for name, value in dense.items()}
    check_start(Config.fromfile(tiny), save(new_head, tmp_path / 'new_head.pth'))
    save(other, tmp_path / 'other.pth')
    save({}, tmp_path / 'half.pth').write_bytes((tmp_path / 'other.pth').read_bytes()[:20000])
    save_slim(tmp_path / 'slim.pth', torch.nn.Linear(1, 1), {}, {})
    for name, message in (
        ('other.pth', 'the first is backbone.conv1.weight, (16, 3, 7, 7) there and (8, 3, 7, 7) here'),
        ('half.pth', 'half.pth is truncated or not a checkpoint'),
        ('slim.pth', "is a slim checkpoint and the config's model is dense"),
    ):
        code, _, err = tool('train', tiny, '--cfg-options', f'load_from={name}')
        assert code == 1
        assert message in only_line(err)
    assert not (tmp_path / 'work_dirs').exists()


def save(weights: dict, path: Path) -> Path:
    torch.save({'state_dict': weights}, path)
    return path


def test_the_hook_is_left_out_by_one_option(tool, pruning, tmp_path):
    options = ('default_hooks.prune=None', 'default_hooks.timer=None', 'train_cfg.max_epochs=1')
    code, _, err = tool('train', pruning, '--work-dir', 'w', '--cfg-options', *options)
    assert code == 0, err
    assert (tmp_path / 'w' / 'epoch_1.pth').is_file() and not (tmp_path / 'w' / 'slim.pth').exists()
    log = next((tmp_path / 'w').glob('*/*.log')).read_text()
    assert 'IterTimerHook' not in log and 'PruneHook' not in log and 'loss_distill' not in log
    assert 'dense' not in {path.stem for path in (tmp_path / 'w').iterdir()}


def test_mixed_precision_without_an_accelerator(tool, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    code, _, err = tool('train', tiny, '--amp')
    assert code == 1
    assert '--amp needs an accelerator' in only_line(err)
    assert os.listdir(tmp_path) == ['tiny.py']


def with_data(tiny: Path, dataset: str) -> Path:
    file = tiny.with_name('data.py')
    file.write_text(f"_base_ = './{tiny.name}'\ntrain_dataloader = dict(dataset=dict(_delete_=True, {dataset}))\n")
    return file


@pytest.mark.parametrize(
    ('dataset', 'words'),
    [
        (
            "type='ImageNet', data_root='data/imagenet', split='train', pipeline=[]",
            ['data/imagenet does not exist', 'data/imagenet/train/<class>/*.JPEG', 'mmcpd::cpd/resnet50_prune.py'],
        ),
        (
            "type='RepeatDataset', times=2, dataset=dict(type='mmseg.ADE20KDataset', data_root='data/ade')",
            ['data/ade does not exist', 'annotations/{training,validation}/*.png'],
        ),
        ("type='Other', data_root='data/other'", ['data/other does not exist', 'data/other/...']),
        (
            "type='Other', data_root='data/o', data_prefix=dict(img_path='im', seg_map_path='seg')",
            ['laid out as data/o/im and data/o/seg'],
        ),
    ],
)
def test_missing_data_names_folder_layout_and_the_embedded_config(tool, tiny, tmp_path, dataset, words):
    code, _, err = tool('train', with_data(tiny, dataset))
    assert code == 1
    for word in words:
        assert word in only_line(err)
    assert sorted(os.listdir(tmp_path)) == ['data.py', 'tiny.py']


def test_a_missing_split_is_missing_data(tool, tiny, tmp_path):
    (tmp_path / 'data/imagenet/val').mkdir(parents=True)
    config = with_data(tiny, "type='ImageNet', data_root='data/imagenet', split='train', pipeline=[]")
    code, _, err = tool('train', config)
    assert code == 1
    assert 'data/imagenet/train does not exist' in only_line(err)


def test_an_error_while_running_is_one_line_and_its_traceback_lies_beside_the_log(tool, tiny, tmp_path):
    code, _, err = tool('train', tiny, '--cfg-options', 'optim_wrapper.optimizer.lr=-1')
    assert code == 1
    last = err.strip().splitlines()[-1]
    assert last.startswith('error: ')
    assert 'Invalid learning rate' in last
    assert 'Traceback' not in err
    (file,) = tmp_path.glob('work_dirs/tiny/*/traceback.txt')
    assert 'Invalid learning rate' in file.read_text()


def test_weights_that_cannot_be_downloaded(tool, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    init = 'model.backbone.init_cfg.type=Pretrained', 'model.backbone.init_cfg.checkpoint=http://127.0.0.1:9/x.pth'
    code, out, err = tool('train', tiny, '--cfg-options', *init)
    assert code == 1
    assert 'http://127.0.0.1:9/x.pth' in out + err
    assert 'error: cannot download the checkpoint above' in err.strip().splitlines()[-1]


def test_debug_shows_the_traceback(tiny):
    command = [sys.executable, str(ROOT / 'tools/train.py'), 'none.py', '--debug']
    result = subprocess.run(command, capture_output=True, text=True, cwd=tiny.parent)
    assert result.returncode == 1
    assert 'Traceback' in result.stderr


def test_ctrl_c_says_how_to_go_on(tiny):
    config = tiny.with_name('long.py')
    config.write_text(f"_base_ = './{tiny.name}'\ntrain_cfg = dict(max_epochs=10000)\n")
    command = [sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir', 'w']
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=tiny.parent,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # a background shell hands on that it is ignored
    )
    deadline = time.monotonic() + 120
    while not (tiny.parent / 'w' / 'last_checkpoint').exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert 'Traceback' not in err
    assert err.strip().splitlines()[-1] == (
        f'go on from the last checkpoint: python {command[1]} {config} --work-dir w --resume'
    )


def test_an_interruption_that_somebody_caught_is_one(tmp_path):
    def format_config(_runner):
        try:
            raise KeyboardInterrupt
        except BaseException as error:
            raise SyntaxError('Failed to format the config file') from error

    runner = SimpleNamespace(log_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(runner, format_config)
    assert not list(tmp_path.iterdir())
