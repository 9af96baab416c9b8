"""How users' configs train beside PruneHook: several optimizers, frozen layers, mixed precision, strategies."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from mmengine._strategy import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.runner._flexible_runner import FlexibleRunner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.optimizers import refuse_shards
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import PruneError
from mmcpd.slim.compare import compare
from tests.test_engine.tiny_runs import X, config, hook_of, log_of, train


# -- several optimizers ------------------------------------------------------------------------------------------------
@MODELS.register_module()
class Game(BaseModel):
    """A generator that combing sees and a critic that only training runs, each with a step of its own."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.generator = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, padding=1))
        self.critic = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 1, 3))

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.generator(inputs)

    def train_step(self, data, optim_wrapper):
        x = self.data_preprocessor(data, True)['inputs']
        losses = {}
        for name, sign in (('critic', 1.0), ('generator', -1.0)):
            made = self.generator(x)
            losses[name] = loss = sign * self.critic(made).mean() - (sign > 0) * self.critic(x).mean()
            optim_wrapper[name].update_params(loss)
        losses['loss'] = losses['generator']
        return {name: loss.detach() for name, loss in losses.items()}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ByPart:
    """Give each part of a model an optimizer of its own."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        self.parts = optim_wrapper_cfg['parts']

    def __call__(self, model):
        wrappers = {}
        for name, prefixes in self.parts.items():
            own = [p for n, p in model.named_parameters() if n.startswith(tuple(prefixes))]
            wrappers[name] = OptimWrapper(torch.optim.SGD(own, lr=0.01, momentum=0.9))
        return OptimWrapperDict(**wrappers)


def optimizers(**parts):
    return {'optim_wrapper': {'_delete_': True, 'constructor': 'ByPart', 'parts': parts}}


NOT_VALIDATED = dict.fromkeys(('val_cfg', 'val_dataloader', 'val_evaluator'))
GAME = {
    'model': {'_delete_': True, 'type': 'Game'},
    'data_preprocessor.type': 'ClsDataPreprocessor',
    'distil': False,
    **NOT_VALIDATED,
}


def test_of_several_optimizers_the_one_that_trains_the_groups_is_followed(runner_of, tmp_path):
    runner = runner_of(**GAME, **optimizers(critic=['critic'], generator=['generator']))
    runner.train()
    pruner = hook_of(runner).pruner
    assert pruner.optimizer is runner.optim_wrapper['generator'].optimizer
    assert pruner.keep.keys() == {'generator.0'} and pruner.left()['macs'] <= 0.5
    assert pruner.importance.skipped == 0 and pruner.left_alone == {}
    gone = ~pruner.keep['generator.0']
    assert not runner.model.generator[0].weight[gone].any() and runner.model.critic[0].weight.any()
    small = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth')
    torch.testing.assert_close(small(X), runner.model.eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('parts', 'message'),
    [
        ({'first': ['generator.0'], 'rest': ['generator.2', 'critic']},
         r"trained by 2 of first, rest: 'first' trains generator\.0\.weight.*paramwise_cfg=dict\(custom_keys="),
        ({'critic': ['critic']}, 'trained by none of critic'),
        ({'one': ['generator'], 'two': ['generator', 'critic']}, 'trained by 2 of one, two'),
    ],
)  # fmt: skip
def test_groups_that_several_optimizers_train_are_refused_before_training(runner_of, parts, message):
    runner = runner_of(**GAME, **optimizers(**parts))
    with pytest.raises(ValueError, match=message):
        runner.train()
    assert runner.iter == 0


# -- layers without a gradient -----------------------------------------------------------------------------------------
FROZEN = {'model.student.backbone.frozen_stages': 2}


@HOOKS.register_module()
class Trains(Hook):
    """Freeze the backbone until an iteration, and train it from then on (or the reverse)."""

    def __init__(self, at, first=False):
        self.at, self.first = at, first

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        bare_model(runner.model).backbone.requires_grad_(self.first == (runner.iter < self.at))


def test_frozen_stages_are_left_alone_with_a_line_that_names_them(runner_of, tmp_path):
    runner = runner_of(**FROZEN, **{'prune.target': {'macs': 0.7}})
    train(runner)
    pruner, log = hook_of(runner).pruner, log_of(tmp_path)
    assert pruner.left()['macs'] <= 0.7
    frozen = [name for name in pruner.keep if name in pruner.left_alone]
    assert 'backbone.layer1.0.conv1' in frozen and 'backbone.layer4.0.conv1' not in frozen
    assert all(bool(pruner.keep[name].all()) for name in frozen)
    assert f'alone    {len(frozen)} groups keep their units while they get no gradient (requires_grad=False on' in log
    assert 'the others allow' in log
    small = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth')
    torch.testing.assert_close(small(X), bare_model(runner.model).eval()(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    'cure',
    [{'prune.importance': 'magnitude'}, {'prune.importance': 'gauss_newton'},
     {'default_hooks.prune': {'_delete_': True, 'type': 'mmcpd.PruneHook', 'begin': 4, 'at_once': True, 'pictures': 32,
                              'target': {'macs': 0.4}}}],
    ids=['magnitude', 'gauss_newton', 'at_once'],
)  # fmt: skip
def test_what_frozen_stages_put_out_of_reach_is_said_at_once_and_each_cure_helps(runner_of, cure):
    frozen = {'model.student.backbone.frozen_stages': 4, 'prune.target': {'macs': 0.4}}
    runner = runner_of(**frozen)
    message = r'macs cannot go down to 0\.4000 .*only to 1\.0000: the groups .*(requires_grad=False on .*at_once=True)'
    with pytest.raises(PruneError, match=message):
        runner.train()
    assert runner.iter == 0
    runner = runner_of('cured', **(frozen | cure), epochs=3)
    runner.train()
    assert hook_of(runner).pruner.left()['macs'] <= 0.4


@pytest.mark.parametrize(('at', 'first', 'reached'), [(7, False, True), (7, True, False), (2, False, True)])
def test_hooks_that_freeze_or_unfreeze_never_stop_a_run(runner_of, tmp_path, at, first, reached):
    runner = runner_of(custom_hooks=[{'type': 'Trains', 'at': at, 'first': first}])
    watch = train(runner)
    pruner, log = hook_of(runner).pruner, log_of(tmp_path)
    assert len(watch.left) == 16 and (pruner.left()['macs'] <= 0.5) == reached
    assert ('groups keep their units while they get no gradient' in log) == (at != 2)
    assert ('the run ended before its target' in log) != reached
    assert compare(bare_model(runner.model).eval(), pruner.coupling, pruner.keep) < 1e-4


def test_lora_is_refused_before_training_with_what_remains(runner_of):
    arch = {'embed_dims': 24, 'num_layers': 2, 'num_heads': 3, 'feedforward_channels': 48}
    vit = {'type': 'VisionTransformer', 'arch': arch, 'img_size': 32, 'patch_size': 8}
    backbone = {'type': 'LoRAModel', 'module': vit, 'rank': 2, 'targets': [{'type': 'qkv'}]}
    head = {'type': 'VisionTransformerClsHead', 'num_classes': 10, 'in_channels': 24, 'topk': (1,)}
    student = {'_delete_': True, 'type': 'ImageClassifier', 'backbone': backbone, 'neck': None, 'head': head}
    runner = runner_of(**{'model.student': student})
    with pytest.raises(PruneError, match=r'macs cannot go down to 0\.5000 .* get no gradient .*frozen trunk'):
        runner.train()
    assert runner.iter == 0


# -- mixed precision ---------------------------------------------------------------------------------------------------
@pytest.fixture
def amp_on_cpu(monkeypatch):
    """Let MMEngine's mixed precision run without an accelerator, in either precision."""
    module = 'mmengine.optim.optimizer.amp_optimizer_wrapper'
    monkeypatch.setattr(f'{module}.is_cuda_available', lambda: True)
    monkeypatch.setattr(f'{module}.GradScaler', partial(torch.amp.GradScaler, 'cpu'))
    autocast = partial(torch.autocast, 'cpu')
    monkeypatch.setattr('mmengine.runner.amp.autocast', autocast)
    monkeypatch.setattr('mmcpd.engine.closure.autocast', autocast)


