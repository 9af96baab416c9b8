"""The hooks in real, tiny runs: when things happen, what is saved, what a resumed run does, what is refused."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.comb_hook import CombHook
from mmcpd.engine.combing import comb_by_config, shape_combed
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.hooks import PruneHook
from mmcpd.engine.saving import slim_checkpoint
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import PruneError, SlimError
from mmcpd.prune import IMPORTANCES, Schedule

torch.set_num_threads(1)
EPOCH = 4  # iterations

STUDENT = {
    'type': 'ImageClassifier',
    'backbone': {'type': 'ResNet', 'depth': 18, 'base_channels': 8, 'stem_channels': 8},
    'neck': {'type': 'GlobalAveragePooling'},
    'head': {
        'type': 'LinearClsHead',
        'num_classes': 10,
        'in_channels': 64,
        'loss': {'type': 'CrossEntropyLoss'},
        'topk': (1,),
    },
}


def loader(count):
    dataset = {'type': 'mmcpd.DigitsDataset', 'split': 'train', 'indices': count, 'pipeline': [{'type': 'PackInputs'}]}
    sampler = {'type': 'DefaultSampler', 'shuffle': count == 64}
    return {'batch_size': 16, 'num_workers': 0, 'sampler': sampler, 'dataset': dataset}


def config(work_dir, *, distil=True, epochs=4, **changes):
    """A run of 16 iterations: dense for 4, pruning until 12 by an event every 2, then 4 more."""
    model = copy.deepcopy(STUDENT)
    if distil:
        model = {'type': 'mmcpd.Distiller', 'student': model, 'losses': [{'type': 'mmcpd.KDLoss'}]}
    cfg = Config(
        {
            'default_scope': 'mmpretrain',
            'model': model,
            'data_preprocessor': {'num_classes': 10, 'mean': [79.5] * 3, 'std': [90.7] * 3},
            'train_dataloader': loader(64),
            'val_dataloader': loader(32),
            'val_evaluator': {'type': 'Accuracy', 'topk': (1,)},
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9}},
            'train_cfg': {'by_epoch': True, 'max_epochs': epochs, 'val_interval': 1},
            'val_cfg': {},
            'default_hooks': {
                'prune': {'type': 'mmcpd.PruneHook', 'begin': 4, 'end': 12, 'interval': 2, 'target': {'macs': 0.5}},
                'checkpoint': {'type': 'CheckpointHook', 'interval': 1},
                'logger': {'type': 'LoggerHook', 'interval': 2},
            },
            'randomness': {'seed': 0},
            'work_dir': str(work_dir),
            'experiment_name': work_dir.name,
            'log_level': 'INFO',
        }
    )
    changes = copy.deepcopy(changes)  # merging takes `_delete_` out of them
    cfg.merge_from_dict({name.replace('prune.', 'default_hooks.prune.'): value for name, value in changes.items()})
    return cfg


@pytest.fixture
def runner_of(tmp_path):
    """Return `build(name, **changes) -> Runner`, each in a folder of its own unless the name repeats."""
    made = []

    def build(name='run', **changes):
        cfg = config(tmp_path / name, **changes)
        cfg.experiment_name += f'_{len(made)}'
        made.append(Runner.from_cfg(cfg))
        return made[-1]

    yield build
    DefaultScope._instance_dict.clear()


def hook_of(runner, kind=PruneHook):
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


class Watch(Hook):
    """Note what is left, and whether somebody teaches, after each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.left, self.taught, self.losses = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.left.append(hook_of(runner).pruner.left()['macs'])
        model = runner.model
        self.taught.append(isinstance(model, Distiller) and model.teacher is not None)
        self.losses.append(float(outputs['loss'].detach()))


def train(runner):
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    return watch


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


