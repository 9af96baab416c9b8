"""Scores against autograd through gates that multiply activations, which is what they claim to be."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmcpd.comb import comb
from mmcpd.prune.gates import Gates, row_dot, untouched
from mmcpd.prune.importance import (
    IMPORTANCES,
    Importance,
    build_importance,
    check_importance,
    register_importance,
)
from mmcpd.prune.normalize import NORMALIZERS, normalize
from mmcpd.prune.scores import Hessian

Gate = dict[str, Tensor]


def gated(x: Tensor, gates: Gate, name: str, dim: int = 1) -> Tensor:
    """Multiply an activation by its gates, (units,) or (N, units), where there are any."""
    if name not in gates:
        return x
    gate = gates[name]
    shape = [1] * x.dim()
    shape[dim] = gate.shape[-1]
    if gate.dim() == 2:
        shape[0] = gate.shape[0]
    return x * gate.reshape(shape)


class ConvBNReLU(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv1': 7, 'conv2': 6}

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.conv2 = nn.Conv2d(7, 6, 3)
        self.fc = nn.Linear(6 * 4, 4)

    def forward(self, x, gates):
        x = gated(self.bn1(self.conv1(x)).relu(), gates, 'conv1')
        x = gated(self.conv2(x).tanh(), gates, 'conv2')
        return self.fc(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Residual(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'stem': 6, 'conv1': 4}

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.conv1, self.bn1, self.conv2 = (
            nn.Conv2d(6, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.Conv2d(4, 6, 1),
        )
        self.fc = nn.Linear(6, 4)

    def forward(self, x, gates):
        x = self.bn(self.stem(x)).relu()
        y = self.conv2(gated(self.bn1(self.conv1(gated(x, gates, 'stem'))).relu(), gates, 'conv1'))
        # The stem's unit is one stream: gated where it is read, by conv1 and by the classifier.
        return self.fc(gated((x + y).relu(), gates, 'stem').mean((2, 3)))


class Concat(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'left': 3, 'right': 5}

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 3, padding=1)
        self.mix = nn.Conv2d(8, 4, 1)

    def forward(self, x, gates):
        left, right = gated(self.left(x).relu(), gates, 'left'), gated(self.right(x).relu(), gates, 'right')
        return self.mix(torch.cat([left, right], 1)).mean((2, 3))


class Depthwise(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 6}

    def __init__(self):
        super().__init__()
        self.conv, self.dw = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, groups=6)
        self.bn, self.out = nn.BatchNorm2d(6), nn.Conv2d(6, 4, 1)

    def forward(self, x, gates):
        return self.out(gated(self.bn(self.dw(self.conv(x).relu())).relu(), gates, 'conv')).mean((2, 3))


class Grouped(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 3}

    def __init__(self):
        super().__init__()
        self.conv, self.grouped = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 9, 3, groups=3)
        self.out = nn.Conv2d(9, 4, 1)

    def forward(self, x, gates):
        x = self.grouped(self.conv(x).relu()).relu()
        if 'conv' in gates:  # a unit is a whole convolution group: 3 channels of the 9
            x = gated(x, {'conv': gates['conv'].repeat_interleave(3, dim=-1)}, 'conv')
        return self.out(x).mean((2, 3))


class Attention(nn.Module):
    """Two heads of four; the widths of query and value are gated, each the same index in both heads."""

    inputs = (5, 7, 3)
    sites: ClassVar = {'q': 4, 'v': 4}

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(3, 8)
        self.proj = nn.Linear(8, 4)
        self.heads, self.scale = 2, 4**-0.5

    def forward(self, x, gates):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, v = gated(q, gates, 'q', -1), gated(v, gates, 'v', -1)
        x = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2)).mean(1)


NETS = [ConvBNReLU, Residual, Concat, Depthwise, Grouped, Attention]


def built(cls, seed=0):
    torch.manual_seed(seed)
    net = cls().double()
    x = torch.randn(*cls.inputs, dtype=torch.float64)
    target = torch.randint(4, (cls.inputs[0],))
    coupling = comb(net, (x[:1], {}))
    assert {g.name: g.units for g in coupling.groups} == cls.sites, coupling
    return net.train(), coupling, x, target


def loss_of(net, x, target, gates=None):
    return F.cross_entropy(net(x, gates or {}), target)


def ones(net, *size):
    return {n: torch.ones(*size, u, dtype=torch.float64, requires_grad=True) for n, u in net.sites.items()}


def step(net, x, target):
    net.zero_grad()
    loss_of(net, x, target).backward()


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol=1e-5):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 1e-12, f'{name}: the reference is zero, this compares nothing'
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol * float(value.abs().max()), msg=name)


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


def test_untouched_restores_after_an_exception():
    net = nn.Linear(2, 2)
    weight = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match='planned'), untouched(net):
        net.weight.data.zero_()
        net.weight.grad = torch.ones(2, 2)
        raise RuntimeError('planned')
    assert torch.equal(net.weight, weight) and net.weight.grad is None


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


@pytest.mark.parametrize('shape', [(7,), (5, 7), (300, 400), (9, 5, 3, 3), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_row_dot(shape, dtype):
    torch.manual_seed(0)
    w, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    layouts = [(w, g)]
    if len(shape) == 4:
        layouts.append((w.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)))
    for dim in range(len(shape)):
        product = w.double() * g.double()
        expected = product.movedim(dim, 0).flatten(1).sum(1) if len(shape) > 1 else product
        for a, b in layouts:
            found = row_dot(a, b, dim)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


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
    assert divisor.keys() == NORMALIZERS.keys()
    for by, value in divisor.items():
        torch.testing.assert_close(normalize(score.scores(), coupling, keep, by=by)['conv1'], raw / value)
    # 6x6 positions of conv1, 4 bytes each: worked out by hand
    assert saved.memory == 6 * 6 * 4
    with pytest.raises(ValueError, match="unknown normalizer 'memry': did you mean memory"):
        normalize(score.scores(), coupling, keep, by='memry')
