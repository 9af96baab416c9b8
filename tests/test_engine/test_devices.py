"""A run trains, prunes and ends on the device that MMEngine picks, and its files open where there is no such device."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mmengine.device import get_device
from mmengine.runner import Runner

from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model
from mmcpd.nested import tensors_in
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import in_double
from tests.helpers import CONTROL, EXACT, gap
from tests.test_engine.tiny_runs import AT_ONCE, X, config, hook_of, train

CUDA = pytest.mark.cuda


@pytest.mark.parametrize('changes', [{'prune.importance': 'hessian'}, {'prune.importance': 'group_fisher'}, AT_ONCE])
@pytest.mark.parametrize(
    ('device', 'wrapper'),
    [
        ('cpu', 'OptimWrapper'),
        pytest.param('cuda', 'OptimWrapper', marks=CUDA),
        pytest.param('cuda', 'AmpOptimWrapper', marks=CUDA),
    ],
)
def test_a_run_ends_in_the_slim_model_of_the_masked_one(device, wrapper, changes, tmp_path):
    assert get_device() == device
    runner = Runner.from_cfg(config(tmp_path / 'run', **{'optim_wrapper.type': wrapper}, **changes))
    watch = train(runner)
    assert 0.4 < watch.left[-1] <= 0.5 and watch.taught[-1]
    masked, pruner = bare_model(runner.model).eval(), hook_of(runner).pruner
    assert next(masked.parameters()).device.type == device

    twin, example = in_double(masked, pruner.coupling.example)
    coupling = replace(pruner.coupling, example=example)
    assert compare(twin, coupling, pruner.keep) < EXACT
    turned = {name: kept.roll(1) for name, kept in pruner.keep.items()}
    assert compare(twin, coupling, pruner.keep, slim(twin, coupling, turned)) > CONTROL

    path = tmp_path / 'run' / 'slim.pth'
    assert {tensor.device.type for tensor in tensors_in(read_slim(path)['state_dict'])} == {'cpu'}
    small = load_slim(runner.cfg, path)
    assert gap(masked.cpu()(X), small(X)) < 1e-5
