"""Scores against autograd through gates that multiply activations, which is what they claim to be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmcpd.prune.gates import Gates
from mmcpd.prune.importance import (
    IMPORTANCES,
    Importance,
    build_importance,
    check_importance,
    register_importance,
)
from mmcpd.prune.normalize import NORMALIZERS, normalize
from mmcpd.prune.scores import Hessian
from tests.test_prune.gate_nets import NETS, Concat, ConvBNReLU, Residual, assert_close, built, loss_of, ones, step


@pytest.mark.parametrize('cls', NETS)
def test_gate_gradient_is_that_of_autograd(cls):
    net, coupling, x, target = built(cls)
    gates = ones(net)
    expected = torch.autograd.grad(loss_of(net, x, target, gates), list(gates.values()))
    step(net, x, target)
    found = Gates(coupling.groups)
    assert_close(found.split(found.gradient(net)), dict(zip(gates, expected, strict=True)), rtol=1e-9)


@pytest.mark.parametrize('cls', NETS)
def test_hessian_sums_squares_over_iterations(cls):
    net, coupling, x, target = built(cls)
    score = build_importance('hessian', coupling.groups)
    expected = dict.fromkeys(net.sites, 0)
    for batch in (x, x.flip(-1) + 1):
        gates = ones(net)
        for name, g in zip(
            gates, torch.autograd.grad(loss_of(net, batch, target, gates), list(gates.values())), strict=True
        ):
            expected[name] = expected[name] + g.square()
        step(net, batch, target)
        score.accumulate(net)
    assert score.iterations == 2
    assert_close(score.scores(), expected)
    score.reset()
    assert score.iterations == 0 and not any(s.any() for s in score.scores().values())


@pytest.mark.parametrize('cls', NETS)
def test_curvature_is_the_hessian_vector_product(cls):
    net, coupling, x, target = built(cls)
    score = build_importance({'type': 'curvature', 'probes': 2, 'step': 1e-6, 'seed': 3}, coupling.groups)
    step(net, x, target)
    score.accumulate(net, closure=lambda: loss_of(net, x, target).backward())

    generator = torch.Generator().manual_seed(3)
    expected = dict.fromkeys(net.sites, 0)
    order = [g.name for g in coupling.groups]
    for _ in range(2):
        z = score.gates.split(torch.randn(score.gates.units, generator=generator, dtype=torch.float64))
        gates = ones(net)
        inner = torch.autograd.grad(loss_of(net, x, target, gates), [gates[n] for n in order], create_graph=True)
        dot = sum((g * z[n]).sum() for n, g in zip(order, inner, strict=True))
        for n, hz in zip(order, torch.autograd.grad(dot, [gates[n] for n in order]), strict=True):
            expected[n] = expected[n] + hz.square() / 2
    assert_close(score.scores(), expected, rtol=1e-4)


@pytest.mark.parametrize('cls', NETS)
def test_group_fisher_squares_sample_by_sample(cls):
    net, coupling, x, target = built(cls)
    gates = ones(net, len(x))
    expected = torch.autograd.grad(loss_of(net, x, target, gates), list(gates.values()))
    score = build_importance('group_fisher', coupling.groups)
    score.attach(net)
    step(net, x, target)
    score.accumulate(net)
    assert_close(score.scores(), {n: g.square().sum(0) for n, g in zip(gates, expected, strict=True)})


def test_group_fisher_counts_accumulated_batches_as_samples_and_undoes_the_loss_scale():
    net, coupling, x, target = built(Concat)
    whole, parts = build_importance('group_fisher', coupling.groups), build_importance('group_fisher', coupling.groups)
    whole.attach(net)
    step(net, x[:4], target[:4])
    whole.accumulate(net)
    whole.detach()
    parts.attach(net)
    net.zero_grad()
    for half in (slice(0, 2), slice(2, 4)):
        parts.next_batch()
        (loss_of(net, x[half], target[half]) / 2 * 1024).backward()
    parts.accumulate(net, loss_scale=1024.0)
    assert_close(parts.scores(), whole.scores())
    parts.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_group_fisher_says_what_it_cannot_see():
    net, coupling, x, target = built(Residual)
    score = build_importance('group_fisher', coupling.groups)
    with pytest.raises(ValueError, match=r'attach\(model\)'):
        score.accumulate(net)
    score.attach(net)
    net.fc.forward = lambda x: x @ net.fc.weight.T + net.fc.bias  # no call of a layer's function
    step(net, x, target)
    with pytest.raises(ValueError, match=r"cannot score 'fc\.weight'.*ignore=\['stem'\] of comb"):
        score.accumulate(net)


def test_curvature_leaves_no_trace():
    net, coupling, x, target = built(ConvBNReLU)
    net.drop = nn.Dropout(0.5)
    step(net, x, target)
    before = copy.deepcopy(net.state_dict())
    grads = {n: (p.grad, p.grad.clone()) for n, p in net.named_parameters()}
    state = torch.get_rng_state()

    def closure():
        F.cross_entropy(net.drop(net(x, {})), target).backward()

    build_importance('curvature', coupling.groups).accumulate(net, closure=closure)
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, parameter in net.named_parameters():
        assert parameter.grad is grads[name][0] and torch.equal(parameter.grad, grads[name][1]), name
    with pytest.raises(ValueError, match='closure'):
        build_importance('curvature', coupling.groups).accumulate(net)


@pytest.mark.parametrize('bad', [torch.nan, torch.inf])
@pytest.mark.parametrize('name', ['hessian', 'group_fisher', 'curvature'])
def test_a_gradient_that_is_not_finite_never_enters(name, bad):
    net, coupling, x, target = built(ConvBNReLU)
    score = build_importance(name, coupling.groups)
    score.attach(net)

    def closure(scale=1.0):
        (loss_of(net, x, target) * scale).backward()

    closure()
    score.accumulate(net, closure=closure)
    good = {n: s.clone() for n, s in score.scores().items()}
    net.zero_grad()
    closure(bad)
    score.accumulate(net, closure=closure)
    assert (score.iterations, score.skipped) == (1, 1)
    assert all(torch.equal(s, good[n]) for n, s in score.scores().items())


def test_a_frozen_consumer_is_refused_and_an_unused_one_adds_nothing():
    net, coupling, x, target = built(ConvBNReLU)
    score = Hessian(coupling.groups)
    score.accumulate(net)  # no backward yet: no gradient at all
    assert not any(s.any() for s in score.scores().values())
    net.conv2.weight.requires_grad_(False)
    step(net, x, target)
    with pytest.raises(
        ValueError, match=r"groups \['conv1'\].*requires_grad=False on conv2\.weight.*ignore=\['conv1'\] of comb"
    ):
        score.accumulate(net)
    with pytest.raises(ValueError, match=r"no parameter 'conv2\.weight'"):
        score.accumulate(nn.Sequential(net))


@pytest.mark.parametrize(('p', 'roles'), [(1, ('out',)), (2, ('out', 'in'))])
def test_magnitude_adds_up_members(p, roles):
    net, coupling, _, _ = built(ConvBNReLU)
    score = build_importance({'type': 'magnitude', 'p': p, 'roles': roles}, coupling.groups)
    for _ in range(2):  # the newest counts, not the sum
        score.accumulate(net)
    expected = net.conv1.weight.abs().pow(p).sum((1, 2, 3))
    if 'in' in roles:
        expected = expected + net.conv2.weight.abs().pow(p).sum((0, 2, 3))
    torch.testing.assert_close(score.scores()['conv1'].double(), expected.detach(), rtol=1e-6, atol=0)


def test_random_repeats_with_its_seed_and_draws_anew_after_reset():
    _, coupling, _, _ = built(ConvBNReLU)
    a, b, other = (build_importance({'type': 'random', 'seed': s}, coupling.groups) for s in (1, 1, 2))
    state = torch.get_rng_state()
    first = a.scores()['conv1']
    assert torch.equal(first, b.scores()['conv1']) and not torch.equal(first, other.scores()['conv1'])
    a.reset()
    assert not torch.equal(first, a.scores()['conv1'])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('name', sorted(IMPORTANCES))
def test_a_score_goes_on_from_its_state(name):
    net, coupling, x, target = built(Concat)
    whole, resumed = build_importance(name, coupling.groups), build_importance(name, coupling.groups)

    def feed(score):
        score.attach(net)
        step(net, x, target)
        outputs = score.needs_outputs
        score.accumulate(net, closure=lambda: [net(x, {})] if outputs else loss_of(net, x, target).backward())
        score.detach()

    feed(whole)
    whole.reset()
    feed(whole)
    resumed.load_state_dict(whole.state_dict())
    feed(whole)
    feed(resumed)
    assert (resumed.iterations, resumed.skipped) == (whole.iterations, whole.skipped)
    for group, value in whole.scores().items():
        assert torch.equal(value, resumed.scores()[group])
    with pytest.raises(ValueError, match='saved scores are of 13 units, the model has 8'):
        resumed.load_state_dict({**whole.state_dict(), 'total': torch.zeros(13)})


def test_the_table_takes_each_name_once():
    with pytest.raises(ValueError, match='already registered, by Hessian'):
        register_importance('hessian')(Importance)


@pytest.mark.parametrize(
    ('spec', 'message'),
    [
        ('hesian', "unknown importance 'hesian': did you mean hessian"),
        (None, 'importance needs a type'),
        ({'probes': 2}, 'importance needs a type'),
        ({'type': 'curvature', 'probe': 1}, "importance 'curvature' has no option 'probe': did you mean probes"),
        ({'type': 'hessian', 'groups': ()}, "importance 'hessian' has no option 'groups'"),
        ({'type': 'curvature', 'probes': 0}, 'probes >= 1'),
        ({'type': 'magnitude', 'p': 3}, 'p=1 or p=2, got 3'),
        ({'type': 'magnitude', 'roles': ('outt',)}, "unknown role 'outt': did you mean out"),
    ],
)
def test_an_importance_is_checked_before_there_is_a_model(spec, message):
    with pytest.raises(ValueError, match=message):
        check_importance(spec)


def test_the_options_may_name_a_seed_of_their_own():
    _, coupling, _, _ = built(Concat)
    specs = (('random', 1), ({'type': 'random', 'seed': 1}, 2), ('random', 2))
    a, b, other = (build_importance(spec, coupling.groups, seed=seed).scores()['left'] for spec, seed in specs)
    assert torch.equal(a, b) and not torch.equal(a, other)


def test_group_fisher_does_not_watch_a_copy_of_the_model():
    net, coupling, x, target = built(Residual)
    found = []
    for batches_of_a_copy in (0, 1):
        score = build_importance('group_fisher', coupling.groups)
        score.attach(net)
        step(net, x, target)
        for _ in range(batches_of_a_copy):
            loss_of(copy.deepcopy(net), x + 1, target).backward()
        score.accumulate(net)
        score.detach()
        found.append(score.scores())
    assert_close(found[1], found[0])


def test_normalizers_divide_by_what_removal_saves():
    net, coupling, x, target = built(ConvBNReLU)
    step(net, x, target)
    score = Hessian(coupling.groups)
    score.accumulate(net)
    keep = coupling.keep()
    keep['conv1'][:2] = False
    saved = coupling.marginal(keep)['conv1']
    raw = score.scores()['conv1']
    divisor = {
        'none': 1,
        'macs': saved.macs,
        'params': saved.params,
        'channel_memory': saved.memory,
        'memory': saved.memory * 5,
    }
    assert divisor.keys() == NORMALIZERS.keys() - {'latency'}  # tests/test_prune/test_latency.py
    for by, value in divisor.items():
        torch.testing.assert_close(normalize(score.scores(), coupling, keep, by=by)['conv1'], raw / value)
    # 6x6 positions of conv1, 4 bytes each: worked out by hand
    assert saved.memory == 6 * 6 * 4
    with pytest.raises(ValueError, match="unknown normalizer 'memry': did you mean memory"):
        normalize(score.scores(), coupling, keep, by='memry')
