"""A slim model is pruned further by an ordinary config, and every tool takes what that writes."""

from __future__ import annotations

import shutil

import pytest

from mmcpd.engine.slim_file import read_slim

AGAIN = """
_base_ = './tiny.py'
model = dict(_delete_=True, type='mmcpd.slimmed', model=_base_.model, structure={slim!r})
default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.6), begin=0.25, end=0.6, interval=1, input_shape=(3, 32, 32))
)
train_cfg = dict(max_epochs=3, val_interval=3)
"""


def accuracy(out):
    (line,) = [line for line in out.splitlines() if line.startswith('accuracy/top1: ')]
    return line


@pytest.fixture
def again(tool, pruning, tmp_path):
    """Prune to a half, and that to 60 %; return the second config and its folder."""
    code, _, err = tool('train', pruning)
    assert code == 0, err
    file = pruning.with_name('again.py')
    file.write_text(AGAIN.format(slim=str(tmp_path / 'work_dirs/prune/slim.pth')))
    code, _, err = tool('train', file)
    assert code == 0, err
    return file, tmp_path / 'work_dirs/again'


def test_a_slim_model_is_pruned_further_and_tools_take_it(again, tool, pruning, tmp_path):
    file, work = again
    first, second = (read_slim(folder / 'slim.pth')['meta'] for folder in (tmp_path / 'work_dirs/prune', work))
    assert second['dense']['macs'] == first['slim']['macs']
    assert second['slim']['macs'] <= 0.6 * first['slim']['macs']
    results = {}
    for config, checkpoint in ((file, 'slim.pth'), (pruning, 'slim.pth'), (file, 'epoch_3.pth')):
        code, out, err = tool('test', config, work / checkpoint)
        assert code == 0, err
        results[config.name, checkpoint] = accuracy(out)
    assert len(set(results.values())) == 1
    for checkpoint in ('epoch_1.pth', 'dense.pth'):  # of the slim model that the run began with
        code, _, err = tool('test', file, work / checkpoint)
        assert code == 0, err

    code, out, err = tool('slim', file, work / 'epoch_3.pth', '--out', 'again.pth')
    assert code == 0, err
    ours, theirs = read_slim(work / 'slim.pth'), read_slim(tmp_path / 'again.pth')
    assert ours['structure'] == theirs['structure']
    assert all(bool((value == theirs['state_dict'][name]).all()) for name, value in ours['state_dict'].items())

    code, slim_groups, err = tool('comb', file, '--shape', '3', '32', '32')
    assert code == 0, err
    code, dense_groups, err = tool('comb', pruning, '--shape', '3', '32', '32')
    assert code == 0, err
    assert slim_groups != dense_groups

    arguments = '--no-bench --random-input --opset 17'.split()
    code, out, err = tool('deploy', file, work / 'slim.pth', *arguments)
    assert code == 0, err
    assert (work / 'slim.onnx').stat().st_size < (work / 'dense.onnx').stat().st_size
    code, out, err = tool('deploy', pruning, work / 'slim.pth', *arguments)  # dense.pth is not of its model
    assert code == 1 and 'dense.pth is of another model' in err
    shutil.copy(work / 'slim.pth', tmp_path / 'alone.pth')
    code, out, err = tool('deploy', pruning, tmp_path / 'alone.pth', *arguments)
    assert code == 0, err
