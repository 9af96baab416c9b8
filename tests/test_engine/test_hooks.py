"""The hooks in real, tiny runs: when things happen, what is saved, what a resumed run does, what scores leave alone."""

from __future__ import annotations

import json
import re

import pytest
import torch
from mmengine.hooks import Hook

from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import SlimError
from mmcpd.prune import IMPORTANCES
from tests.test_engine.tiny_runs import hook_of, train


def test_a_run_from_dense_to_slim(runner_of, tmp_path):
    runner = runner_of()
    watch = train(runner)
    work, hook = tmp_path / 'run', hook_of(runner)

    assert watch.left[:5] == [1.0] * 5 and len(set(watch.left)) == 5, 'an event every 2 iterations from 4 to 12'
    assert watch.left[11:] == [watch.left[-1]] * 5 and 0.4 < watch.left[-1] <= 0.5
    assert watch.taught == [False] * 4 + [True] * 12
    history = runner.message_hub.get_scalar('train/prune_macs')
    assert history.current() == watch.left[-1]
    assert {f'train/prune_{m}' for m in ('macs', 'params', 'memory', 'units')} <= runner.message_hub.log_scalars.keys()

    dense = torch.load(work / 'dense.pth', weights_only=True)['state_dict']
    teacher = runner.model.teacher.state_dict()
    assert dense.keys() == teacher.keys()
    assert all(torch.equal(dense[name], teacher[name]) for name in dense), 'the teacher is the dense snapshot'
    assert not runner.model.teacher.training

    content = read_slim(work / 'slim.pth')
    assert content['meta']['slim']['macs'] / content['meta']['dense']['macs'] == watch.left[-1]
    assert content['meta']['slim']['units'] == sum(int(k.sum()) for k in hook.pruner.keep.values())
    assert content['meta']['dense']['metrics'].keys() == content['meta']['slim']['metrics'].keys() == {'accuracy/top1'}
    assert (
        content['meta']['slim']['metrics']['accuracy/top1']
        == runner.message_hub.get_scalar('val/accuracy/top1').current()
    )

    x = torch.randn(3, 3, 32, 32)
    small = load_slim(runner.cfg, work / 'slim.pth')
    masked = bare_model(runner.model).eval()
    torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == content['meta']['slim']['params']
    assert content['meta']['input_shape'] == [3, 32, 32]
    assert (work / 'coupling.txt').read_text().startswith('12 groups')
    log = next(work.glob('*/*.log')).read_text()
    assert 'slim / dense' in log
    kinds = 'model|data|coupling|frozen|target|pruning|teacher|results'
    lines = re.findall(rf' - INFO - ((?:{kinds}) +.+)', log)[:10]
    assert [
        line.split()[0] for line in lines
    ] == 'model data coupling frozen frozen frozen target pruning teacher results'.split()
    for text in (
        '12 groups',
        '50.0% of the MACs',
        'iterations 4 to 12 of 16, every 2, by Hessian / memory',
        'KDLoss at logits',
    ):
        assert [line for line in lines if text in line], text