@pytest.mark.parametrize(
    ('changes', 'error', 'message'),
    [
        ({'prune.target': {'macs': 0.0001}}, PruneError, r'macs.*0\.0001'),
        ({'prune.ignore': ['backbone*']}, PruneError, 'nothing can be pruned'),
        ({'prune.ignore': ['neck']}, ValueError, "ignore pattern 'neck' fits no group"),
        ({'prune.remain': {'neck': 0.5}}, ValueError, "remain pattern 'neck' fits no group"),
        ({'prune.remain': {'*': 0.95}}, PruneError, r"macs cannot go down to .*remain=\{'\*': 0.95\}"),
        ({'prune.end': 99}, ValueError, 'does not fit into a run of 16'),
    ],
)
def test_refusals_come_before_training(runner_of, tmp_path, changes, error, message):
    runner = runner_of(**changes)
    with pytest.raises(error, match=message):
        runner.train()
    assert runner.iter == 0 and not list(tmp_path.glob('run/*.pth'))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'targt': {'macs': 0.5}}, "PruneHook has no option 'targt': did you mean target"),
        ({'metric': 'macs'}, "PruneHook has no option 'metric'"),
        ({'target': 0.5}, r'target=dict\(macs=0\.5\); got 0\.5'),
        ({'target': {'mac': 0.5}}, "'mac': did you mean macs"),
        ({'target': {'macs': 50}}, 'between 0 and 1'),
        ({'begin': 0.7}, 'begins at 0.7, so it cannot end at 0.6'),
        ({'interval': 0}, 'interval counts iterations'),
        ({'curve': 'cubik'}, 'did you mean cubic'),
        ({'units_per_event': 3}, "units_per_event belongs to curve='paper'"),
        ({'importance': 'hesian'}, 'did you mean hessian'),
        ({'importance': {'type': 'curvature', 'probs': 2}}, 'did you mean probes'),
        ({'normalize': 'mem'}, 'did you mean memory'),
        ({'round_to': 0}, 'round_to counts units'),
        ({'min_units': 0}, 'min_units counts units'),
        ({'heads': 'heads'}, 'did you mean head'),
        ({'ignore': 5}, 'ignore is a list of patterns'),
        ({'strict': 'no'}, 'strict is True or False'),
        ({'seed': 'a'}, 'seed is an integer'),
        ({'input_shape': 5}, 'input_shape is'),
        ({'importance': {'type': 'curvature', 'probes': 'a'}}, 'probes is an integer'),
        ({'importance': {'probes': 2}}, 'importance needs a type'),
        ({'input_shape': [32, 32]}, r'input_shape is \(C, H, W\)'),
    ],
)
def test_a_wrong_option_is_refused_when_the_hook_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build({'type': 'mmcpd.PruneHook', **options})


@pytest.mark.parametrize(('options', 'message'), [({'head': 'dim'}, 'did you mean heads'), ({'heads': 'd'}, 'dim')])
def test_comb_hook_refuses_likewise(options, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build({'type': 'mmcpd.CombHook', **options})


def test_the_defaults_are_those_of_the_signature():
    hook = HOOKS.build({'type': 'mmcpd.PruneHook'})
    assert hook.schedule == Schedule({'macs': 0.5})
    twin = HOOKS.build({'type': 'mmcpd.PruneHook', 'target': {'params': 0.3, 'macs': 0.6}})
    assert (twin.schedule.target, hook.schedule.target) == ({'params': 0.3, 'macs': 0.6}, {'macs': 0.5})


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


THREE_STATEMENTS = """
_base_ = './base.py'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])
default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5)))
"""


def test_three_statements_keep_the_inherited_hooks_and_the_command_line_overrides(tmp_path):
    base = config(tmp_path / 'run', distil=False)
    base.default_hooks.pop('prune')
    base.custom_hooks = [{'type': 'EmptyCacheHook'}]
    base.dump(tmp_path / 'base.py')
    (tmp_path / 'mine.py').write_text(THREE_STATEMENTS)
    cfg = Config.fromfile(tmp_path / 'mine.py')
    cfg.merge_from_dict({'default_hooks.prune.target.macs': 0.4})  # as --cfg-options does
    runner = Runner.from_cfg(cfg)
    kinds = [type(hook).__name__ for hook in runner.hooks]
    assert {'EmptyCacheHook', 'CheckpointHook', 'LoggerHook', 'IterTimerHook', 'PruneHook'} <= set(kinds)
    assert next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook)).interval == 1
    assert hook_of(runner).schedule.target == {'macs': 0.4}
    DefaultScope._instance_dict.clear()


