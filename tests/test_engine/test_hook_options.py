"""What a config gives the hooks: options that are refused, defaults, inherited hooks, the shape of the inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmcpd.engine.build import build_dense
from mmcpd.engine.comb_hook import CombHook
from mmcpd.engine.combing import comb_by_config, shape_combed
from mmcpd.engine.hooks import PruneHook
from mmcpd.engine.saving import slim_checkpoint
from mmcpd.engine.slim_file import read_slim
from mmcpd.errors import PruneError
from mmcpd.prune import Schedule
from tests.test_engine.tiny_runs import config, hook_of, train


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
