"""A run on a model whose training forward leaves tensors with a history on it."""

from __future__ import annotations

import pytest
from mmengine.runner import Runner
from torch import nn
from torch.nn.utils import prune

from mmcpd.engine.build import build_dense
from mmcpd.engine.slim_file import read_slim
from tests.test_engine.tiny_runs import config


def keep_last_input(module: nn.Module, inputs: tuple) -> None:
    """Store what came in, nested too, as visualisation hooks do."""
    if inputs[0].requires_grad or not hasattr(module, 'last'):
        module.last, module.history = inputs[0], [{'input': inputs[0]}]


@pytest.mark.parametrize('distil', [True])
def test_a_run_ends_with_a_slim_file(runner_of, tmp_path, distil):
    runner = runner_of(distil=distil)
    layers = list(getattr(runner.model, 'student', runner.model).backbone.children())
    for module in layers:
        module.register_forward_pre_hook(keep_last_input)
    runner.train()
    assert any(not module.last.is_leaf for module in layers if hasattr(module, 'last'))
    meta = read_slim(tmp_path / 'run' / 'slim.pth')['meta']
    assert meta['reached'] is True and meta['left']['macs'] <= 0.5


def test_a_run_on_a_model_that_torch_pruned(tmp_path):
    cfg = config(tmp_path / 'run', distil=False)
    parts = {name: cfg[name] for name in ('train_dataloader', 'optim_wrapper', 'train_cfg', 'default_hooks')}
    model = build_dense(cfg)
    convolution = model.backbone.layer1[0].conv1
    prune.l1_unstructured(convolution, 'weight', 0.3)
    runner = Runner(model, str(tmp_path / 'run'), **parts, default_scope='mmpretrain', experiment_name='pruned')
    runner.train()
    content = read_slim(tmp_path / 'run' / 'slim.pth')
    names = [f'backbone.layer1.0.conv1.weight_{kind}' for kind in ('orig', 'mask')]
    assert content['meta']['left']['macs'] <= 0.5
    assert len({tuple(content['state_dict'][name].shape) for name in names}) == 1