QUICK = {'bfloat16': ('gauss_newton',), 'float16': ('curvature',)}  # the others are slow


@pytest.mark.parametrize(
    ('dtype', 'importance'),
    [
        pytest.param(dtype, importance, marks=[] if importance in quick else pytest.mark.slow)
        for dtype, quick in QUICK.items()
        for importance in ('hessian', 'curvature', 'group_fisher', 'gauss_newton')
    ],
)
def test_scores_in_mixed_precision_are_those_of_unscaled_losses(runner_of, amp_on_cpu, importance, dtype):
    found = {}
    for name, wrapper in {
        'plain': {'type': 'OptimWrapper'},
        'scaled': {'type': 'AmpOptimWrapper', 'dtype': dtype, 'loss_scale': 2.0**10},
        'dynamic': {'type': 'AmpOptimWrapper', 'dtype': dtype, 'loss_scale': 'dynamic'},
    }.items():
        changes = {f'optim_wrapper.{key}': value for key, value in wrapper.items()}
        runner = runner_of(name, distil=False, **changes, **{'prune.importance': importance, 'prune.interval': 8})

        class Scores(Hook):
            priority = 'HIGHEST'

            def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None, name=name):
                if runner.iter == 8:
                    found[name] = torch.cat(list(hook_of(runner).pruner.importance.scores().values())).double()

        runner.register_hook(Scores())
        train(runner)
        pruner = hook_of(runner).pruner
        assert pruner.left()['macs'] <= 0.5 and pruner.importance.skipped == 0
        assert compare(bare_model(runner.model).eval(), pruner.coupling, pruner.keep) < 1e-3
    for name in ('scaled', 'dynamic'):
        ratio = found[name].sum() / found['plain'].sum()
        assert 0.1 < ratio < 10, 'not times the scale, or its square'


