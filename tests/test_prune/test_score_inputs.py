"""What a score is given: tokens, masks, values that are no numbers, and forwards that leave something behind."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune import score
from mmcpd.prune.importance import build_importance
from mmcpd.prune.layouts import UNCHANGED, find_layouts
from tests.helpers import Net, randomise_, sample


def mlp(forward=lambda m, x: m.fc(m.conv(x).relu().mean((2, 3))), **parts):
    torch.manual_seed(0)
    return randomise_(Net(forward, conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 4), **parts)).eval()


def apart(net, coupling, x):
    """Return the score of samples that are given one by one, each with the r of a whole batch."""
    found = build_importance('gauss_newton', coupling.groups)
    squares = 0
    z = net(x)
    r = found._direction(z.detach()) / z.detach().std(correction=0)
    weight = net.down.weight
    for one, row in zip(x, r, strict=True):
        (grad,) = torch.autograd.grad((net(one[None])[0] * row).sum(), [weight])
        squares = squares + (weight * grad).sum(0).square()
    return squares.detach()


def test_tokens_are_told_apart():
    torch.manual_seed(0)
    parts = dict(embed=nn.Embedding(50, 6), up=nn.Linear(6, 8), down=nn.Linear(8, 6), out=nn.Linear(6, 4))
    net = randomise_(Net(lambda m, x: m.out(m.down(m.up(m.embed(x)).tanh()).mean(1)), **parts)).eval()
    x = torch.randint(50, (5, 7), generator=torch.Generator().manual_seed(1))
    coupling = comb(net, x[:2])
    found = score(net, coupling, [x])['up']
    assert torch.allclose(found.double(), apart(net, coupling, x), rtol=1e-4)
    gates = build_importance('gauss_newton', coupling.groups).gates
    alike = comb(net, torch.ones(1, 7, dtype=torch.long))
    assert UNCHANGED in find_layouts(net, gates, alike.example).values(), 'all tokens the same: no place changes'
    with pytest.warns(UserWarning, match='no input of the example has values that could be changed'):
        score(net, alike, [x])


def masked_attention(m, x, mask):
    q, k, v = m.qkv(x).chunk(3, -1)
    return m.fc((((q @ k.mT) * 0.3 + mask).softmax(-1) @ v).mean(1))


def test_a_mask_may_be_infinite_and_a_picture_may_not():
    torch.manual_seed(0)
    net = randomise_(Net(masked_attention, qkv=nn.Linear(6, 24), fc=nn.Linear(8, 4))).eval()
    x, mask = sample((2, 5, 6)), torch.full((2, 5, 5), -torch.inf, dtype=torch.float64).triu(1)
    coupling = comb(net, (x, mask))
    assert all(bool(torch.isfinite(s).all()) for s in score(net, coupling, [(x, mask)]).values())
    for number in (torch.inf, torch.nan):
        broken = x.clone()
        broken[1, 2, 3] = number
        with pytest.raises(PruneError, match=r'picture 1 of batch 1 \(from 0\) is not finite'):
            score(net, coupling, [(x, mask), (broken, mask)])


def test_a_number_that_is_none_is_found_inside_inputs():
    net = mlp(lambda m, inputs: m.fc(m.conv(inputs['image']).relu().mean((2, 3))))
    x = sample((2, 3, 6, 6))
    coupling = comb(net, ({'image': x},))
    with pytest.raises(PruneError, match='picture 0 of batch 0'):
        score(net, coupling, [({'image': x * torch.nan},)])


def test_a_batch_that_overflows_says_nothing_of_the_spread():
    net = mlp(lambda m, x: (out := m.fc(m.conv(x).relu().mean((2, 3))), (out * 1e300).exp() if x.max() > 100 else out))
    x = sample((4, 3, 6, 6))
    coupling = comb(net, x[:1])
    alone = build_importance('gauss_newton', coupling.groups)
    after = build_importance('gauss_newton', coupling.groups)
    after.accumulate(net, closure=lambda: [net(x * 1000)])
    assert after.skipped == 1
    for found in (alone, after):
        found.accumulate(net, closure=lambda: [net(x)])
    assert torch.equal(alone._moments, after._moments) and after.iterations == 1


def test_tensors_of_inference_mode_and_empty_batches():
    net = mlp()
    coupling = comb(net, sample((1, 3, 6, 6)))
    with torch.inference_mode():
        x = sample((3, 3, 6, 6))
    assert torch.equal(score(net, coupling, [x])['conv'], score(net, coupling, [torch.tensor(x.numpy())])['conv'])
    with pytest.raises(ValueError, match=r'batch 1 \(from 0\) is empty: leave it out'):
        score(net, coupling, [x, x[:0]])


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_part_that_is_checkpointed_scores_as_without(reentrant):
    def part(m, x):
        return m.fc(F.relu(m.conv(x)).mean((2, 3)))

    plain = mlp(part)
    twin = Net(lambda m, x: checkpoint(part, m, x, use_reentrant=reentrant), conv=plain.conv, fc=plain.fc).eval()
    x = sample((3, 3, 6, 6))
    coupling = comb(plain, x)
    grads = [p.grad for p in plain.parameters()]
    expected = score(plain, coupling, [x], importance=dict(type='gauss_newton', draws=2))
    found = score(twin, coupling, [x], importance=dict(type='gauss_newton', draws=2))
    assert float(expected['conv'].min()) > 0
    assert all(torch.allclose(found[name], value) for name, value in expected.items())
    assert [p.grad for p in twin.parameters()] == grads, 'nothing was written'


def test_what_a_forward_keeps_is_not_left_behind():
    def run(m, x):
        m.calls += 1
        m.last = m.conv(x).relu()
        return m.fc(m.last.mean((2, 3)))

    net = mlp(run)
    net.register_buffer('calls', torch.zeros((), dtype=torch.long))
    net.last = None
    x = sample((2, 3, 6, 6))
    coupling = comb(net, x)
    before = copy.deepcopy(net.state_dict())
    assert float(score(net, coupling, [x])['conv'].min()) > 0
    assert net.last is None and all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


# -- a cut beside layers -----------------------------------------------------------------------------------------------
class Heads(nn.Module):
    """Packed queries, keys and values of two heads; queries are normed, or moved by a vector, before they meet keys."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.qkv, self.proj = kind, nn.Linear(6, 24), nn.Linear(8, 6)
        self.q_norm = nn.LayerNorm(4, bias=kind != 'no bias') if kind != 'vector' else None
        self.shift = nn.Parameter(torch.rand(2, 1, 4)) if kind == 'vector' else None

    def forward(self, x, qk=None, vp=None):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        q = q + self.shift if self.q_norm is None else self.q_norm(q)
        scores = ((q if qk is None else q * qk) @ k.mT / 2).softmax(-1)
        return self.proj(((scores @ v) if vp is None else (scores @ v) * vp).transpose(1, 2).flatten(2))


