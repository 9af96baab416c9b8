"""The Gauss-Newton score against autograd through explicit gates, on every kind of layer call that it reads."""

from __future__ import annotations

import copy
import json
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmcpd.comb import comb
from mmcpd.prune import Pruner, Schedule, normalize, score, select
from mmcpd.prune.importance import build_importance
from mmcpd.prune.layouts import FIRST, Layout, find_layouts
from mmcpd.prune.per_sample import sample_dot
from mmcpd.slim import slim
from mmcpd.slim.compare import compare, tensors_in
from tests.helpers import Net, on_two_processes
from tests.test_prune.test_importance import NETS, ConvBNReLU, assert_close, built, gated, ones


class Narrowed(nn.Module):
    """A shuffle behind grouped convolutions: the same channel of each group goes, and is read inside the groups."""

    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 4, 'g1': 2, 'g2': 4}

    def __init__(self):
        super().__init__()
        self.conv, self.g1 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.g2, self.out = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)

    def forward(self, x, gates):
        wide = {name: gate.repeat_interleave(2 if name == 'g1' else 1, -1) for name, gate in gates.items()}
        wide = {name: torch.cat([gate, gate], -1) for name, gate in wide.items()}
        x = self.g1(gated(self.conv(x).relu(), wide, 'conv')).relu()
        x = gated(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), wide, 'g1')
        return self.out(gated(self.g2(x).relu(), wide, 'g2')).mean((2, 3))


class Functional(nn.Module):
    """Halves of a weight in functions, one convolution called twice, and padding in its own forward."""

    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'a': 6, 'b': 3}

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3)
        self.twice, self.fc = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x, gates):
        gates = {name: gate.repeat(*[1] * (gate.dim() - 1), 2) if name == 'b' else gate for name, gate in gates.items()}
        x = gated(self.a(x).relu(), gates, 'a')
        top, bottom = self.b.weight.chunk(2)
        first, second = self.b.bias.chunk(2)
        x = torch.cat([F.conv2d(x, top, first, padding=1), F.conv2d(F.pad(x, (1, 1, 1, 1)), bottom, second)], 1)
        for _ in range(2):
            x = F.conv2d(F.pad(gated(x.tanh(), gates, 'b'), (1, 1, 1, 1)), self.twice.weight)
        return F.linear(gated(x.mean((2, 3)), gates, 'b'), self.fc.weight)


class Transposed(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 6, 'up': 5}

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.out = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(5, 4, 1)

    def forward(self, x, gates):
        x = self.up(gated(self.conv(x).relu(), gates, 'conv'))
        return self.out(gated(x.tanh(), gates, 'up')).mean((2, 3))


class Computed(nn.Module):
    """Weights that the forward computes: standardised, scaled by a parameter, scaled by a number."""

    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'a': 6, 'b': 5}

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1, bias=False)
        self.gain = nn.Parameter(torch.rand(5, 1, 1, 1) + 0.5)

    def forward(self, x, gates):
        x = gated(self.a(x).relu(), gates, 'a')
        x = gated(F.conv2d(x, self.b.weight * self.gain).tanh(), gates, 'b')
        return F.conv2d(x, self.c.weight * 0.5).mean((2, 3))


class TokensFirst(nn.Module):
    """Tokens (L, N, C), and the samples as the inner part of (L * N, C)."""

    inputs = (5, 7, 3)
    sites: ClassVar = {'a': 6, 'b': 5}

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x, gates):
        x = gated(self.a(x).relu(), gates, 'a', -1).transpose(0, 1)  # (L, N, C)
        tokens, samples = x.shape[:2]
        x = self.b(x).tanh().transpose(0, 1)
        x = gated(x, gates, 'b', -1).transpose(0, 1).reshape(tokens * samples, -1)
        return self.c(x).unflatten(0, (tokens, samples)).mean(0)


