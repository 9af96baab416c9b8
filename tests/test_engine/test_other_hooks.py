"""What users' configs have beside PruneHook: hooks that write, schedules by a score, the best checkpoint, a start."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS, METRICS
from torch import nn

from mmcpd.engine.averages import Averages
from mmcpd.engine.checkpoints import check_start, load_slim
from mmcpd.engine.saving import slim_checkpoint
from mmcpd.engine.validation import validate_unseen
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import SlimError
from mmcpd.slim.mask import kept_rows, named_tensors
from tests.test_engine.tiny_runs import SHARE, X, config, hook_of, log_of, train


# -- hooks that write into the model -----------------------------------------------------------------------------------
@HOOKS.register_module()
class NewStatistics(Hook):
    """Replace every statistic by a new tensor, as hooks that recompute them do."""

    priority = 'ABOVE_NORMAL'

    def __init__(self, by_epoch):
        self.by_epoch = by_epoch

    def _replace(self, runner):
        for module in runner.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean = torch.full_like(module.running_mean, 0.5)
                module.running_var = torch.full_like(module.running_var, 2.0)

    def after_train_epoch(self, runner):
        if self.by_epoch:
            self._replace(runner)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if not self.by_epoch:
            self._replace(runner)


class Removed(Hook):
    """Note the largest number in removed rows whenever the model is validated."""

    priority = 'VERY_LOW'

    def __init__(self):
        self.worst = []

    def before_val_epoch(self, runner):
        pruner, tensors = hook_of(runner).pruner, named_tensors(bare_model(runner.model))
        for name, dims in kept_rows(pruner.coupling, pruner.keep).items():
            for dim, live in dims.items():
                gone = (~live).nonzero().flatten()
                self.worst.append(float(tensors[name].detach().index_select(dim, gone).abs().max()))


WITHOUT_WEIGHTS = {'model.student.backbone.norm_cfg': {'type': 'BN', 'affine': False}}
PRECISE = {'type': 'mmpretrain.PreciseBNHook', 'num_samples': 32, 'priority': 'ABOVE_NORMAL'}


@pytest.mark.parametrize(
    'hook',
    [{'type': 'NewStatistics', 'by_epoch': True}, {'type': 'NewStatistics', 'by_epoch': False}, PRECISE],
    ids=str,
)
@pytest.mark.parametrize('changes', [{}, WITHOUT_WEIGHTS], ids=['affine', 'not affine'])
def test_statistics_that_a_hook_replaced_are_masked(runner_of, tmp_path, hook, changes):
    runner = runner_of(custom_hooks=[hook], **changes)
    look = Removed()
    runner.register_hook(look)
    train(runner)
    assert look.worst and max(look.worst) == 0
    small = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth')
    torch.testing.assert_close(small(X), bare_model(runner.model).eval()(X), rtol=1e-4, atol=1e-5)


# -- a validation of ours ----------------------------------------------------------------------------------------------
@METRICS.register_module()
class Falling(BaseMetric):
    """A score that is lower at each validation, a name and a table: what a pruned model's may look like."""

    default_prefix = 'score'
    count = 0

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        type(self).count += 1
        return {'top1': 100.0 - type(self).count, 'worst': 'c3', 'recall': None, 'each': np.zeros(3)}


class Heard(Hook):
    """Count what a hook of somebody else hears."""

    def __init__(self):
        self.heard, self.prepared = 0, 0

    def before_val(self, runner):
        self.prepared += 1

    def after_val_epoch(self, runner, metrics=None):
        self.heard += 1


BEST = {
    'val_evaluator': {'_delete_': True, 'type': 'Falling'},
    'default_hooks.checkpoint.save_best': 'score/top1',
    'default_hooks.checkpoint.rule': 'greater',
}


@pytest.fixture
def falling(monkeypatch):
    monkeypatch.setattr(Falling, 'count', 0)


