"""Forwards that check their own sizes, as attentions of many packages do: what only an attribute can make right is."""

from __future__ import annotations

import pytest
from torch import nn

from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import check_structure, sample

X = sample((2, 5, 6))


class Attention(nn.Module):
    """One attribute says the width of the queries' heads and of the values'; what is checked is a subclass's."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.scaling = self.head_dim**-0.5

    def split(self, x):
        return x.view(x.shape[0], -1, self.heads, self.head_dim).transpose(1, 2)

    def forward(self, x):
        b, n, c = x.shape
        q = (self.q(x) * self.scaling).view(b, n, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(b, -1, self.heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(b, -1, self.heads, self.head_dim).transpose(1, 2)
        self.check_queries(q, b, n)
        y = (q @ k.transpose(2, 3)).softmax(-1) @ v
        self.check(y, b, n)
        return self.out(y.transpose(1, 2).contiguous().reshape(b, n, c))

    def check_queries(self, q, b, n):
        pass

    def check(self, y, b, n):
        pass


class ByTuple(Attention):
    def check(self, y, b, n):
        if y.size() != (b, self.heads, n, self.head_dim):
            raise ValueError(f'attention should be {(b, self.heads, n, self.head_dim)}, and is {y.size()}')


class ByNumber(Attention):
    def check(self, y, b, n):
        assert y.shape[-1] == self.head_dim, 'another width'


class ByProduct(Attention):
    def check(self, y, b, n):
        if y.transpose(1, 2).flatten(2).size(2) != self.heads * self.head_dim:
            raise ValueError('another width')


class Queries(Attention):
    """The queries are checked, so that the values' heads are said in the call."""

    def check_queries(self, q, b, n):
        if list(q.shape) != [b, self.heads, n, self.head_dim]:
            raise ValueError('another width')


class Both(ByTuple):
    """Both are checked against the one attribute: they must stay equal."""

    def check_queries(self, q, b, n):
        if q.size() != (b, self.heads, n, self.head_dim):
            raise ValueError('another width')


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.attn, self.head = nn.Linear(6, 16), kind(), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.head((x + self.attn(x)).tanh())


APART = {'embed': 16, 'attn.q': 8, 'attn.v': 8}


@pytest.mark.parametrize(
    ('kind', 'groups', 'follows'),
    [
        (ByTuple, APART, 'attn.v'),
        (ByNumber, APART, 'attn.v'),
        (ByProduct, APART, 'attn.v'),
        (Queries, APART, 'attn.q'),
        (Both, {'embed': 16, 'attn.q': 8}, 'attn.q'),
    ],
)
def test_the_attribute_follows_what_is_checked(kind, groups, follows):
    model = Net(kind)
    found = exact(model, X, groups)
    keep = random_keep(found, 0.5, 4, awkward=True)
    small = slim(model, found, keep)
    assert small.attn.head_dim == int(keep[follows].sum())
    check_structure(model, found, small, lambda: Net(kind))
