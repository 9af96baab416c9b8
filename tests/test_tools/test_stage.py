"""A best checkpoint says what it is, and the tools take it; a pruned one is no start."""

from __future__ import annotations

from mmcpd.engine.slim_file import read_slim


def test_the_best_file_is_said_slimmed_tested_and_no_start(tool, pruning, tmp_path):
    options = ['default_hooks.checkpoint.save_best=auto', 'train_cfg.val_interval=1', 'default_hooks.prune.end=12']
    ema = pruning.with_name('ema.py')
    ema.write_text(f"_base_ = './{pruning.name}'\ncustom_hooks = [dict(type='EMAHook', momentum=0.2)]\n")
    code, out, err = tool('train', ema, '--cfg-options', *options)
    assert code == 0, err
    work = tmp_path / 'work_dirs' / 'ema'
    (best,) = [path for path in work.glob('best_*.pth') if path.name[-5:-4] in '34']
    assert f'{best.name} is pruned to the target: 49.' in out + err
    code, out, err = tool('slim', ema, best)
    assert code == 0 and f'{best} is pruned to the target: 49.' in out, err
    slim = read_slim(best.with_name('slim.pth'))
    assert slim['meta']['slim']['macs'] <= 0.5 * slim['meta']['dense']['macs']
    code, out, err = tool('test', ema, best)
    assert code == 0 and f'{best} is pruned to the target: 49.' in out, err
    tested = [line for line in out.splitlines() if line.startswith('accuracy')]
    code, out, err = tool('test', ema, best.with_name('slim.pth'))
    assert code == 0 and tested == [line for line in out.splitlines() if line.startswith('accuracy')], err
    code, out, err = tool('test', ema, work / 'epoch_1.pth')
    assert code == 0 and f'{work / "epoch_1.pth"} is dense: no unit is removed yet' in out, err
    code, _, err = tool('train', ema, '--cfg-options', f'load_from={best}')
    assert code == 1 and 'is a training checkpoint of a run that prunes' in err and len(err.strip().splitlines()) == 1
