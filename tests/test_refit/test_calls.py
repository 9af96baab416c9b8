"""Layers that are called before anything was lost, or not equally often, and convolution groups that go."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.refit import refit
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, masked, randomise_, sample


def built(run, **parts):
    torch.manual_seed(0)
    return randomise_(Net(run, **parts)).eval()


def halved(model, coupling, *names):
    """Keep half of the units of some groups, and all others."""
    return random_keep(coupling, 0.5, 0, among=set(names))


def early(m, x):
    x = m.shared(x).tanh()
    x = x + m.shared(m.down(m.up(x).tanh()))
    return m.out(x)


def early_bias(m, x):
    x = m.first(x).tanh()
    return m.out(x + nn.functional.linear(m.up(x).tanh(), m.down.weight, m.first.bias))


@pytest.mark.parametrize('run', [early, early_bias])
def test_what_ran_before_the_first_loss_stays(run):
    parts = dict(shared=nn.Linear(6, 6), first=nn.Linear(6, 6), up=nn.Linear(6, 16), down=nn.Linear(16, 6))
    model = built(run, **parts, out=nn.Linear(6, 4))
    x = sample((40, 6))
    coupling = comb(model, x)
    done = refit(model, coupling, halved(model, coupling, 'up'), [x])
    written = {layer.tensor for layer in done.report.refitted} | {layer.intercept for layer in done.report.refitted}
    assert 'down.weight' in written and not written & {'shared.weight', 'shared.bias', 'first.weight', 'first.bias'}
    for name in ('shared', 'first'):
        old, new = (getattr(each, name) for each in (model, done.model))
        assert torch.equal(old.weight, new.weight) and torch.equal(old.bias, new.bias)
    if run is early:
        assert 'it is also called before anything was lost' in str(done.report)


def test_each_batch_counts_with_the_calls_that_it_has():
    def run(m, x):  # tokens (N, T, C), one after the other
        state = x.new_zeros(len(x), m.step.in_features)
        for token in x.unbind(1):
            state = (m.read(token) + m.step(state)).tanh()
        return m.out(state)

    model = built(run, read=nn.Linear(5, 12), step=nn.Linear(12, 12), out=nn.Linear(12, 4))
    long, short = sample((30, 6, 5)), sample((50, 4, 5)) * 2
    coupling = comb(model, long)
    keep = random_keep(coupling, 0.6, 0)
    both, one = (refit(model, coupling, keep, each) for each in ([long, short], [long]))
    assert not both.report.undone and not one.report.undone
    assert not torch.equal(both.model.step.weight, one.model.step.weight), 'the second batch was left out'
    other = refit(model, coupling, keep, [long, short * 3])
    assert not torch.equal(both.model.step.weight, other.model.step.weight)


@pytest.mark.parametrize('width', [1, 2])
def test_a_convolution_group_that_goes_takes_its_outputs_along(width):
    up = nn.ConvTranspose2d(8, 8, 2, 2, groups=8 // width)
    model = built(lambda m, x: m.out(m.up(m.stem(x).tanh()).tanh()), stem=nn.Conv2d(3, 8, 1), up=up, out=nn.Conv2d(8, 3, 1))  # fmt: skip  # noqa: E501
    x = sample((8, 3, 5, 5))
    coupling = comb(model, x)
    keep = random_keep(coupling, 0.5, 0)
    done = refit(model, coupling, keep, [x], samples=1000)
    gone = (masked(model, coupling, keep).up.bias == 0).nonzero().flatten()
    assert len(gone) and bool((done.model.up.bias[gone] == 0).all())
    (layer,) = (layer for layer in done.report.refitted if layer.tensor == 'up.weight')
    assert layer.before < 1e-20 and layer.after < 1e-20, 'what is left of it lost nothing'