@TRANSFORMS.register_module()
class RandomPad:
    """Make pictures larger by a number of pixels that is drawn: no config fixes their size."""

    def __call__(self, results):
        pad = int(np.random.randint(4, 20))
        return {**results, 'img': np.pad(results['img'], ((0, pad), (0, pad), (0, 0)))}


def test_a_run_that_was_combed_by_its_first_picture_is_cut_later(runner_of, tmp_path):
    pipeline = [{'type': 'RandomPad'}, {'type': 'PackInputs'}]
    changes = {'train_dataloader.dataset.pipeline': pipeline, 'train_dataloader.batch_size': 1}
    changes |= {'train_dataloader.dataset.indices': 4, 'data_preprocessor.pad_size_divisor': 1}
    runner = runner_of(**changes)
    torch.manual_seed(1)
    runner.train()
    written = read_slim(tmp_path / 'run' / 'slim.pth')['meta']
    channels, height, width = written['input_shape']
    assert channels == 3 and 36 <= height == width < 52, 'as the first training picture, not as those of the test'
    checkpoint = tmp_path / 'run' / 'epoch_4.pth'
    assert torch.load(checkpoint, weights_only=False)['mmcpd']['input_shape'] == written['input_shape']

    cfg = config(tmp_path / 'run', **changes)
    model = build_dense(cfg)
    assert shape_combed(comb_by_config(model, cfg)) == written['input_shape'], 'drawn alike by the tools'
    cfg.train_dataloader = None  # nor do they need the data
    meta = slim_checkpoint(cfg, checkpoint, tmp_path / 'later.pth')
    assert meta['input_shape'] == written['input_shape']
    assert {key: meta['slim'][key] for key in ('macs', 'units')} == {
        key: written['slim'][key] for key in ('macs', 'units')
    }
    cfg.val_dataloader = cfg.test_dataloader = None
    with pytest.raises(ValueError, match='give PruneHook input_shape'):
        comb_by_config(model, cfg)


def test_the_input_shape_of_the_hook_wins_in_training_and_in_the_tools(runner_of, tmp_path):
    change = {'prune.input_shape': [3, 64, 48]}
    train(runner_of(epochs=3, **change))
    meta = read_slim(tmp_path / 'run' / 'slim.pth')['meta']
    assert meta['input_shape'] == [3, 64, 48]
    cfg = config(tmp_path / 'run', **change)
    coupling = comb_by_config(build_dense(cfg), cfg)
    assert coupling.cost(coupling.keep()).macs == meta['dense']['macs']


def test_an_untrained_model_is_pruned_with_a_warning(runner_of, tmp_path):
    train(runner_of(epochs=1, **{'prune.begin': 0, 'prune.end': 4}))
    assert 'an untrained model is pruned' in next((tmp_path / 'run').glob('*/*.log')).read_text()


def test_unused_reaches_comb_from_hooks_and_configs():
    for hook in (CombHook(unused='leave').options, PruneHook(unused='leave').comb_options):
        assert hook['unused'] == 'leave'
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5 * 64, 2))
    model[0].idle = nn.Linear(4, 4)
    names = {}
    for unused in ('freeze', 'leave'):
        cfg = Config({'default_hooks': {'prune': {'type': 'mmcpd.PruneHook', 'unused': unused}}})
        coupling = comb_by_config(model, cfg, input_shape=(3, 8, 8))
        assert coupling.unused == ('0.idle',)
        names[unused] = [group.name for group in coupling.groups]
    assert names == {'freeze': ['1'], 'leave': ['0', '1']}