class Torchs(nn.Module):
    """torch's own attention; its gates are put on queries and on what the values became."""

    inputs = (5, 7, 6)
    sites: ClassVar = {'embed': 8, 'attention.in_proj': 4, 'attention.out_proj': 8}

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 4)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x, gates):
        x = gated(self.embed(x), gates, 'embed', -1).transpose(0, 1)  # (L, N, C)
        if gates:
            x = self.explicit(x.transpose(0, 1), gates).transpose(0, 1)
        else:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(gated(x.transpose(0, 1), gates, 'attention.out_proj', -1)).mean(1)

    def explicit(self, x, gates):
        q, k, v = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        x = ((gated(q, gates, 'attention.in_proj', -1) / 2) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.attention.out_proj(gated(x, gates, 'attention.in_proj', -1).transpose(1, 2).flatten(2))


LAYERS = [Narrowed, Functional, Transposed, Computed, TokensFirst, Torchs]


def drawn(z, generator):
    """Return the r that the score draws for an output, before it is divided by the spread."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=z.dtype)


def expected_squares(net, x):
    """Return the score of one batch by autograd through gates of each sample, with the r that the score draws."""
    net.eval()
    gates = ones(net, len(x))
    z = net(x, gates)
    r = drawn(z, torch.Generator().manual_seed(0)) / z.detach().std(correction=0)
    grads = torch.autograd.grad((r * z).sum(), list(gates.values()))
    return {name: g.detach().square().sum(0) for name, g in zip(gates, grads, strict=True)}


def scored(net, coupling, x, **options):
    return score(net, coupling, [(x, {})], importance={'type': 'gauss_newton', **options})


@pytest.mark.parametrize('cls', [*NETS, *LAYERS])
def test_the_score_is_autograds_through_gates(cls):
    net, coupling, x, _ = built(cls)
    expected = expected_squares(net, x)
    assert_close(scored(net.train(), coupling, x), expected)
    with pytest.raises(AssertionError):  # the batch's gradient squared is another score
        gates = ones(net)
        z = net(x, gates)
        grads = torch.autograd.grad(z.sum(), list(gates.values()))
        assert_close({n: g.square() for n, g in zip(gates, grads, strict=True)}, expected)


@pytest.mark.parametrize('cls', [ConvBNReLU, TokensFirst])
def test_the_mean_over_draws_is_the_gauss_newton_diagonal(cls):
    net, coupling, x, _ = built(cls)
    net.eval()
    spread = net(x, {}).detach().std(correction=0)
    jacobian = torch.autograd.functional.jacobian(lambda *gates: net(x, dict(zip(net.sites, gates, strict=True))),
                                                  tuple(ones(net, len(x)).values()))  # fmt: skip
    # (N, classes, N, units) each: only the diagonal over samples is not zero
    expected = {n: (j / spread).square().sum((0, 1, 2)) for n, j in zip(net.sites, jacobian, strict=True)}
    found = scored(net, coupling, x, draws=2000)
    assert_close(found, expected, rtol=0.1)
    with pytest.raises(AssertionError):
        assert_close(scored(net, coupling, x, draws=1), expected, rtol=0.1)


def test_several_batches_share_one_scale_and_draws_are_averaged():
    net, coupling, x, _ = built(ConvBNReLU)
    net.eval()
    batches = [x[:2], 3 * x[2:]]
    generator, seen, expected = torch.Generator().manual_seed(0), [], dict.fromkeys(net.sites, 0)
    for batch in batches:
        gates = ones(net, len(batch))
        z = net(batch, gates)
        seen.append(z.detach().flatten())
        for _ in range(3):
            r = drawn(z, generator) / torch.cat(seen).std(correction=0)
            grads = torch.autograd.grad((r * z).sum(), list(gates.values()), retain_graph=True)
            for name, g in zip(gates, grads, strict=True):
                expected[name] = expected[name] + g.square().sum(0) / 3
    steps = []
    options = {'type': 'gauss_newton', 'draws': 3}
    found = score(net, coupling, [(b, {}) for b in batches], importance=options, progress=lambda *n: steps.append(n))
    assert_close(found, expected)
    assert steps == [(1, 2), (2, 2)]
    with pytest.raises(AssertionError):
        assert_close(score(net, coupling, [(b, {}) for b in batches], importance=options, seed=1), expected)


def test_a_softmax_ignores_a_shift_of_all_classes():
    """A layer that moves all classes alike has no score with softmax=True."""
    torch.manual_seed(0)
    net = Net(lambda m, x: m.shift(m.a(x).relu()) + m.c(m.b(x).relu()),
              a=nn.Linear(3, 6), shift=nn.Linear(6, 1), b=nn.Linear(3, 5), c=nn.Linear(5, 4)).double()  # fmt: skip
    x = torch.randn(9, 3).double()
    coupling = comb(net, x)
    with_softmax, without = (
        score(net, coupling, [x], importance={'type': 'gauss_newton', 'softmax': softmax}) for softmax in (True, False)
    )
    assert float(with_softmax['a'].max()) < 1e-25 < 1e-3 < float(without['a'].max())
    assert float(with_softmax['b'].max()) > 1e-3
    one = Net(lambda m, x: m.b(m.a(x).relu()), a=nn.Linear(3, 6), b=nn.Linear(6, 1)).double()
    found = score(one, comb(one, x), [x], importance={'type': 'gauss_newton', 'softmax': True})
    assert float(found['a'].max()) > 1e-3, 'of one class nothing is taken off'


def test_any_output_counts_by_its_spread():
    """Maps, logits in nested containers and integers; each tensor is divided by its standard deviation."""
    torch.manual_seed(0)
    parts = {'a': nn.Conv2d(3, 6, 1), 'map': nn.Conv2d(6, 2, 1), 'fc': nn.Linear(6, 4)}

    def net_of(factor):
        def run(m, x):
            x = m.a(x).relu()
            logits = m.fc(x.mean((2, 3)))
            return {'map': [m.map(x) * factor], 'logits': (logits, logits.argmax(1))}

        return Net(run, **parts).double()

    x = torch.randn(4, 3, 5, 5).double()
    found = [score(net, comb(net, x), [x])['a'] for net in (net_of(1.0), net_of(1000.0))]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=0)
    only_map = Net(lambda m, x: m.map(m.a(x).relu()), **parts).double()
    assert not torch.allclose(score(only_map, comb(only_map, x), [x])['a'], found[0], rtol=0.1)


def test_scoring_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3))
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    net.train()(x).sum().backward()
    net[1].eval()
    coupling = comb(net, x)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    assert float(score(net, coupling, [x])['0'].min()) > 0, 'frozen weights hinder nothing'
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in net.modules()]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, False, True]
    for name, parameter in net.named_parameters():
        grad, value = grads[name]
        assert parameter.grad is grad and (grad is None or torch.equal(grad, value))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    net[1].track_running_stats = False  # now the samples of a batch mix: the batch is scored as one, not refused
    net[1].running_mean = net[1].running_var = None
    assert set(find_layouts(net, build_importance('gauss_newton', coupling.groups).gates,
                            coupling.example, 'x').values()) == {None}  # fmt: skip


def test_where_samples_lie():
    net, coupling, _, _ = built(TokensFirst)
    gates = build_importance('gauss_newton', coupling.groups).gates
    found = {cut.tensor: layout for cut, layout in find_layouts(net, gates, coupling.example, 'x').items()}
    assert found == {'b.weight': Layout(1), 'c.weight': Layout(0, inner=True)}
    net, coupling, _, _ = built(ConvBNReLU)
    gates = build_importance('gauss_newton', coupling.groups).gates
    assert set(find_layouts(net, gates, coupling.example, 'x').values()) == {FIRST}


def test_what_no_layer_reads_is_refused_with_its_group():
    net = Net(lambda m, x: m.a(x).relu() @ m.b.weight.T, a=nn.Linear(3, 6), b=nn.Linear(6, 4)).double()
    x = torch.randn(2, 3).double()
    coupling = comb(net, x)
    for importance in ('gauss_newton', 'group_fisher'):
        with pytest.raises(ValueError, match=rf"{importance} cannot score 'b\.weight'.*ignore=\['a'\] of comb"):
            build_importance(importance, coupling.groups).check(net, coupling.example)


@pytest.mark.parametrize(
    ('importance', 'message'),
    [
        ('hessian', "'hessian' needs a loss"),
        ({'type': 'group_fisher'}, "'group_fisher' needs a loss"),
        ({'type': 'gauss_newton', 'draws': 0}, 'draws >= 1'),
        ({'type': 'gauss_newton', 'softmax': 1}, 'softmax True or False'),
    ],
)
def test_refusals(importance, message):
    net, coupling, x, _ = built(ConvBNReLU)
    with pytest.raises(ValueError, match=message):
        score(net, coupling, [(x, {})], importance=importance)


def test_refusals_of_data():
    net, coupling, x, _ = built(ConvBNReLU)
    with pytest.raises(ValueError, match='nothing was scored'):
        score(net, coupling, [])
    with pytest.raises(ValueError, match='1 batches, none with a finite score'):
        score(net, coupling, [(x * torch.nan, {})])
    found = build_importance('gauss_newton', coupling.groups)
    for closure, message in ((None, 'give accumulate'), (list, 'got no outputs'),
                             (lambda: [net(x, {}).detach()], 'no tensor with a gradient')):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            found.accumulate(net, closure=closure)
    assert set(score(net, coupling, [], importance='magnitude')) == set(net.sites)


def test_group_fisher_reads_the_same_calls():
    for cls in LAYERS:
        net, coupling, x, target = built(cls)
        gates = ones(net, len(x))
        loss = F.cross_entropy(net(x, gates), target)
        expected = torch.autograd.grad(loss, list(gates.values()))
        found = build_importance('group_fisher', coupling.groups)
        found.check(net, coupling.example)
        found.attach(net)
        F.cross_entropy(net(x, {}), target).backward()
        found.accumulate(net)
        found.detach()
        assert_close(found.scores(), {n: g.square().sum(0) for n, g in zip(gates, expected, strict=True)})


def test_a_checkpointed_part_is_seen_when_it_runs_again():
    from torch.utils.checkpoint import checkpoint

    net, coupling, x, target = built(ConvBNReLU)
    net.eval()
    found = []
    for reentrant in (None, False, True):
        score_ = build_importance('group_fisher', coupling.groups)
        score_.attach(net)
        y = x.clone().requires_grad_()
        call = (lambda x: net(x, {})) if reentrant is None else (
            lambda x, reentrant=reentrant: checkpoint(net, x, {}, use_reentrant=reentrant))  # fmt: skip
        F.cross_entropy(call(y), target).backward()
        score_.accumulate(net)
        score_.detach()
        found.append(score_.scores())
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@pytest.mark.parametrize('shape', [(3, 4), (3, 5, 4), (3, 4, 5, 6), (2, 3, 4, 5, 6)])
def test_sample_dot(shape, monkeypatch):
    monkeypatch.setattr('mmcpd.prune.per_sample._CHUNK', 30)
    torch.manual_seed(0)
    x, g = torch.randn(shape), torch.randn(shape)
    for sample in range(len(shape)):
        for channel in set(range(len(shape))) - {sample}:
            expected = (x * g).movedim((sample, channel), (0, 1)).flatten(2).sum(2) if len(shape) > 2 else (
                x * g if sample == 0 else (x * g).T)  # fmt: skip
            torch.testing.assert_close(sample_dot(x, g, sample, channel), expected)
            torch.testing.assert_close(sample_dot(x, g, None, channel), expected.sum(0, keepdim=True))
    assert sample_dot(x.half(), g.half(), 0, 1).dtype == torch.float32


def pruned(rank=0, iterations=8):
    """Train with gauss_newton, each process on batches of its own; yield its scores, and what it keeps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(1),
                        nn.Linear(8 * 4, 4)).double()  # fmt: skip
    coupling = comb(net, torch.randn(1, 3, 6, 6).double())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = Pruner(net, coupling, optimizer, Schedule({'macs': 0.5}, begin=0, end=6, interval=3),
                    importance='gauss_newton', normalize='macs')  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    for iteration in range(iterations):
        x = torch.randn(4, 3, 6, 6, generator=generator).double()
        pruner.closure = lambda x=x: (net(part) for part in x.split(2))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        if torch.distributed.is_initialized():  # as a data-parallel wrapper does it
            for parameter in net.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
        if iteration == 1:
            yield pruner.importance.scores()['0'].tolist()
        pruner.step()
    yield {name: keep.tolist() for name, keep in pruner.keep.items()}
    assert pruner.done and pruner.left()['macs'] <= 0.5 and compare(net, coupling, pruner.keep) < 1e-9