@pytest.mark.parametrize(
    ('importance', 'stop'),
    [
        ('hessian', 1),
        ('curvature', 2),
        pytest.param('hessian', 2, marks=pytest.mark.slow),
        pytest.param('random', 2, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(runner_of, tmp_path, importance, stop):
    change = {'prune.importance': importance}
    whole = runner_of('whole', **change)
    train(whole)

    class Stop(Hook):
        priority = 'LOWEST'

        def after_train_epoch(self, runner):
            if runner.epoch + 1 == stop:
                raise KeyboardInterrupt

    first = runner_of('parts', **change)
    first.register_hook(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    assert not (tmp_path / 'parts' / 'slim.pth').exists()
    second = runner_of('parts', **change, resume=True, load_from=str(tmp_path / 'parts' / f'epoch_{stop}.pth'))
    watch = train(second)
    assert watch.taught == [True] * len(watch.taught)

    a, b = hook_of(whole), hook_of(second)
    assert all(torch.equal(a.pruner.keep[n], b.pruner.keep[n]) for n in a.pruner.keep)
    assert a.dense_metrics == b.dense_metrics
    for (name, one), two in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    ours, theirs = (r.model.teacher.state_dict() for r in (whole, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_resuming_without_the_teacher_or_the_state_is_refused(runner_of, tmp_path):
    train(runner_of(epochs=3))
    checkpoint = tmp_path / 'run' / 'epoch_2.pth'
    (tmp_path / 'run' / 'dense.pth').unlink()
    with pytest.raises(SlimError, match=r'dense\.pth is missing'):
        runner_of(resume=True, load_from=str(checkpoint)).train()
    content = torch.load(checkpoint, weights_only=False)
    assert content.pop('mmcpd')['begun']
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match='8 iterations are finished and there is no pruning state'):
        runner_of(resume=True, load_from=str(checkpoint)).train()


def test_load_from_and_begin_0_prune_at_once(runner_of, tmp_path):
    train(runner_of('dense', distil=False, epochs=1, **{'prune.begin': 3, 'prune.end': 4}))
    checkpoint = tmp_path / 'dense' / 'dense.pth'
    runner = runner_of('pruned', epochs=2, load_from=str(checkpoint), **{'prune.begin': 0, 'prune.end': 6})
    watch = train(runner)
    assert watch.taught == [True] * 8
    assert watch.left[0] == 1.0 and watch.left[1] < 1.0 and watch.left[-1] <= 0.5
    teacher, loaded = runner.model.teacher.state_dict(), torch.load(checkpoint, weights_only=True)['state_dict']
    assert all(torch.equal(teacher[name], loaded[name]) for name in loaded)
    assert hook_of(runner).dense_metrics.keys() == {'accuracy/top1'}, 'validated before the first iteration'


@pytest.mark.parametrize('importance', sorted(IMPORTANCES))
def test_every_importance_runs_with_accumulated_gradients_and_without_a_distiller(runner_of, importance):
    changes = {'prune.importance': importance, 'optim_wrapper.accumulative_counts': 2}
    runner = runner_of(distil=False, **changes)
    watch = train(runner)
    assert watch.left[-1] <= 0.5
    assert watch.taught == [False] * 16
    assert not hooks_on(runner.model)
    assert not runner.optim_wrapper.optimizer._optimizer_step_pre_hooks


def hooks_on(model):
    return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]


@pytest.mark.parametrize('begin', [0, 4])
def test_the_hooks_of_the_importance_are_no_part_of_the_teacher(runner_of, begin):
    seen = []

    class Look(Hook):
        def after_train_iter(self, runner, *_, **__):
            seen.append(len(hooks_on(bare_model(runner.model))))

    runner = runner_of(epochs=3, **{'prune.importance': 'group_fisher', 'prune.begin': begin})
    runner.register_hook(Look())
    runner.train()
    assert seen[begin] > 0, 'it watches the student'
    assert not hooks_on(runner.model.teacher)


@pytest.mark.parametrize('importance', ['curvature', 'group_fisher'])
@pytest.mark.parametrize('counts', [1, 2])
def test_looking_does_not_change_what_is_trained(runner_of, importance, counts):
    """Two runs that remove nothing before their end differ in nothing until then."""
    losses = []
    for name in ('hessian', importance):
        changes = {'prune.importance': name, 'prune.interval': 100, 'optim_wrapper.accumulative_counts': counts}
        runner = runner_of(name, epochs=3, **changes, **{'model.student.backbone.drop_path_rate': 0.3})
        losses.append(train(runner).losses)
    assert losses[0] == losses[1]


def test_the_closure_repeats_the_step_it_probes(runner_of):
    """With the gates left at one the repeated gradient is the step's own, accumulated or not."""
    seen = []

    class Compare(Hook):
        def before_train(self, runner):
            hook = hook_of(runner)
            model = bare_model(runner.model)

            def check(*_):
                before = {n: p.grad.clone() for n, p in model.named_parameters()}
                for parameter in model.parameters():
                    parameter.grad = None
                hook.closure()
                for name, parameter in model.named_parameters():
                    torch.testing.assert_close(parameter.grad, before[name], rtol=1e-5, atol=1e-7, msg=name)
                seen.append(runner.iter)

            runner.optim_wrapper.optimizer.register_step_pre_hook(check)

    changes = {'prune.importance': 'curvature', 'optim_wrapper.accumulative_counts': 2}
    runner = runner_of(epochs=3, **changes, **{'model.student.backbone.drop_path_rate': 0.3})
    runner.register_hook(Compare())
    runner.train()
    assert seen == [1, 3, 5, 7, 9, 11]


def test_comb_hook_alone_shows_and_saves_and_prunes_nothing(runner_of, tmp_path):
    changes = {'default_hooks.prune': {'_delete_': True, 'type': 'mmcpd.CombHook', 'ignore': ['backbone.conv1']}}
    runner = runner_of(distil=False, epochs=1, **changes)
    runner.train()
    saved = json.loads((tmp_path / 'run' / 'coupling.json').read_text())
    names = [group['name'] for group in saved['groups']]
    assert len(names) == 11 and 'backbone.conv1' not in names
    log = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert '11 groups' in log and 'ignored by the user' in log
    assert not (tmp_path / 'run' / 'slim.pth').exists()
    assert 'mmcpd' not in torch.load(tmp_path / 'run' / 'epoch_1.pth', weights_only=False)


def test_an_untrained_model_is_pruned_with_a_warning(runner_of, tmp_path):
    train(runner_of(epochs=1, **{'prune.begin': 0, 'prune.end': 4}))
    assert 'an untrained model is pruned' in next((tmp_path / 'run').glob('*/*.log')).read_text()
