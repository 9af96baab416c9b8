"""What training and testing run beyond mode 'tensor' is combed too, and a slim file proves itself."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import nn

from mmcpd.cli.common import guard
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.combing import comb_by_config, comb_passes
from mmcpd.engine.passes import DEPLOYED, TESTING, TRAINING, runs
from mmcpd.engine.saving import slim_checkpoint
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import ProofError, SlimError
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep

from .tiny_runs import config, hook_of, train

torch.set_num_threads(1)


class Digits(BaseModel):
    """A classifier of digits with a body of two convolutions; what else it has is its subclasses'."""

    def __init__(self, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU())
        self.fc = nn.Linear(12, 10)

    def features(self, inputs):
        return self.body(inputs)

    def logits(self, features):
        return self.fc(features.mean((2, 3)))

    def losses(self, features, labels):
        return {'loss': F.cross_entropy(self.logits(features), labels)}

    def scores(self, features):
        return self.logits(features).softmax(1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        features = self.features(inputs)
        if mode == 'tensor':
            return self.logits(features)
        if mode == 'predict':
            for sample, scores in zip(data_samples, self.scores(features), strict=True):
                sample.set_pred_score(scores)
            return data_samples
        return self.losses(features, torch.cat([sample.gt_label for sample in data_samples]))


@MODELS.register_module()
class SecondHead(Digits):
    """A second head that only the loss and predictions call, and not by the first one's path."""

    def __init__(self, **options):
        super().__init__(**options)
        self.second = nn.Sequential(
            nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
        )

    def losses(self, features, labels):
        return super().losses(features, labels) | {'loss_second': F.cross_entropy(self.second(features), labels)}

    def scores(self, features):
        return (self.logits(features) + self.second(features)).softmax(1)


@MODELS.register_module()
class SideOfTheLoss(Digits):
    """An embedding inside the loss, by a weight that no module's forward uses, of the first activations."""

    def __init__(self, **options):
        super().__init__(**options)
        self.embedding = nn.Parameter(torch.randn(10, 16) * 0.1)

    def features(self, inputs):
        self.early = self.body[:2](inputs)
        return self.body[2:](self.early)

    def losses(self, features, labels):
        side = F.linear(self.early.mean((2, 3)), self.embedding)
        return super().losses(features, labels) | {'loss_side': F.cross_entropy(side, labels)}


@MODELS.register_module()
class BranchOfTraining(Digits):
    """A branch that runs in training mode alone, with dropout."""

    def __init__(self, **options):
        super().__init__(**options)
        self.branch = nn.Sequential(nn.Conv2d(12, 20, 1), nn.Dropout(), nn.Conv2d(20, 10, 1))

    def losses(self, features, labels):
        found = super().losses(features, labels)
        if self.training:
            found['loss_branch'] = F.cross_entropy(F.dropout(self.branch(features).mean((2, 3)), 0.2), labels)
        return found


KINDS = {'SecondHead': 'second.0', 'SideOfTheLoss': 'embedding', 'BranchOfTraining': 'branch.0'}


@pytest.mark.parametrize('kind', KINDS)
def test_what_only_training_runs_is_combed_and_costs_nothing(kind):
    torch.manual_seed(0)
    model = MODELS.build({'type': kind}).eval()
    cfg = Config({'default_scope': 'mmpretrain'})
    coupling = comb_by_config(model, cfg, input_shape=(3, 12, 12))
    cut = {member.tensor for group in coupling.groups for member in group.members}
    assert any(name.startswith(KINDS[kind]) for name in cut)
    (data,) = coupling.example.inputs
    wide = copy.deepcopy(model).double()
    keep = random_keep(coupling, 0.5, 1)
    data = {**data, 'inputs': data['inputs'].double()}
    narrow = slim(wide, coupling, keep)
    mask_(wide, coupling, keep)
    for each in (DEPLOYED, TRAINING):
        for left, right in zip(
            *(torch.utils._pytree.tree_leaves(each(net, data)) for net in (wide, narrow)), strict=True
        ):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert coupling.cost(coupling.keep()).macs == 16 * 27 * 100 + 12 * 144 * 64 + 120, 'the deployed part alone'

    (data,) = coupling.example.inputs
    blind = comb_passes(model, data | {'data_samples': None}, unused='leave')  # without a sample the loss cannot run
    with pytest.raises(RuntimeError):  # the control
        TRAINING(slim(model, blind, random_keep(blind, 0.5, 1)), data)
    frozen = comb_passes(model, data | {'data_samples': None})  # what feeds the part that never ran stays
    assert frozen.unused == blind.unused
    if frozen.unused != ('embedding',):  # a table is only named
        assert len(frozen.groups) < len(blind.groups)
        TRAINING(slim(model, frozen, random_keep(frozen, 0.5, 1)), data)


def test_the_functions_of_training_leave_modes_and_samples_as_they_were():
    model = MODELS.build({'type': 'BranchOfTraining'}).eval()
    coupling = comb_by_config(model, Config({'default_scope': 'mmpretrain'}), input_shape=(3, 12, 12))
    assert not any(module.training for module in model.modules())
    (data,) = coupling.example.inputs
    assert 'pred_score' not in data['data_samples'][0]
    losses = [TRAINING(model, data)['loss_branch'] for _ in range(2)]
    assert torch.equal(*losses), 'no dropout'


@pytest.mark.parametrize('kind', KINDS)
def test_a_whole_run_of_a_model_with_more_than_one_forward(runner_of, tmp_path, kind):
    change = {
        'model': {'_delete_': True, 'type': kind},
        'model.data_preprocessor': {'type': 'mmpretrain.ClsDataPreprocessor'},
    }
    runner = runner_of(distil=False, **copy.deepcopy(change))
    train(runner)
    work = tmp_path / 'run'
    small = load_slim(runner.cfg, work / 'slim.pth')
    assert compare(bare_model(runner.model), hook_of(runner).pruner.coupling, hook_of(runner).pruner.keep, small) < 1e-5
    later = slim_checkpoint(config(work, distil=False, **change), work / 'epoch_4.pth', tmp_path / 'later.pth')
    assert later['slim']['macs'] == read_slim(work / 'slim.pth')['meta']['slim']['macs']
    for name, value in read_slim(tmp_path / 'later.pth')['state_dict'].items():
        torch.testing.assert_close(value, small.state_dict()[name])


def test_parts_that_never_ran_are_named(runner_of, tmp_path):
    runner = runner_of(distil=False, **{'model.neck': {'_delete_': True, 'type': 'Idle'}})
    train(runner)
    assert 'neither testing nor training ran these, so they stay as they are: neck.idle' in log_of(tmp_path)


@MODELS.register_module()
class Idle(nn.Module):
    """A neck with a layer that nothing calls."""

    def __init__(self):
        super().__init__()
        self.idle, self.pool = nn.Linear(64, 64), nn.AdaptiveAvgPool2d(1)

    def forward(self, x):
        return tuple(self.pool(each).flatten(1) for each in x)


def log_of(folder):
    return next((folder / 'run').glob('*/*.log')).read_text()


# -- the proof ---------------------------------------------------------------------------------------------------------
def test_a_model_that_the_config_does_not_build_is_refused_before_training(tmp_path):
    cfg = config(tmp_path / 'run', distil=False)
    cfg.experiment_name = 'other'
    other = copy.deepcopy(cfg)
    other.model.backbone.depth = 34
    runner = Runner.from_cfg(cfg)
    runner.model = build_dense(other)
    with pytest.raises(SlimError, match=r'cannot be filled from slim.pth .* does the config build the model') as raised:
        runner.train()
    assert not isinstance(raised.value, ProofError), 'that says that training is done'
    assert runner.iter == 0 and not list((tmp_path / 'run').glob('*.pth*'))


def test_a_model_that_was_handed_over_is_proved_by_a_copy(tmp_path):
    cfg = config(tmp_path / 'run', distil=False)
    parts = {name: cfg[name] for name in ('train_dataloader', 'optim_wrapper', 'train_cfg', 'default_hooks')}
    runner = Runner(
        build_dense(cfg), str(tmp_path / 'run'), **parts, default_scope='mmpretrain', experiment_name='handed'
    )
    runner.train()
    content = read_slim(tmp_path / 'run' / 'slim.pth')
    assert content['meta']['slim']['macs'] <= 0.5 * content['meta']['dense']['macs']


@HOOKS.register_module()
class Spoil(Hook):
    """Change what the model computes after it was rehearsed, in a way that no file can hold."""

    priority = 'VERY_HIGH'

    def after_train(self, runner):
        bare_model(runner.model).head.register_forward_hook(lambda m, i, out: out + 1 if torch.is_tensor(out) else out)
        fc = bare_model(runner.model).head.fc
        fc.register_forward_hook(lambda m, i, out: out.flip(1))


def test_what_a_file_cannot_hold_leaves_no_slim_file_and_a_checkpoint_to_go_on_with(runner_of, tmp_path):
    runner = runner_of(custom_hooks=[{'type': 'Spoil'}], distil=False)
    train(runner)
    hook, work = hook_of(runner), tmp_path / 'run'
    assert isinstance(hook.failure, ProofError) and 'test_step' in str(hook.failure)
    assert not (work / 'slim.pth').exists() and not list(work.glob('*unproved*'))
    assert 'there is no slim.pth: test_step of a model that was built anew' in log_of(tmp_path)
    meta = slim_checkpoint(config(work, distil=False), work / 'unslimmed.pth', work / 'slim.pth')
    assert meta['slim']['macs'] <= 0.5 * meta['dense']['macs'] and load_slim(runner.cfg, work / 'slim.pth')


def test_a_file_that_was_not_proved_is_exit_status_4(capsys):
    def failing(args):
        raise ProofError('test_step differs')

    assert guard(failing, Config({'debug': False})) == 4
    assert capsys.readouterr().err == 'error: test_step differs\n'


@METRICS.register_module()
class Talkative(BaseMetric):
    """A metric whose results are not all numbers."""

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'share': np.float32(0.5), 'worst_class': 'c3', 'missing': None, 'per_class': np.arange(3)}