# -- strategies --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['FSDPStrategy', 'DeepSpeedStrategy', 'ColossalAIStrategy'])
def test_strategies_that_shard_are_refused_with_the_cure(kind):
    strategy = FSDPStrategy.__new__(FSDPStrategy) if kind == 'FSDPStrategy' else type(kind, (), {})()
    with pytest.raises(ValueError, match=rf'^{kind} cuts weights.*PruneHook.*train with DDP'):
        refuse_shards(SimpleNamespace(strategy=strategy, model=nn.Linear(2, 2)))
    for whole in (SingleDeviceStrategy, DDPStrategy):
        refuse_shards(SimpleNamespace(strategy=whole.__new__(whole), model=nn.Linear(2, 2)))


def test_a_sharded_model_is_refused_whatever_runs_it():
    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(sharded)
    with pytest.raises(ValueError, match=r'^FullyShardedDataParallel cuts weights'):
        refuse_shards(SimpleNamespace(model=nn.Sequential(nn.Linear(2, 2), sharded)))


def test_a_flexible_runner_on_one_device_prunes(runner_of, tmp_path):
    cfg = config(tmp_path / 'run', custom_hooks=[{'type': 'EMAHook', 'momentum': 0.2}])
    cfg.strategy, cfg.env_cfg = {'type': 'SingleDeviceStrategy'}, {}
    runner = FlexibleRunner.from_cfg(cfg)
    runner.train()
    assert hook_of(runner).pruner.left()['macs'] <= 0.5 and (tmp_path / 'run' / 'slim.pth').is_file()
