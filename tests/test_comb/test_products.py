"""Linear layers, matrix products, einsum, embeddings and gated linear units."""

from __future__ import annotations

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from tests.exact import exact
from tests.helpers import Net, rows, sample, strided
from tests.toys import Toy, check_toy

TOKENS = ((2, 5, 3),)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape))


def attending(product, **parts) -> Net:
    """Return three linear layers, some product of their outputs, and a classifier."""
    return Net(
        lambda m, x: m.fc(product(m.q(x), m.k(x), m.v(x)).mean(1)),
        q=nn.Linear(3, 6),
        k=nn.Linear(3, 6),
        v=nn.Linear(3, 4),
        fc=nn.Linear(4, 2),
        **parts,
    )


QKV = {'q': 6, 'v': 4}
QKV_MEMBERS = {
    'q': {'q.weight:0': rows(6), 'q.bias:0': rows(6), 'k.weight:0': rows(6), 'k.bias:0': rows(6)},
    'v': {'v.weight:0': rows(4), 'v.bias:0': rows(4), 'fc.weight:1': rows(4)},
}

TOYS = {
    'linear on tokens': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.b(m.a(x).tanh()).tanh().mean(1)),
            a=nn.Linear(3, 6),
            b=nn.Linear(6, 4, bias=False),
            fc=nn.Linear(4, 2),
        ),
        TOKENS,
        {'a': 6, 'b': 4},
        {
            'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'b.weight:1': rows(6)},
            'b': {'b.weight:0': rows(4), 'fc.weight:1': rows(4)},
        },
    ),
    'a vector times a matrix': Toy(
        lambda: Net(
            lambda m, x: m.fc(torch.linspace(0.1, 1, 5, dtype=x.dtype) @ m.a(x[0])),
            a=nn.Linear(3, 6),
            fc=nn.Linear(6, 2),
        ),
        TOKENS,
        {'a': 6},
        {'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'fc.weight:1': rows(6)}},
    ),
    'linear on a batch, and on one vector': Toy(
        lambda: Net(
            lambda m, x: m.fc(m.a(x).relu()) + m.fc(m.a(x[0]).tanh()),
            a=nn.Linear(3, 6),
            fc=nn.Linear(6, 2),
        ),
        ((2, 3),),
        {'a': 6},
    ),
    'mm of parameters on the right': Toy(
        lambda: Net(lambda m, x: torch.mm(torch.mm(x, m.a).relu(), m.b), a=weight(3, 6), b=weight(6, 2)),
        ((4, 3),),
        {'a': 6},
        {'a': {'a:1': rows(6), 'b:0': rows(6)}},
        {'b:1': 'model output'},
    ),
    'mm of parameters on the left': Toy(
        lambda: Net(lambda m, x: torch.mm(m.b, torch.mm(m.a, x.T).relu()).T, a=weight(6, 3), b=weight(2, 6)),
        ((4, 3),),
        {'a': 6},
        {'a': {'a:0': rows(6), 'b:1': rows(6)}},
    ),
    'a matrix and a vector': Toy(
        lambda: Net(lambda m, x: m.a(x).relu() @ m.b, a=nn.Linear(3, 6), b=weight(6)),
        TOKENS,
        {'a': 6},
        {'a': {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'b:0': rows(6)}},
    ),
    'two parameters multiplied': Toy(
        lambda: Net(
            lambda m, x: m.fc(F.linear(x, m.left @ m.right).relu().mean(1)),
            left=weight(6, 4),
            right=weight(4, 3),
            fc=nn.Linear(6, 2),
        ),
        TOKENS,
        {'left': 6},
        {'left': {'left:0': rows(6), 'fc.weight:1': rows(6)}},
        {'left:1': 'no layer that ran produces it', 'right:0': 'no layer that ran produces it'},
    ),
    'bmm': Toy(
        lambda: attending(lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)),
        TOKENS,
        QKV,
        QKV_MEMBERS,
    ),
    'baddbmm': Toy(
        lambda: attending(
            lambda q, k, v: torch.bmm(torch.baddbmm(q.new_ones(1, 5, 5), q, k.mT, alpha=0.5).softmax(-1), v)
        ),
        TOKENS,
        QKV,
        QKV_MEMBERS,
    ),
    'baddbmm whose bias has channels': Toy(
        lambda: Net(
            lambda m, x: m.fc(torch.baddbmm(m.bias, x, m.a.expand(2, -1, -1)).tanh().mean(1)),
            a=weight(3, 6),
            bias=weight(1, 1, 6),
            fc=nn.Linear(6, 2),
        ),
        TOKENS,
        {'a': 6},
        {'a': {'a:1': rows(6), 'bias:2': rows(6), 'fc.weight:1': rows(6)}},
    ),
    'channel attention: the channels are contracted with themselves': Toy(
        lambda: Net(
            lambda m, x: m.fc((m.v(x) @ (m.q(x).transpose(1, 2) @ m.k(x))).mean(1)),
            q=nn.Linear(3, 6),
            k=nn.Linear(3, 4),
            v=nn.Linear(3, 6),
            fc=nn.Linear(4, 2),
        ),
        TOKENS,
        {'v': 6, 'k': 4},
        {'v': {f'{n}:0': rows(6) for n in ('v.weight', 'v.bias', 'q.weight', 'q.bias')},
         'k': {'k.weight:0': rows(4), 'k.bias:0': rows(4), 'fc.weight:1': rows(4)}},
    ),
    'matmul of four dimensions': Toy(
        lambda: attending(
            lambda q, k, v: ((q[:, None] @ k[:, None].transpose(-2, -1)).softmax(-1) @ v[:, None])[:, 0]
        ),
        TOKENS,
        QKV,
        QKV_MEMBERS,
    ),
    'einsum with a weight': Toy(
        lambda: Net(
            lambda m, x: m.fc(torch.einsum('bnc,dc->bnd', x, m.a).relu().mean(1)), a=weight(6, 3), fc=nn.Linear(6, 2)
        ),
        TOKENS,
        {'a': 6},
        {'a': {'a:0': rows(6), 'fc.weight:1': rows(6)}},
    ),
    'einsum of two activations': Toy(
        lambda: attending(
            lambda q, k, v: torch.einsum('bij,bjc->bic', torch.einsum('bic,bjc->bij', q, k).softmax(-1), v)
        ),
        TOKENS,
        QKV,
        QKV_MEMBERS,
    ),
    'einsum with an ellipsis': Toy(
        lambda: Net(
            lambda m, x: m.fc(torch.einsum('...c,cd->...d', m.a(x).relu(), m.b).mean(1)),
            a=nn.Linear(3, 6),
            b=weight(6, 4),
            fc=nn.Linear(4, 2),
        ),
        TOKENS,
        {'a': 6, 'b': 4},
        {'b': {'b:1': rows(4), 'fc.weight:1': rows(4)}},
    ),
    'einops': Toy(
        lambda: Heads(),
        TOKENS,
        {'q': 3, 'v': 3},
        {'v': {'v.weight:0': strided(3, 2), 'v.bias:0': strided(3, 2), 'fc.weight:1': strided(3, 2)}},
    ),
    'embedding': Toy(
        lambda: Net(lambda m, i: m.fc(m.table(i).relu().mean(1)), table=nn.Embedding(7, 6), fc=nn.Linear(6, 2)),
        (torch.tensor([[0, 3, 6], [1, 1, 2]]),),
        {'table': 6},
        {'table': {'table.weight:1': rows(6), 'fc.weight:1': rows(6)}},
        {'table.weight:0': 'entries of an embedding'},
    ),
    'embedding added to a stem': Toy(
        lambda: Net(
            lambda m, x, i: m.fc((m.stem(x) + m.table(i)).relu().mean(1)),
            stem=nn.Linear(3, 6),
            table=nn.Embedding(7, 6),
            fc=nn.Linear(6, 2),
        ),
        ((2, 3, 3), torch.tensor([[0, 3, 6], [1, 1, 2]])),
        {'stem': 6},
        {
            'stem': {
                'stem.weight:0': rows(6),
                'stem.bias:0': rows(6),
                'table.weight:1': rows(6),
                'fc.weight:1': rows(6),
            }
        },
    ),
    'glu': Toy(
        lambda: Net(lambda m, x: m.fc(F.glu(m.a(x), -1).mean(1)), a=nn.Linear(3, 8), fc=nn.Linear(4, 2)),
        TOKENS,
        {'a': 4},
        {'a': {'a.weight:0': strided(4, 2), 'a.bias:0': strided(4, 2), 'fc.weight:1': rows(4)}},
    ),
    'glu over channels of an image': Toy(
        lambda: Net(lambda m, x: m.fc(F.glu(m.a(x), 1).mean((2, 3))), a=nn.Conv2d(3, 8, 1), fc=nn.Linear(4, 2)),
        ((2, 3, 4, 4),),
        {'a': 4},
    ),
    'swiglu': Toy(
        lambda: Net(
            lambda m, x: m.fc((F.silu(m.gate(x)) * m.up(x)).mean(1)),
            gate=nn.Linear(3, 6, bias=False),
            up=nn.Linear(3, 6, bias=False),
            fc=nn.Linear(6, 2),
        ),
        TOKENS,
        {'gate': 6},
        {'gate': {'gate.weight:0': rows(6), 'up.weight:0': rows(6), 'fc.weight:1': rows(6)}},
    ),
    'a mixer over tokens and over channels': Toy(
        lambda: Net(
            lambda m, x: m.fc((x + m.down(m.up(x.mT).relu()).mT).mean(1)),
            up=nn.Linear(5, 7),
            down=nn.Linear(7, 5),
            fc=nn.Linear(3, 2),
        ),
        TOKENS,
        {'up': 7},
        {'up': {'up.weight:0': rows(7), 'up.bias:0': rows(7), 'down.weight:1': rows(7)}},
    ),
}  # fmt: skip


