"""Beside EMAHook: the average is masked, validated, taught from, pruned at once, slimmed, and resumed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseAveragedModel
from mmengine.registry import MODELS
from torch import nn

from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.saving import slim_checkpoint
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model
from mmcpd.slim.compare import compare
from mmcpd.slim.mask import kept_rows, named_tensors
from tests.test_engine.tiny_runs import X, config, hook_of, train


@MODELS.register_module()
class Remembers(BaseAveragedModel):
    """An average of a user's own, which never forgets: without a mask removed weights would live on in it."""

    def avg_func(self, averaged_param, source_param, steps):
        averaged_param.mul_(1.01).add_(source_param, alpha=0.001)


@MODELS.register_module()
class Shifted(nn.Module):
    """A neck that adds a plain tensor, which is a buffer from the moment on when the run is combed."""

    def __init__(self, channels):
        super().__init__()
        self.shift = torch.linspace(-1, 1, channels)

    def forward(self, x):
        return (x[-1].mean((2, 3)) + self.shift,)


KINDS = [
    {'type': 'EMAHook', 'momentum': 0.2},
    {'type': 'EMAHook', 'momentum': 0.2, 'update_buffers': True},
    {'type': 'EMAHook', 'ema_type': 'StochasticWeightAverage'},
    {'type': 'EMAHook', 'ema_type': 'MomentumAnnealingEMA', 'gamma': 5, 'update_buffers': True},
    {'type': 'EMAHook', 'ema_type': 'Remembers'},
    {'type': 'mmengine.EMAHook', 'momentum': 0.2, 'begin_iter': 6},
]


def averaged(runner):
    """Return the bare averaged model, in eval mode."""
    hook = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model'))
    return bare_model(hook.ema_model.module).eval()


def removed(model, pruner):
    """Return the largest number in removed rows."""
    tensors, worst = named_tensors(model), 0.0
    for name, dims in kept_rows(pruner.coupling, pruner.keep).items():
        for dim, live in dims.items():
            worst = max(worst, float(tensors[name].detach().index_select(dim, (~live).nonzero().flatten()).abs().max()))
    return worst


class Look(Hook):
    """Note what lives in removed rows of the average, after every iteration and its hooks."""

    priority = 'LOWEST'

    def __init__(self):
        self.worst = []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.worst.append(removed(averaged(runner), hook_of(runner).pruner))


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('last', [False, True], ids=['before PruneHook', 'after PruneHook'])
def test_the_average_is_masked_validated_and_slimmed(runner_of, tmp_path, kind, last):
    runner = runner_of(custom_hooks=[{**kind, 'priority': 'LOW' if last else 'HIGH'}])
    look = Look()
    runner.register_hook(look)
    train(runner)
    pruner = hook_of(runner).pruner
    assert max(look.worst) == 0 and pruner.left()['macs'] <= 0.5

    average, trained = averaged(runner), bare_model(runner.model).eval()
    if not kind.get('update_buffers'):  # MMEngine validates the average's weights with the model's statistics
        for ours, theirs in zip(average.buffers(), trained.buffers(), strict=True):
            assert torch.equal(ours, theirs)
    example = replace(pruner.coupling.example, inputs=(X.double(),))
    assert compare(average.double(), replace(pruner.coupling, example=example), pruner.keep) < 1e-10
    average.float()
    small = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth')
    torch.testing.assert_close(small(X), average(X), rtol=1e-4, atol=1e-5)
    assert (small(X) - trained(X)).abs().max() > 1e-4, 'not the weights that training ended with'
    later = tmp_path / 'later.pth'
    slim_checkpoint(config(tmp_path / 'run'), tmp_path / 'run' / 'epoch_4.pth', later)
    once, again = (read_slim(path)['state_dict'] for path in (tmp_path / 'run' / 'slim.pth', later))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_an_average_has_plain_tensors_too(runner_of, tmp_path):
    """MMEngine copies the buffers of the model into the average in their order."""
    neck = {'_delete_': True, 'type': 'mmengine.Shifted', 'channels': 64}
    runner = runner_of(custom_hooks=[{'type': 'EMAHook', 'momentum': 0.2}], **{'model.student.neck': neck})
    train(runner)
    pruner, average = hook_of(runner).pruner, averaged(runner)
    assert 'neck.shift' in dict(average.named_buffers()) and removed(average, pruner) == 0
    small = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth')
    assert len(small.neck.shift) < 64
    torch.testing.assert_close(small(X), average(X), rtol=1e-4, atol=1e-5)


def test_the_source_is_slimmed_where_only_the_source_is_validated(runner_of, tmp_path):
    kind = {'type': 'mmpretrain.EMAHook', 'momentum': 0.2, 'evaluate_on_ema': False, 'evaluate_on_origin': True}
    runner = runner_of(custom_hooks=[kind])
    train(runner)
    small, trained = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth'), bare_model(runner.model).eval()
    torch.testing.assert_close(small(X), trained(X), rtol=1e-4, atol=1e-5)
    assert (small(X) - averaged(runner)(X)).abs().max() > 1e-4


