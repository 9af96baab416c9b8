"""What other hooks switch in a model while it trains is no fault of its slim file, unless predictions depend on it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS
from torch import nn

from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.proof import Preprocessed, prove
from mmcpd.engine.switched import switched
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import ProofError

from .test_proof import Digits, log_of
from .tiny_runs import hook_of, train


@MODELS.register_module()
class TwoRecipes(Digits):
    """A loss that is another one at the end of training, by a flag and by a module."""

    def __init__(self, **options):
        super().__init__(**options)
        self.late, self.measure = False, nn.CrossEntropyLoss()

    def losses(self, features, labels):
        logits = self.logits(features)
        found = {'loss': self.measure(logits, F.one_hot(labels, 10).float())}
        return found | ({'loss_l1': logits.abs().mean()} if self.late else {})


@HOOKS.register_module()
class SwitchRecipe(Hook):
    """What MMDetection's YOLOXModeSwitchHook and MMPretrain's SwitchRecipeHook do to a model."""

    def before_train_epoch(self, runner):
        if runner.epoch == 3:
            model = bare_model(runner.model)
            model.late, model.measure = True, nn.MSELoss()


def test_a_loss_that_another_hook_switches_is_named_and_the_file_written(runner_of, tmp_path):
    preprocessor = {'type': 'mmpretrain.ClsDataPreprocessor'}
    change = {'model': {'_delete_': True, 'type': 'TwoRecipes'}, 'model.data_preprocessor': preprocessor}
    runner = runner_of(distil=False, custom_hooks=[{'type': 'SwitchRecipe'}], **change)
    train(runner)
    assert bare_model(runner.model).late
    assert 'something else changed late, measure: a model' in log_of(tmp_path)
    small = load_slim(runner.cfg, tmp_path / 'run' / 'slim.pth')
    assert not small.late and isinstance(small.measure, nn.CrossEntropyLoss)


class Silent(nn.Module):
    """Predicts nothing of a dark picture, and of others what a setting scales; the loss is of all."""

    def __init__(self, scale):
        super().__init__()
        self.fc, self.scale = nn.Linear(3, 3), scale
        nn.init.ones_(self.fc.weight)
        self.data_preprocessor = lambda data, _training: data

    def forward(self, inputs, mode):
        y = self.fc(inputs)
        return {'loss': (y * self.scale).abs().mean()} if mode == 'loss' else y * self.scale * (y.sum() > 0)


@pytest.mark.parametrize('bright', [(False, True), (True, False)])
def test_predictions_of_every_batch_are_compared_without_what_was_switched(bright):
    torch.manual_seed(0)
    trained, built = Silent(2.0), Silent(1.0)
    built.load_state_dict(trained.state_dict())
    settings = switched(built, trained)
    assert settings == {'scale': 2.0}
    batches = [Preprocessed({'inputs': torch.full((2, 3), 5.0 if each else -5.0)}) for each in bright]
    with pytest.raises(ProofError, match='test_step'):
        prove(trained, built, batches, settings)
    assert built.scale == 1.0


@HOOKS.register_module()
class Double(Hook):
    """Changes what the model predicts by a number that no file holds."""

    def before_train_epoch(self, runner):
        bare_model(runner.model).factor = 2.0


@MODELS.register_module()
class Scaled(Digits):
    factor = 1.0

    def logits(self, features):
        return self.factor * super().logits(features)


def test_a_setting_that_predictions_depend_on_is_no_matter_of_a_recipe(runner_of, tmp_path):
    preprocessor = {'type': 'mmpretrain.ClsDataPreprocessor'}
    change = {'model': {'_delete_': True, 'type': 'Scaled'}, 'model.data_preprocessor': preprocessor}
    runner = runner_of(distil=False, custom_hooks=[{'type': 'Double'}], **change)
    train(runner)
    assert isinstance(hook_of(runner).failure, ProofError) and 'test_step' in str(hook_of(runner).failure)
    assert not (tmp_path / 'run' / 'slim.pth').exists()
