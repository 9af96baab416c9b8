"""How a run ends that did not go as planned: before its target, not finite, with nothing to score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook

from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.stage import check_target
from mmcpd.errors import NotFiniteError, PruneError, TargetError
from tests.test_engine.tiny_runs import hook_of


class At(Hook):
    """Do something to the model after so many iterations."""

    priority = 'VERY_LOW'

    def __init__(self, iteration, act):
        self.iteration, self.act = iteration, act

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.iteration:
            self.act(runner)


def stop(runner):
    runner.train_loop.stop_training = True


def spoil(runner):
    with torch.no_grad():
        dict(runner.model.named_parameters())['backbone.conv1.weight'][0] = torch.nan


def run(runner, *acts):
    for iteration, act in acts:
        runner.register_hook(At(iteration, act))
    runner.train()
    return hook_of(runner)


def log_of(runner):
    return Path(runner._log_dir, f'{runner.timestamp}.log').read_text()


def test_a_run_that_is_stopped_early_says_so_in_its_log_and_its_file(runner_of, tmp_path):
    runner = runner_of(distil=False)
    hook = run(runner, (8, stop))
    meta = read_slim(tmp_path / 'run' / 'slim.pth')['meta']
    assert meta['target'] == {'macs': 0.5} and meta['left']['macs'] > 0.5 and meta['reached'] is False
    assert json.loads(json.dumps(meta['left'])) == hook.pruner.left()
    assert 'the run ended before its target; slim.pth is partly pruned: ' in log_of(runner)
    with pytest.raises(TargetError, match=r'slim\.pth is written, and it is partly pruned: .*the target is 50\.0%'):
        check_target(hook.stage(), 'slim.pth')
    whole = runner_of('whole', distil=False)
    hook = run(whole)
    meta = read_slim(tmp_path / 'whole' / 'slim.pth')['meta']
    assert meta['reached'] is True and meta['left']['macs'] <= 0.5 and 'ended before its target' not in log_of(whole)
    check_target(hook.stage(), 'slim.pth')


def test_a_schedule_that_is_shortened_on_resume_is_refused(runner_of, tmp_path):
    run(runner_of(distil=False), (8, stop))
    last = tmp_path / 'run' / 'epoch_2.pth'
    options = {'distil': False, 'load_from': str(last), 'resume': True}
    with pytest.raises(
        PruneError, match='no unit is removed any more: 8 iterations are finished and pruning ends at 6'
    ):
        runner_of('again', **options, **{'prune.end': 6}).train()
    runner_of('more', **options).train()


def test_curve_paper_with_too_few_units_is_refused_and_with_few_it_is_said(runner_of):
    paper = {'distil': False, 'prune.curve': 'paper'}
    with pytest.raises(
        PruneError, match=r'4 events of 1 units leave at least 0\.7\d+ of macs, and its target is 0\.5000'
    ):
        runner_of(**paper, **{'prune.units_per_event': 1}).train()
    runner = runner_of('few', **paper, **{'prune.units_per_event': 30})
    hook = run(runner)
    assert 'the run may end before its target: 4 events of 30 units remove 120' in log_of(runner)
    assert hook.stage()['left']['macs'] > 0.5 and 'the run ended before its target; slim.pth is' in log_of(runner)


def test_pruning_does_not_begin_on_weights_that_are_not_finite(runner_of, tmp_path):
    runner = runner_of(distil=False)
    with pytest.raises(PruneError, match=r'backbone\.\S+ is not finite.*and no unit can be chosen by it: lower the'):
        run(runner, (2, spoil))
    assert not (tmp_path / 'run' / 'slim.pth').exists() and not (tmp_path / 'run' / 'dense.pth').exists()


def test_an_end_that_is_not_finite_says_since_when_and_nothing_of_combing(runner_of, tmp_path):
    runner = runner_of(distil=False)
    hook = run(runner, (13, spoil))
    message = str(hook.failure)
    assert isinstance(hook.failure, NotFiniteError) and 'combing' not in message
    assert ' is not finite since iteration 14, so nothing is written: go on from an earlier checkpoint' in message
    assert f'there is no slim.pth: {message}' in log_of(runner)
    assert not (tmp_path / 'run' / 'slim.pth').exists() and not (tmp_path / 'run' / 'unslimmed.pth').exists()


def test_the_first_interval_without_a_score_is_a_warning_with_iteration_and_tensor(runner_of):
    runner = runner_of(distil=False)
    run(runner, (6, spoil))
    lines = [line for line in log_of(runner).splitlines() if 'no unit is removed at iteration' in line]
    assert len(lines) == 1 and 'WARNING' in lines[0]
    assert 'no unit is removed at iteration 8, and nothing was scored since 6: the gradient of backbone.' in lines[0]
    assert 'is not finite since iteration 7' in log_of(runner) and 'the run ended before its target' in log_of(runner)
