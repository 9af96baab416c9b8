"""The Gauss-Newton score against autograd through explicit gates, on every kind of layer call that it reads."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.nested import tensors_in
from mmcpd.prune import normalize, score, select
from mmcpd.prune.importance import build_importance
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from tests.helpers import Net
from tests.test_prune.gate_nets import NETS, ConvBNReLU, assert_close, built, ones
from tests.test_prune.layer_nets import LAYERS, TokensFirst, Torchs


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
    only_map = Net(lambda m, x: m.map(m.a(x).relu()), **{name: parts[name] for name in ('a', 'map')}).double()
    assert not torch.allclose(score(only_map, comb(only_map, x), [x])['a'], found[0], rtol=0.1)


def attention():
    """Return an attention that adds a table to its queries."""
    parts = {'q': nn.Linear(3, 6), 'k': nn.Linear(3, 6), 'v': nn.Linear(3, 4)}
    net = Net(lambda m, x: ((m.q(x) + m.table) @ m.k(x).transpose(1, 2)).softmax(-1) @ m.v(x), **parts)
    net.table = nn.Parameter(torch.randn(1, 5, 6))
    x = torch.randn(4, 5, 3).double()
    return net.double(), comb(net, x), x


def gated(net, x, gates, cut=('q.weight', 'q.bias', 'table')):
    """Run it with gates (6,) on the units of `q`, in the tensors of `cut`."""
    own = {name: net.get_parameter(name).detach() for name in cut}
    changed = {name: t * (gates[:, None] if name == 'q.weight' else gates) for name, t in own.items()}
    return torch.func.functional_call(net, changed, x)


def test_what_no_layer_reads_counts_with_what_layers_read():
    net, coupling, x = attention()
    assert {member.tensor for member in coupling.groups[0].cut} == {'table', 'q.weight', 'q.bias'}
    with pytest.warns(UserWarning, match="one sample where 'table' is used: no linear layer"):
        found = score(net, coupling, [x[:1]])
    z = net(x[:1]).detach()
    r = drawn(z, torch.Generator().manual_seed(0)) / z.std(correction=0)
    gates = torch.ones(6).double().requires_grad_()
    (whole,) = torch.autograd.grad((r * gated(net, x[:1], gates)).sum(), gates)
    (without,) = torch.autograd.grad((r * gated(net, x[:1], gates, ('q.weight', 'q.bias'))).sum(), gates)
    torch.testing.assert_close(found['q'].double(), whole.square(), rtol=1e-5, atol=0)
    assert not torch.allclose(without.square(), whole.square(), rtol=0.1)


@pytest.mark.filterwarnings('ignore:gauss_newton counts each batch')
def test_a_batch_that_counts_as_one_sample_is_right_in_the_mean():
    net, coupling, x = attention()
    jacobian = torch.autograd.functional.jacobian(lambda gates: gated(net, x, gates), torch.ones(6).double())
    expected = (jacobian / net(x).detach().std(correction=0)).square().sum((0, 1, 2))
    found = score(net, coupling, [x], importance={'type': 'gauss_newton', 'draws': 2000})
    torch.testing.assert_close(found['q'], expected, rtol=0.15, atol=0)
    assert not torch.allclose(score(net, coupling, [x])['q'], expected, rtol=0.15)


def test_what_no_layer_reads_is_refused_with_its_group_where_samples_must_be_told_apart():
    net = Net(lambda m, x: m.a(x).relu() @ m.b.weight.T, a=nn.Linear(3, 6), b=nn.Linear(6, 4)).double()
    x = torch.randn(2, 3).double()
    coupling = comb(net, x)
    message = (
        r"group_fisher cannot tell samples apart where 'b\.weight' is used: no linear layer.*ignore=\['a'\] of comb"
    )
    with pytest.raises(ValueError, match=message):
        build_importance('group_fisher', coupling.groups).check(net, coupling.example)
    with pytest.warns(UserWarning, match=r"'b\.weight' is used"):
        found = score(net, coupling, [x[:1]])
    z = net(x[:1])
    r = drawn(z, torch.Generator().manual_seed(0)) / z.detach().std(correction=0)
    (gradient,) = torch.autograd.grad((r * z).sum(), net.b.weight)
    expected = (gradient * net.b.weight).sum(0).square().detach()
    torch.testing.assert_close(found['a'].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ('importance', 'message'),
    [
        ('hessian', "'hessian' needs a loss"),
        ({'type': 'group_fisher'}, "'group_fisher' needs a loss"),
        ({'type': 'gauss_newton', 'draws': 0}, 'draws >= 1'),
        ({'type': 'gauss_newton', 'softmax': 1}, 'softmax is True or False'),
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
    with pytest.raises(ValueError, match=r'picture 0 of batch 0 .* is not finite'):
        score(net, coupling, [(x * torch.nan, {})])
    found = build_importance('gauss_newton', coupling.groups)
    for closure, message in ((None, 'give accumulate'), (list, 'got no outputs'),
                             (lambda: [net(x, {}).detach()], 'no output has a gradient')):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            found.accumulate(net, closure=closure)
    assert set(score(net, coupling, [], importance='magnitude')) == set(net.sites)


def test_what_is_chosen_is_masked_as_it_is_slimmed():
    net, coupling, x, _ = built(Torchs)
    scores = normalize(scored(net, coupling, x), coupling, coupling.keep(), by='macs')
    keep = select(scores, coupling, coupling.keep(), {'macs': 0.5}, round_to=1)
    assert compare(net, coupling, keep) < 1e-9
    small = slim(net, coupling, keep)
    assert sum(t.numel() for t in small.parameters()) < sum(t.numel() for t in net.parameters())
    assert tensors_in(coupling.example.run(small))
