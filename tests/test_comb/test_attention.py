"""Scaled dot product attention, nn.MultiheadAttention and heads: by width, and whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.attention import SlimMultiheadAttention
from tests.exact import exact
from tests.helpers import TORCH_2_5, Net, call, check_equal, gap, masked, randomise_, rows, sample, strided
from tests.toys import Toy, check_toy, combed

TOKENS = ((2, 5, 3),)
ALLOWED = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()


class Attention(nn.Module):
    """Attention as most people write it: one layer for q, k and v, heads by reshape."""

    def __init__(self, product, heads=2, width=3, bias=True):
        super().__init__()
        self.product, self.heads, self.width = product, heads, width
        self.qkv, self.proj = nn.Linear(3, 3 * heads * width, bias=bias), nn.Linear(heads * width, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        out = self.product(self, q, k, v).transpose(1, 2).reshape(batch, tokens, self.heads * self.width)
        return self.fc(self.proj(out).tanh().mean(1))


def by_hand(m, q, k, v):
    return (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v


def sdpa(**options):
    return lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def biased(m, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=m.bias)


PRODUCTS = {
    'by hand': by_hand,
    'sdpa': sdpa(),
    'sdpa with a scale': sdpa(scale=0.3),
    'sdpa, causal': sdpa(is_causal=True),
    'sdpa with a mask of booleans': sdpa(attn_mask=ALLOWED),
    'sdpa with a mask of numbers': sdpa(attn_mask=torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)),
    'sdpa with a bias for each head': biased,
}


def with_bias(product) -> nn.Module:
    model = Attention(product)
    model.bias = nn.Parameter(torch.rand(2, 5, 5))
    return model


def build(name: str) -> nn.Module:
    return with_bias(PRODUCTS[name]) if 'bias' in name else Attention(PRODUCTS[name])


@pytest.mark.parametrize('name', PRODUCTS)
def test_the_same_width_goes_in_each_head(name):
    # One reshape cuts q, k and v, so the three share their widths: 2 heads x 3 pieces for each unit.
    unit = strided(3, 6)
    toy = Toy(lambda: build(name), TOKENS, {'qkv': 3, 'proj': 4})
    toy.members = {'qkv': {'qkv.weight:0': unit, 'qkv.bias:0': unit, 'proj.weight:1': strided(3, 2)}}
    if 'bias' in name:
        toy.frozen = {'bias:0': 'channels that no layer', 'bias:1': 'channels that no layer'}
    check_toy(toy)


@pytest.mark.parametrize('name', PRODUCTS)
def test_whole_heads_go(name):
    unit = [[i * 3 + j + 6 * piece for piece in range(3) for j in range(3)] for i in range(2)]
    toy = Toy(lambda: build(name), TOKENS, {'qkv': 2, 'proj': 4}, heads='head')
    toy.members = {'qkv': {'qkv.weight:0': unit, 'qkv.bias:0': unit, 'proj.weight:1': rows(2, 3)}}
    if 'bias' in name:
        toy.members['qkv'] |= {'bias:0': rows(2)}
    check_toy(toy)


class Separate(nn.Module):
    """Attention with a layer each for q, k and v, whose widths differ, and keys from elsewhere."""

    def __init__(self, fused=False):
        super().__init__()
        self.heads, self.fused = 2, fused
        self.q, self.k, self.v = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(4, 6)
        self.proj, self.fc = nn.Linear(6, 5, bias=False), nn.Linear(5, 2)

    def forward(self, x, y):
        q, k, v = (
            f(t).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f, t in ((self.q, x), (self.k, y), (self.v, y))
        )
        if self.fused:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ k.transpose(-2, -1) * 0.4).softmax(-1) @ v
        return self.fc(self.proj(out.transpose(1, 2).flatten(2)).tanh().mean(1))


SEPARATE = ((2, 5, 3), (2, 7, 4))


def test_queries_and_values_of_different_width():
    qk, v = strided(4, 2), strided(3, 2)
    check_toy(
        Toy(
            Separate,
            SEPARATE,
            {'q': 4, 'v': 3, 'proj': 5},
            {
                'q': {'q.weight:0': qk, 'q.bias:0': qk, 'k.weight:0': qk, 'k.bias:0': qk},
                'v': {'v.weight:0': v, 'v.bias:0': v, 'proj.weight:1': v},
            },
        )
    )


def test_whole_heads_of_queries_and_values():
    qk, v = rows(2, 4), rows(2, 3)
    check_toy(
        Toy(
            Separate,
            SEPARATE,
            {'q': 2, 'proj': 5},
            {
                'q': {'q.weight:0': qk, 'q.bias:0': qk, 'k.weight:0': qk, 'k.bias:0': qk}
                | {'v.weight:0': v, 'v.bias:0': v, 'proj.weight:1': v}
            },
            heads='head',
        )
    )


class Grouped(nn.Module):
    """Four heads of queries, of which each two share a head of keys and values."""

    def __init__(self):
        super().__init__()
        self.heads, self.pairs, self.width = 4, 2, 3
        self.q, self.kv, self.proj, self.fc = nn.Linear(3, 12), nn.Linear(3, 12), nn.Linear(12, 4), nn.Linear(4, 2)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q = self.q(x).view(batch, tokens, self.heads, self.width).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, self.pairs, self.width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.fc(self.proj(out.transpose(1, 2).flatten(2)).tanh().mean(1))


@pytest.mark.skipif(not TORCH_2_5, reason='torch 2.4 has no grouped queries')
def test_grouped_queries_go_with_their_key():
    q, kv = rows(2, 6), [[i * 3 + j + 6 * piece for piece in range(2) for j in range(3)] for i in range(2)]
    members = {'q.weight:0': q, 'q.bias:0': q, 'kv.weight:0': kv, 'kv.bias:0': kv, 'proj.weight:1': q}
    check_toy(Toy(Grouped, TOKENS, {'q': 2, 'proj': 4}, {'q': members}, heads='head'))
    q, kv = strided(3, 4), strided(3, 4)
    members = {'q.weight:0': q, 'q.bias:0': q, 'kv.weight:0': kv, 'kv.bias:0': kv, 'proj.weight:1': q}
    check_toy(Toy(Grouped, TOKENS, {'q': 3, 'proj': 4}, {'q': members}))


def test_fused_attention_of_different_widths():
    # Which kernel torch takes depends on whether the widths agree, and with it the memory, so only numbers here.
    model, found = combed(Toy(lambda: Separate(fused=True), SEPARATE, {}))
    assert {g.name: g.units for g in found.groups} == {'q': 4, 'v': 3, 'proj': 5}
    check_equal(model, found, seeds=(0, 1, 2))


def test_the_query_is_the_cut_where_two_activations_are_multiplied():
    _, found = check_toy(Toy(Separate, SEPARATE, {'q': 4, 'v': 3, 'proj': 5}))
    assert [(m.tensor, m.dim) for m in found.group('q').cut] == [('q.weight', 0), ('q.bias', 0)]
    assert [(m.tensor, m.dim) for m in found.group('v').cut] == [('proj.weight', 1)]


class Multi(nn.Module):
    """nn.MultiheadAttention between two linear layers."""

    def __init__(self, need_weights=False, batch_first=True, cross=False, bias=True, average=True):
        super().__init__()
        self.need_weights, self.cross, self.average = need_weights, cross, average
        self.stem, self.other, self.fc = nn.Linear(3, 8), nn.Linear(4, 8), nn.Linear(8, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, bias=bias)

    def forward(self, x, y):
        x = self.stem(x)
        y = self.other(y) if self.cross else x
        out, weights = self.attention(x, y, y, need_weights=self.need_weights, average_attn_weights=self.average)
        out = self.fc((x + out).tanh())
        return (out, weights) if self.need_weights else out


MULTI = {
    'plain': {},
    'with weights': {'need_weights': True},
    'with the weights of each head': {'need_weights': True, 'average': False},
    'batch second': {'batch_first': False},
    'batch second, with weights': {'batch_first': False, 'need_weights': True},
    'cross': {'cross': True},
    'cross, with weights': {'cross': True, 'need_weights': True},
    'without bias': {'bias': False},
}


@pytest.mark.parametrize('heads', ['dim', 'head'])
@pytest.mark.parametrize('name', MULTI)
def test_multihead_attention(name, heads):
    options = MULTI[name]
    inputs = ((2, 5, 3), (2, 7, 4)) if options.get('batch_first', True) else ((5, 2, 3), (7, 2, 4))
    embedding = {'stem.weight:0': rows(8), 'stem.bias:0': rows(8), 'attention.in_proj_weight:1': rows(8)}
    embedding |= {'attention.out_proj.weight:0': rows(8), 'attention.out_proj.bias:0': rows(8), 'fc.weight:1': rows(8)}
    if options.get('cross'):
        embedding |= {'other.weight:0': rows(8), 'other.bias:0': rows(8)}
    if not options.get('bias', True):
        del embedding['attention.out_proj.bias:0']
    toy = Toy(lambda: Multi(**options), inputs, {'stem': 8}, {'stem': embedding}, heads=heads)
    if heads == 'head':  # torch takes q, k and v apart before it makes the heads
        toy.frozen = {'attention.in_proj_weight:0': ' in attention'}
        check_toy(toy)
        return
    toy.groups['attention.in_proj'] = 4
    inner = {'attention.in_proj_weight:0': strided(4, 6), 'attention.out_proj.weight:1': strided(4, 2)}
    if options.get('bias', True):
        inner['attention.in_proj_bias:0'] = strided(4, 6)
    toy.members['attention.in_proj'] = inner
    model, found = check_toy(toy)
    keep = found.keep()
    keep['attention.in_proj'][1] = False
    small = slim(model, found, keep)
    assert type(small.attention) is SlimMultiheadAttention
    assert small.attention.num_heads == 2
    assert gap(call(found, masked(model, found, keep)), call(found, small)) < 1e-12


def test_multihead_attention_with_masks():
    attention_mask = ALLOWED.logical_not()
    padding = torch.tensor([[0, 0, 0, 1, 0], [0, 0, 0, 0, 1]]).bool()

    class Masked(nn.Module):
        def __init__(self, masks):
            super().__init__()
            self.masks = masks
            self.stem, self.fc, self.attention = (
                nn.Linear(3, 8),
                nn.Linear(8, 2),
                nn.MultiheadAttention(8, 2, batch_first=True),
            )

        def forward(self, x):
            x = self.stem(x)
            return self.fc(self.attention(x, x, x, **self.masks)[0].tanh())

    causal = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    heads = torch.linspace(-1, 1, 100, dtype=torch.float64).reshape(4, 5, 5)  # (batch x heads, L, S)
    cases = [
        {'attn_mask': attention_mask, 'need_weights': False},
        {'attn_mask': attention_mask, 'key_padding_mask': padding, 'need_weights': True},
        {'attn_mask': causal, 'is_causal': True, 'need_weights': False},
        {'attn_mask': heads, 'need_weights': False},
    ]
    for masks in cases:
        check_toy(Toy(lambda m=masks: Masked(m), TOKENS, {'stem': 8, 'attention.in_proj': 4, 'attention.out_proj': 8}))


def test_a_transformer_encoder_layer_of_torch():
    def build():
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)
        return Net(
            lambda m, x: m.fc(m.layer(m.stem(x)).tanh().mean(1)), stem=nn.Linear(3, 8), layer=layer, fc=nn.Linear(8, 2)
        )

    groups = {'stem': 8, 'layer.self_attn.in_proj': 4, 'layer.linear1': 12}
    check_toy(Toy(build, TOKENS, groups))


def test_a_window_attention_whose_heads_go_takes_its_bias_table_along():
    class Window(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.width = 3, 2
            self.qkv, self.proj, self.fc = nn.Linear(3, 18), nn.Linear(6, 4), nn.Linear(4, 2)
            self.table = nn.Parameter(torch.rand(9, 3))  # (2 * window - 1, heads)
            self.register_buffer('index', torch.arange(5)[:, None] - torch.arange(5)[None] + 4)

        def forward(self, x):
            batch, tokens, _ = x.shape
            q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            bias = self.table[self.index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
            weights = (q @ k.mT + bias).softmax(-1)
            out = (weights @ v).transpose(1, 2).reshape(batch, tokens, -1)
            return self.fc(self.proj(out).tanh().mean(1))

    _, found = check_toy(Toy(Window, TOKENS, {'qkv': 3, 'proj': 4}, heads='head'))
    assert 'table' in {m.tensor for m in found.group('qkv').members}
    _, found = check_toy(Toy(Window, TOKENS, {'qkv': 2, 'proj': 4}))
    assert 'table' not in {m.tensor for m in found.group('qkv').members}


class Efficient(nn.Module):
    """Keys meet values first: queries are a softmax over channels, keys one over tokens."""

    def __init__(self, over=-1):
        super().__init__()
        self.q, self.k, self.v, self.fc, self.over = *(nn.Linear(3, 6) for _ in range(3)), nn.Linear(6, 2), over

    def forward(self, x):
        q, k, v = self.q(x).softmax(self.over), self.k(x).softmax(-2), self.v(x)
        return self.fc(q @ (k.mT @ v))


def test_a_softmax_over_the_kept_channels_is_zero_elsewhere():
    exact(Efficient(), sample((2, 5, 3)), {'q': 6, 'v': 6})
    found = comb(randomise_(Efficient(-2)), sample((2, 5, 3)), trial=False)  # over tokens it is zero nowhere
    assert [g.name for g in found.groups] == ['v']
    assert 'bmm sums over channels that are not zero where a unit is removed, in the model itself' in found.reasons()