def test_the_average_teaches_and_is_the_dense_model(runner_of, tmp_path):
    seen = {}

    class Keep(Hook):
        priority = 'HIGHEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 6:
                seen['average'] = {n: t.clone() for n, t in averaged(runner).state_dict().items()}
                seen['source'] = {n: t.clone() for n, t in bare_model(runner.model).state_dict().items()}

    runner = runner_of(custom_hooks=[{'type': 'EMAHook', 'momentum': 0.2}], **{'prune.begin': 6})
    runner.register_hook(Keep())
    train(runner)
    dense = torch.load(tmp_path / 'run' / 'dense.pth', weights_only=True)['state_dict']
    teacher = runner.model.teacher.state_dict()
    assert all(torch.equal(dense[name], seen['average'][name]) for name in dense)
    assert all(torch.equal(dense[name], teacher[name]) for name in dense)
    assert any(not torch.equal(dense[name], seen['source'][name]) for name in dense)


@pytest.mark.parametrize('begin', [0, 4])
def test_at_once_goes_on_from_the_pruned_average(runner_of, tmp_path, begin):
    train(runner_of('dense', distil=False, epochs=1, **{'prune.begin': 3, 'prune.end': 4}))
    seen = {}

    class Keep(Hook):
        priority = 'LOWEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == begin:
                seen['both'] = [{n: t.clone() for n, t in m.state_dict().items()}
                                for m in (averaged(runner), bare_model(runner.model))]  # fmt: skip

    hook = {'_delete_': True, 'type': 'mmcpd.PruneHook', 'begin': begin, 'at_once': True, 'pictures': 32}
    changes = {'default_hooks.prune': {**hook, 'rotate': True}, 'custom_hooks': [{'type': 'EMAHook', 'momentum': 0.2}]}
    runner = runner_of('pruned', epochs=2, load_from=str(tmp_path / 'dense' / 'dense.pth'), **changes)
    runner.register_hook(Keep())
    runner.train()
    average, source = seen['both']
    assert all(torch.equal(average[name], source[name]) for name in average)
    pruner = hook_of(runner).pruner
    assert pruner.left()['macs'] <= 0.5 and removed(averaged(runner), pruner) == 0
    small = load_slim(runner.cfg, tmp_path / 'pruned' / 'slim.pth')
    torch.testing.assert_close(small(X), averaged(runner)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('buffers', [False, True])
@pytest.mark.parametrize('stop', [1, 2])
def test_a_resumed_run_ends_with_the_same_weights_and_average(runner_of, tmp_path, stop, buffers):
    change = {'custom_hooks': [{'type': 'EMAHook', 'momentum': 0.2, 'update_buffers': buffers}]}

    class Stop(Hook):
        priority = 'LOWEST'

        def after_train_epoch(self, runner):
            if runner.epoch + 1 == stop:
                raise KeyboardInterrupt

    whole = runner_of('whole', **change)
    train(whole)
    first = runner_of('parts', **change)
    first.register_hook(Stop())
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = runner_of('parts', **change, resume=True, load_from=str(tmp_path / 'parts' / f'epoch_{stop}.pth'))
    train(second)
    for one, two in ((whole.model, second.model), (averaged(whole), averaged(second))):
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
    once, again = (read_slim(tmp_path / name / 'slim.pth')['state_dict'] for name in ('whole', 'parts'))
    assert all(torch.equal(once[name], again[name]) for name in once)


def test_an_average_of_something_else_is_refused_before_training(runner_of):
    class Other(Hook):
        def before_run(self, runner):
            self.average = MODELS.build(
                {'type': 'ExponentialMovingAverage'}, default_args={'model': torch.nn.Linear(2, 2)}
            )

    runner = runner_of(epochs=3)
    runner.register_hook(Other())
    with pytest.raises(ValueError, match=r'Linear is no copy of the model that is pruned: backbone\.conv1\.weight'):
        runner.train()
    assert runner.iter == 0


def test_an_average_that_was_not_begun_is_the_model(runner_of, tmp_path):
    """EMAHook copies the model before its weights are initialised or loaded, and averages from the first step on."""
    seen = {}

    class First(Hook):
        priority = 'HIGHEST'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 0:
                seen.update({name: tensor.clone() for name, tensor in bare_model(runner.model).state_dict().items()})

    change = {'prune.begin': 0, 'prune.end': 4, 'custom_hooks': [{'type': 'EMAHook', 'momentum': 0.2}]}
    runner = runner_of(epochs=1, **change)
    runner.register_hook(First())
    train(runner)
    dense = torch.load(tmp_path / 'run' / 'dense.pth', weights_only=True)['state_dict']
    assert all(torch.equal(dense[name], seen[name]) for name in dense)