def test_metrics_and_metainfo_of_any_kind_end_in_a_slim_file(runner_of, tmp_path):
    runner = runner_of(val_evaluator={'_delete_': True, 'type': 'Talkative'}, distil=False)
    palette = np.array([[1, 2, 3]])
    runner.train_loop.dataloader.dataset._metainfo = {'classes': ('a', 'b'), 'palette': palette, 'draw': print}
    train(runner)
    meta = read_slim(tmp_path / 'run' / 'slim.pth')['meta']
    assert meta['slim']['metrics'] == {'share': 0.5}
    assert meta['dataset_meta'] == {'classes': ['a', 'b'], 'palette': [[1, 2, 3]]}
    assert 'draw of the metainfo is no plain value' in log_of(tmp_path)


class Counting(nn.Module):
    """A loss that counts the samples of each class and weighs by it, as SeesawLoss does."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer('seen', torch.zeros(3))
        self.last = None

    def forward(self, inputs, data_samples=None, mode='tensor'):
        z = self.last = self.fc(inputs)
        if mode == 'loss':
            self.seen += 1
            return {'loss': z.square().mean() * self.seen.sum()}
        return z


def test_asking_whether_a_pass_runs_changes_nothing():
    model, x = Counting(), torch.randn(2, 4)
    before = copy.deepcopy(model.state_dict())
    for each in (TRAINING, TESTING):
        assert runs(model, x, lambda net, data, each=each: net(data, mode=each.mode)) is None
    assert model.last is None and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert runs(model, x, lambda net, data: {}) == 'it returns no numbers'
