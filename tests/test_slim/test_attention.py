"""The attention that takes the place of nn.MultiheadAttention: the same numbers, for every argument."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.attention import SlimMultiheadAttention, replacement
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, check_equal, gap, randomise_, sample

QUERY, KEY = sample((2, 5, 8)), sample((2, 7, 8))
NUMBERS = torch.linspace(-1, 1, 35, dtype=torch.float64).reshape(5, 7)
BOOLEANS = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.7
PADDING = torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 0, 0, 1]]).bool()
PER_HEAD = torch.linspace(-1, 1, 140, dtype=torch.float64).reshape(4, 5, 7)  # (batch x heads, L, S)

CALLS = {
    'plain': {},
    'without weights': {'need_weights': False},
    'the weights of each head': {'average_attn_weights': False},
    'numbers': {'attn_mask': NUMBERS},
    'numbers, fused': {'attn_mask': NUMBERS, 'need_weights': False},
    'booleans': {'attn_mask': BOOLEANS},
    'booleans, fused': {'attn_mask': BOOLEANS, 'need_weights': False},
    'padding': {'key_padding_mask': PADDING},
    'padding and numbers, fused': {
        'key_padding_mask': PADDING.double() * -3,
        'attn_mask': NUMBERS,
        'need_weights': False,
    },
    'both': {'key_padding_mask': PADDING, 'attn_mask': BOOLEANS & ~PADDING[:1]},
    'a mask for each head': {'attn_mask': PER_HEAD},
    'a mask for each head and padding, fused': {
        'attn_mask': PER_HEAD,
        'key_padding_mask': PADDING,
        'need_weights': False,
    },
}  # fmt: skip


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('name', CALLS)
def test_it_is_the_dense_one_before_anything_goes(name, bias, batch_first):
    dense = randomise_(nn.MultiheadAttention(8, 2, bias=bias, batch_first=batch_first))
    ours = SlimMultiheadAttention(copy.deepcopy(dense)).eval()
    assert list(ours.state_dict()) == list(dense.state_dict())
    query, key = (QUERY, KEY) if batch_first else (QUERY.transpose(0, 1), KEY.transpose(0, 1))
    expected, weights = dense(query, key, key, **CALLS[name])
    found, found_weights = ours(query, key, key, **CALLS[name])
    assert gap(expected, found) < 1e-12
    if weights is None:
        assert found_weights is None
    else:
        assert gap(weights, found_weights) < 1e-12


def test_causal():
    dense = randomise_(nn.MultiheadAttention(8, 2, batch_first=True))
    ours = SlimMultiheadAttention(copy.deepcopy(dense)).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    for need_weights in (True, False):
        options = dict(attn_mask=mask, is_causal=True, need_weights=need_weights)
        assert gap(dense(QUERY, QUERY, QUERY, **options)[0], ours(QUERY, QUERY, QUERY, **options)[0]) < 1e-12
    assert gap(dense(QUERY, QUERY, QUERY)[0], ours(QUERY, QUERY, QUERY, attn_mask=mask, is_causal=True)[0]) > 1e-3


def test_unbatched_input():
    dense = randomise_(nn.MultiheadAttention(8, 2, batch_first=True))
    ours = SlimMultiheadAttention(copy.deepcopy(dense)).eval()
    for need_weights in (True, False):
        expected, weights = dense(QUERY[0], KEY[0], KEY[0], need_weights=need_weights)
        found, found_weights = ours(QUERY[0], KEY[0], KEY[0], need_weights=need_weights)
        assert gap(expected, found) < 1e-12
        assert (weights is None) == (found_weights is None)
        if weights is not None:
            assert gap(weights, found_weights) < 1e-12


def test_dropout_drops_in_training_and_only_there():
    ours = SlimMultiheadAttention(randomise_(nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)))
    for need_weights in (True, False):
        still = ours.eval()(QUERY, KEY, KEY, need_weights=need_weights)[0]
        assert gap(still, ours(QUERY, KEY, KEY, need_weights=need_weights)[0]) == 0
        torch.manual_seed(0)
        assert gap(still, ours.train()(QUERY, KEY, KEY, need_weights=need_weights)[0]) > 1e-3


def test_the_gradient_reaches_every_parameter():
    ours = SlimMultiheadAttention(randomise_(nn.MultiheadAttention(8, 2, batch_first=True)))
    ours(QUERY, KEY, KEY)[0].square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in ours.parameters())


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.stem, self.fc = nn.Linear(3, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.attention(x, x, x, need_weights=False)[0]).tanh())


def test_only_an_attention_that_loses_something_is_replaced():
    model = randomise_(Encoder())
    found = comb(model, sample((2, 5, 3)))
    assert type(slim(model, found, found.keep()).attention) is nn.MultiheadAttention
    for name in ('stem', 'attention.in_proj'):
        small = slim(model, found, random_keep(found, 0.5, 0, among={name}))
        assert type(small.attention) is SlimMultiheadAttention
    assert type(model.attention) is nn.MultiheadAttention


def test_the_scale_is_that_of_the_dense_attention():
    model = randomise_(Encoder())
    found = comb(model, sample((2, 5, 3)))
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert small.attention.scale == 4**-0.5
    assert small.attention.num_heads == 2
    assert small.attention.embed_dim == small.stem.out_features == 4
    assert small.attention.out_proj.in_features == small.attention.out_proj.weight.shape[1] == 4
    plan = json.loads(json.dumps(structure(model, small)))
    assert plan['replaced'] == {
        'attention': {'kind': 'MultiheadAttention', 'arguments': {'num_heads': 2, 'scale': 0.5}}
    }
    twin = restructure_(Encoder().double().eval(), plan)
    twin.load_state_dict(small.state_dict())
    assert gap(small(sample((2, 5, 3))), twin(sample((2, 5, 3)))) == 0
    assert str(twin) == str(small)


@pytest.mark.parametrize('options', [{'kdim': 8, 'vdim': 6}, {'add_bias_kv': True}, {'add_zero_attn': True}])
def test_what_the_replacement_cannot_be_is_frozen(options):
    def run(m, x):
        x = m.stem(x)
        value = m.value(x) if 'vdim' in options else x
        return m.fc(m.up(x + m.attention(x, x, value, need_weights=False)[0]).tanh())

    parts = dict(stem=nn.Linear(3, 8), value=nn.Linear(8, 6), up=nn.Linear(8, 5), fc=nn.Linear(5, 2))
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    model = randomise_(Net(run, attention=attention, **parts))
    found = comb(model, sample((2, 5, 3)))
    assert 'up' in {g.name for g in found.groups}
    check_equal(model, found)
    if replacement(attention) is None:
        rows = {(m.tensor, m.dim) for g in found.groups for m in g.members if m.tensor.startswith('attention')}
        assert all(dim == 1 or 'out_proj' in tensor for tensor, dim in rows)  # the embedding may go, the heads not


def test_a_subclass_of_the_attention_is_not_replaced():
    class Mine(nn.MultiheadAttention):
        pass

    assert replacement(Mine(8, 2)) is None
    assert replacement(nn.MultiheadAttention(8, 2)) == 'MultiheadAttention'


def test_a_slimmed_attention_is_combed_and_slimmed_again():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.m, self.fc = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 2)

        def forward(self, x):
            return self.fc(self.m(x, x, x, need_weights=False)[0])

    model, x = randomise_(Attends()), sample((2, 5, 12))
    first = comb(model, x, trial=False)
    small = slim(model, first, random_keep(first, 0.5, 0))
    again = comb(small, x, trial=False)
    assert [g.units for g in again.groups] == [2, 2, 6], 'queries with keys, values, and what goes out'
    assert compare(small, again, random_keep(again, 0.5, 0)) < 1e-12