def test_nobody_hears_of_the_validation_when_pruning_begins(runner_of, falling):
    plateau = {'type': 'ReduceOnPlateauLR', 'monitor': 'score/top1', 'rule': 'greater', 'patience': 9, 'by_epoch': True}
    stopping = {'type': 'EarlyStoppingHook', 'monitor': 'score/top1', 'rule': 'greater', 'patience': 9}
    changes = {'prune.begin': 2, 'param_scheduler': [plateau], 'custom_hooks': [stopping]}
    runner = runner_of(**BEST, **changes)
    heard, states = Heard(), []

    class State(Hook):
        def __init__(self, priority):
            self.priority = priority

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 2:
                runner.model.student.neck.eval()  # a hook may freeze parts
                random = torch.get_rng_state()
                states.append((random, [m.training for m in runner.model.modules()], runner.epoch, runner.iter))

    for hook in (heard, State('HIGHEST'), State('LOWEST')):
        runner.register_hook(hook)
    watch = train(runner)
    assert Falling.count == 5 and heard.heard == 4 and heard.prepared == 5
    assert hook_of(runner).dense_metrics == {'score/top1': 99.0}
    assert torch.equal(states[0][0], states[1][0]) and states[0][1:] == states[1][1:] and False in states[0][1]
    other = runner_of('validated anyway', **BEST, **(changes | {'prune.begin': 4}))
    train(other)
    (plateau,), (like,) = runner.param_schedulers, other.param_schedulers
    stopping, alike = (hook_of(each, EarlyStoppingHook) for each in (runner, other))
    assert plateau.best == stopping.best_score == 98.0, 'the first that it heard'
    assert (plateau.num_bad_epochs, stopping.wait_count) == (like.num_bad_epochs, alike.wait_count)
    assert runner.message_hub.get_scalar('val/score/top1').data[0].tolist() == [98.0, 97.0, 96.0, 95.0]
    assert len(watch.left) == 16


def test_validation_measures_what_the_loop_would(runner_of):
    runner = runner_of(epochs=3)
    train(runner)
    assert validate_unseen(runner) == {'accuracy/top1': runner.val_loop.run()['accuracy/top1']}
    with Averages(runner).in_model():
        assert runner.hooks and hook_of(runner)


# -- the best checkpoint -----------------------------------------------------------------------------------------------
def test_the_best_begins_anew_at_the_target_and_each_file_says_what_it_is(runner_of, falling, tmp_path):
    runner = runner_of(**BEST)
    train(runner)
    work, log = tmp_path / 'run', log_of(tmp_path)
    names = sorted(path.name for path in work.glob('best_*.pth'))
    assert names == ['best_score_top1_epoch_1.pth', 'best_score_top1_epoch_3.pth']
    assert 'the target is reached: save_best starts anew' in log
    assert f'{work / names[0]} is dense: no unit is removed yet' in log
    assert f'{work / names[1]} is pruned to the target: {SHARE}' in log
    meta = slim_checkpoint(config(work, **BEST), work / names[1], tmp_path / 'slim.pth')
    assert meta['slim']['macs'] <= 0.5 * meta['dense']['macs']
    with pytest.raises(SlimError, match='no unit is removed in it yet'):
        slim_checkpoint(config(work, **BEST), work / names[0], tmp_path / 'slim.pth')


def test_a_resumed_run_does_not_begin_the_best_anew_again(runner_of, falling, tmp_path):
    train(runner_of(**BEST))
    runner = runner_of(**BEST, epochs=5, resume=True, load_from=str(tmp_path / 'run' / 'epoch_4.pth'))
    train(runner)
    names = sorted(path.name for path in (tmp_path / 'run').glob('best_*.pth'))
    assert names == ['best_score_top1_epoch_1.pth', 'best_score_top1_epoch_3.pth']
    assert log_of(tmp_path).count('save_best starts anew') == 1
    assert log_of(tmp_path).count('best_score_top1_epoch_1.pth is dense') == 2, 'known to the resumed run too'


def test_a_run_that_stops_early_says_that_it_is_not_at_its_target(runner_of, falling, tmp_path):
    stopping = {'type': 'EarlyStoppingHook', 'monitor': 'score/top1', 'rule': 'greater', 'patience': 1}
    runner = runner_of(**BEST, custom_hooks=[stopping])
    train(runner)
    assert runner.epoch == 2
    line = r'the run ended before its target; slim.pth is partly pruned: 5'
    assert line in log_of(tmp_path) and 'the target is 50.0%' in log_of(tmp_path)


# -- a start from what was pruned --------------------------------------------------------------------------------------
def test_a_pruned_training_checkpoint_is_no_start(runner_of, tmp_path):
    train(runner_of())
    work = tmp_path / 'run'
    message = (
        r'epoch_4\.pth is a training checkpoint of a run that prunes, pruned to the target: '
        rf'{re.escape(SHARE)}.*resume.*mmcpd\.slimmed'
    )
    cfg = config(work, load_from=str(work / 'epoch_4.pth'))
    with pytest.raises(SlimError, match=message):
        check_start(cfg, work / 'epoch_4.pth')
    runner = runner_of('again', load_from=str(work / 'epoch_4.pth'))
    with pytest.raises(SlimError, match=message):
        runner.train()
    assert runner.iter == 0
    with pytest.raises(SlimError, match='partly pruned: 5'):
        check_start(cfg, work / 'epoch_2.pth')
    check_start(cfg, work / 'epoch_1.pth')  # nothing was removed then
    cfg.resume = True
    check_start(cfg, work / 'epoch_4.pth')
    train(runner_of('dense', load_from=str(work / 'epoch_1.pth'), epochs=3))
