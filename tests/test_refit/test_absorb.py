"""After `absorb_` the function is the same, and a norm's statistics are those of its input."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.refit import absorb_, refit
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, call, gap, randomise_, sample

IMAGES = sample((6, 3, 8, 8))


def net(**options):
    def run(m, x):
        x = m.bn1(m.conv1(x)).tanh()
        x = m.bn2(m.conv2(x)).tanh() + m.bn2(m.conv3(x))
        return m.fc(m.bn3(x.mean((2, 3))))

    torch.manual_seed(0)
    parts = dict(conv1=nn.Conv2d(3, 8, 3), bn1=nn.BatchNorm2d(8), conv2=nn.Conv2d(8, 6, 1), bn2=nn.BatchNorm2d(6))
    return Net(run, **parts, conv3=nn.Conv2d(8, 6, 1), bn3=nn.BatchNorm1d(6, **options), fc=nn.Linear(6, 4))


def test_the_function_stays_and_statistics_are_those_of_the_inputs():
    model = randomise_(net()).train()
    before = copy.deepcopy(model).eval()
    inputs = []
    handle = model.bn2.register_forward_hook(lambda m, args, out: inputs.append(args[0].movedim(1, 0).flatten(1)))
    done = absorb_(model, IMAGES.split(2))
    handle.remove()
    assert done.rewritten == ('bn1.running_mean', 'bn2.running_mean', 'bn3.running_mean') and not done.skipped
    assert model.training and model.bn1.training
    assert gap(before(IMAGES), copy.deepcopy(model).eval()(IMAGES)) < 1e-12
    read = torch.cat(inputs, 1)  # both calls of this norm, all batches
    assert torch.allclose(model.bn2.running_mean, read.mean(1), atol=1e-12)
    assert torch.allclose(model.bn2.running_var, read.var(1), atol=1e-12)
    assert not torch.allclose(before.bn2.running_var, read.var(1), atol=1e-2)


def test_training_sees_what_evaluation_saw():
    model = randomise_(net())
    model.bn2, model.bn3 = nn.Identity(), nn.Identity()
    before = model(IMAGES)
    jump = gap(before, copy.deepcopy(model).train()(IMAGES))
    absorb_(model, [IMAGES])
    assert gap(before, model.train()(IMAGES)) < 1e-2 < jump


def test_in_float32():
    model = randomise_(net()).float()
    before = model(IMAGES.float())
    absorb_(model, [IMAGES.float()])
    assert gap(before, model(IMAGES.float())) < 2e-6


def test_removed_channels_stay_zero():
    model = randomise_(net())
    coupling = comb(model, IMAGES[:1])
    keep = random_keep(coupling, 0.5, 0)
    done = refit(model, coupling, keep, [IMAGES])
    before = call(coupling, done.model)
    absorb_(done.model, [IMAGES])
    gone = ~keep['conv1']
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        values = getattr(done.model.bn1, name)
        assert not bool(values[gone].any()) and bool(values[~gone].any())
    after = call(coupling, done.model)
    assert gap(before, after) < 1e-12
    assert gap(after, call(coupling, slim(done.model, coupling, keep))) < 1e-9


def test_what_has_no_affine_is_left_alone():
    model = randomise_(net(affine=False))
    mean = model.bn3.running_mean.clone()
    (left,) = absorb_(model, [IMAGES]).skipped
    assert left.tensor == 'bn3.running_mean' and 'no weight and bias' in left.reason
    assert torch.equal(model.bn3.running_mean, mean)


def test_what_cannot_be_measured_is_refused():
    model = randomise_(net())
    with pytest.raises(ValueError, match='no batch to measure'):
        absorb_(model, [])
    with pytest.raises(ValueError, match="'bn1.running_mean' reads values that are not finite"):
        absorb_(model, [IMAGES * float('inf')])


def test_another_forward():
    model = randomise_(net())
    assert absorb_(model, [IMAGES], forward=lambda m, x: m.bn1(m.conv1(x))).rewritten == ('bn1.running_mean',)