class Codebook(nn.Module):
    """Tokens become what the nearest vectors of a table say; torch computes with products from 26 vectors on."""

    def __init__(self, vectors, between=torch.tanh):
        super().__init__()
        self.stem, self.fc, self.between = nn.Linear(3, 8), nn.Linear(8, 2), between
        self.table = nn.Parameter(torch.randn(vectors, 8))

    def forward(self, x):
        x = self.between(self.stem(x))
        near = torch.cdist(x, self.table.expand(len(x), -1, -1))
        return self.fc(near.neg().softmax(-1) @ self.table + self.table[near.argmin(-1)])


@pytest.mark.parametrize('vectors', [7, 30])
def test_distances_to_vectors_of_a_table(vectors):
    exact(Codebook(vectors), sample((2, 5, 3)), {'stem': 8})
    found = comb(Codebook(vectors, torch.sigmoid).double(), sample((2, 5, 3)), trial=False)
    assert not found.groups
    assert any('a distance over channels that are nowhere zero' in frozen.reason for frozen in found.frozen)


def test_a_batch_of_distances_freezes():
    net = Net(
        lambda m, x: m.fc(torch.cdist(m.stem(x).mT[..., None], m.stem(x).mT[..., None]).mean((2, 3))),
        stem=nn.Linear(3, 8),
        fc=nn.Linear(8, 2),
    )
    found = comb(net.double(), sample((2, 5, 3)), trial=False)
    assert not found.groups and any('a batch of distances' in frozen.reason for frozen in found.frozen)


class Heads(nn.Module):
    """Attention with two heads, written with einops."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.fc = nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, x):
        q, k, v = (einops.rearrange(f(x), 'b n (h d) -> b h n d', h=2) for f in (self.q, self.k, self.v))
        out = einops.einsum((q @ k.mT).softmax(-1), v, 'b h i j, b h j d -> b h i d')
        return self.fc(einops.rearrange(out, 'b h n d -> b n (h d)').mean(1))


@pytest.mark.parametrize('name', TOYS)
def test_product(name):
    check_toy(TOYS[name])