def test_a_pruner_takes_it_like_any_other():
    scores, keep = pruned()
    assert any(scores) and not all(keep['0'])


def on_one_of_two(rank, folder):
    net, coupling, x, _ = built(ConvBNReLU)
    alone = score(net, coupling, [(x + rank, {})])
    (folder / f'{rank}.json').write_text(json.dumps([*pruned(rank), {n: s.tolist() for n, s in alone.items()}]))


def test_processes_choose_the_same_units(tmp_path):
    on_two_processes(on_one_of_two, tmp_path)
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first[0] != second[0], 'samples differ'
    assert first[1] == second[1] and not all(first[1]['0'])
    assert first[2] == second[2]
    net, coupling, x, _ = built(ConvBNReLU)
    parts = [score(net, coupling, [(x + rank, {})]) for rank in range(2)]
    assert_close({n: torch.tensor(s).double() for n, s in first[2].items()},
                 {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]})  # fmt: skip


def test_what_is_chosen_is_masked_as_it_is_slimmed():
    net, coupling, x, _ = built(Torchs)
    scores = normalize(scored(net, coupling, x), coupling, coupling.keep(), by='macs')
    keep = select(scores, coupling, coupling.keep(), {'macs': 0.5}, round_to=1)
    assert compare(net, coupling, keep) < 1e-9
    small = slim(net, coupling, keep)
    assert sum(t.numel() for t in small.parameters()) < sum(t.numel() for t in net.parameters())
    assert tensors_in(coupling.example.run(small))