class Encoder(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.heads, self.out = nn.Linear(5, 6), Heads(kind), nn.Linear(6, 3)

    def forward(self, x, *gates):
        x = self.embed(x)
        return self.out((x + self.heads(x, *gates)).mean(1))


@pytest.mark.parametrize('kind', ['affine', 'no bias', 'vector'])
def test_norms_and_vectors_on_queries_count(kind):
    """Without them the half of a unit that queries and keys carry would be missing."""
    torch.manual_seed(0)
    net = randomise_(Encoder(kind)).eval()
    x = sample((1 if kind == 'vector' else 3, 7, 5))  # samples cannot be told apart where a vector is added
    coupling = comb(net, x)
    (group,) = (group for group in coupling.groups if group.name == 'heads.qkv')
    told = pytest.warns(UserWarning, match='no linear layer') if kind == 'vector' else nullcontext()
    with told:
        found = score(net, coupling, [x])['heads.qkv']
    channels = sorted({m.tensor: m.index % 4 for m in group.members}['heads.proj.weight'].unique().tolist())
    assert channels == [0, 1, 2, 3] and group.units == 4
    gates = [torch.ones(len(x), 1, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    z = net(x, *gates)
    r = build_importance('gauss_newton', coupling.groups)._direction(z.detach()) / z.detach().std(correction=0)
    of_queries, of_values = (each[:, 0, 0] for each in torch.autograd.grad((z * r).sum(), gates))  # (N, 4)
    assert torch.allclose(found, (of_queries + of_values).square().sum(0), rtol=1e-6)
    assert not torch.allclose(found, of_values.square().sum(0), rtol=1e-2)


@pytest.mark.parametrize('norm', [nn.BatchNorm1d, nn.GroupNorm])
def test_norms_of_other_kinds_on_queries_count(norm):
    """Queries and keys are normed as channels (N, C, T) behind a convolution, as LeViT's are."""

    def run(m, x, gate=None):
        q, k, v = m.q_norm(m.q(x)), m.k_norm(m.k(x)), m.v(x)
        q = q if gate is None else q * gate
        return m.out((q.mT @ k / 4).softmax(-1) @ v.mT).mean(1)

    torch.manual_seed(0)
    q_norm, k_norm = (norm(8) if norm is nn.BatchNorm1d else norm(8, 8) for _ in range(2))
    parts = {name: nn.Conv1d(5, 8, 1) for name in 'qkv'}
    net = randomise_(Net(run, **parts, q_norm=q_norm, k_norm=k_norm, out=nn.Linear(8, 3))).eval()
    x = sample((3, 5, 6))
    coupling = comb(net, x)
    (group,) = (each for each in coupling.groups if 'q.weight' in {m.tensor for m in each.members})
    found = score(net, coupling, [x])[group.name]
    gate = torch.ones(3, 8, 1, dtype=torch.float64, requires_grad=True)
    z = net.run(net, x, gate)
    r = build_importance('gauss_newton', coupling.groups)._direction(z.detach()) / z.detach().std(correction=0)
    (grad,) = torch.autograd.grad((z * r).sum(), gate)
    assert torch.allclose(found, grad[:, :, 0].square().sum(0), rtol=1e-6)
    assert not torch.allclose(found, grad[:, :, 0].sum(0).square(), rtol=1e-2)


def test_outputs_that_a_mask_makes_infinite_are_left_out():
    hidden = torch.tensor([False, True, False, False])
    part = mlp()
    twin = Net(lambda m, x: part.run(m, x).masked_fill(hidden, -torch.inf), conv=part.conv, fc=part.fc).eval()
    x = sample((3, 3, 6, 6))
    coupling = comb(twin, x, trial=False)
    found = build_importance('gauss_newton', coupling.groups)
    found.accumulate(twin, closure=lambda: [twin(x)])
    assert found.iterations == 1 and float(found.scores()['conv'].min()) > 0


def test_samples_may_hold_what_is_no_number():
    class Sample:
        def __init__(self):
            self.depth = torch.full((3,), torch.nan)

    net = mlp(lambda m, x, samples: m.fc(m.conv(x).relu().mean((2, 3))))
    x = sample((2, 3, 6, 6))
    coupling = comb(net, (x, [Sample(), Sample()]))
    assert float(score(net, coupling, [(x, [Sample(), Sample()])])['conv'].min()) > 0
