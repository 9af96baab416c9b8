"""A training that ends before its target is no success: exit status 3, with the slim file written."""

from __future__ import annotations

from mmcpd.engine.slim_file import read_slim

STOP = """
_base_ = './prune.py'
custom_hooks = [dict(type='EarlyStoppingHook', monitor='accuracy/top1', rule='less', patience=1)]
train_cfg = dict(val_interval=1)
"""


def test_early_stopping_before_the_target_is_status_3(tool, pruning, tmp_path):
    config = pruning.with_name('stop.py')
    config.write_text(STOP)
    code, _, err = tool('train', config)
    slim = tmp_path / 'work_dirs' / 'stop' / 'slim.pth'
    assert code == 3 and slim.is_file() and read_slim(slim)['meta']['reached'] is False
    (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
    assert 'slim.pth is written, and it is partly pruned: ' in line
    assert tool('train', pruning)[0] == 0


def test_an_error_while_running_names_the_file_with_its_traceback(tool, tiny):
    code, _, err = tool('train', tiny, '--cfg-options', 'model.head.in_channels=63')
    (line,) = [line for line in err.splitlines() if line.startswith('error: ')]
    assert code == 1 and 'the traceback is in ' in line and 'traceback.txt)' in line


def test_one_group_to_ignore_need_not_be_a_list(tool, pruning):
    code, _, err = tool('train', pruning, '--cfg-options', 'default_hooks.prune.ignore=backbone.conv1')
    assert code in (0, 3), err
