"""nn.MultiheadAttention in all its forms, and the function behind it where a module calls it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.slim import slim
from mmcpd.slim.attention import SlimMultiheadAttention
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import Net, check_structure, gap, masked, sample

TOKENS = sample((2, 5, 3))
FORMS = {
    'other keys': {'kdim': 6, 'vdim': 10},
    'other values': {'vdim': 10},
    'other keys, without bias': {'kdim': 6, 'bias': False},
    'a key of its own': {'add_bias_kv': True},
    'a key of zeros': {'add_zero_attn': True},
    'both': {'add_bias_kv': True, 'add_zero_attn': True},
    'all': {'kdim': 6, 'vdim': 10, 'add_bias_kv': True, 'add_zero_attn': True, 'bias': False},
}


def net(form, **call):
    options = FORMS[form]

    def run(m, x):
        y = m.a(x)
        return m.fc(y + m.at(y, m.k(x), m.v(x), **call)[0])

    parts = {'k': nn.Linear(3, options.get('kdim', 8)), 'v': nn.Linear(3, options.get('vdim', 8))}
    attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
    return Net(run, a=nn.Linear(3, 8), **parts, at=attention, fc=nn.Linear(8, 2))


def groups(form):
    options = FORMS[form]
    if not {'kdim', 'vdim'} & options.keys():  # keys and values are as wide as the embedding, and share its columns
        return {'a': 8, 'at.in_proj': 4, 'at.in_proj#2': 4}
    return {'a': 8, 'k': options.get('kdim', 8), 'v': options.get('vdim', 8), 'at': 4, 'at#2': 4}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('weights', [True, False])
def test_forms_of_the_module(form, weights):
    model = net(form, need_weights=weights)
    found = exact(model, TOKENS, groups(form))
    small = slim(model, found, random_keep(found, 0.5, 0, awkward=True))
    assert type(small.at) is SlimMultiheadAttention
    check_structure(model, found, small, lambda: net(form, need_weights=weights))


@pytest.mark.parametrize('form', FORMS)
def test_masks_reach_all_keys_but_those_that_the_module_adds(form):
    hidden = torch.tensor([[False, False, True, False, True], [False] * 4 + [True]])
    causal = torch.triu(torch.full((5, 5), float('-inf'), dtype=torch.float64), 1)
    padding = torch.zeros(2, 5, dtype=torch.float64).masked_fill(hidden, float('-inf'))
    model = net(form, key_padding_mask=padding, attn_mask=causal)
    found = exact(model, TOKENS, groups(form))
    keep = random_keep(found, 0.5, 1, awkward=True)
    assert gap(masked(model, found, keep)(TOKENS), slim(model, found, keep)(TOKENS)) < 1e-12


@pytest.mark.parametrize('batch', [1, 2, 3])
@pytest.mark.parametrize('heads', [2, 3])
def test_a_batch_of_heads_that_is_as_wide_as_a_channel_dimension_is_none(batch, heads):
    # Torch views queries as (L, batch * heads, 2); with 2 samples that is as long as the embedding, with 1 as `kdim`.
    attention = nn.MultiheadAttention(2 * heads, heads, batch_first=True, kdim=heads, vdim=5)
    parts = {'a': nn.Linear(3, 2 * heads), 'k': nn.Linear(3, heads), 'v': nn.Linear(3, 5)}
    model = Net(
        lambda m, x: m.fc(m.at(m.a(x), m.k(x), m.v(x), need_weights=False)[0]),
        at=attention, fc=nn.Linear(2 * heads, 2), **parts,
    )  # fmt: skip
    free = {'a': 2 * heads, 'k': heads, 'v': 5, 'at': 2, 'at#2': 2, 'at.out_proj': 2 * heads}
    exact(model, sample((batch, 5, 3)), free)


class Pooled(nn.Module):
    """Attention of a mean over all tokens, by the function, as pooling heads have it."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.stem, self.fc, self.weights = nn.Linear(3, 8), nn.Linear(6, 2), weights
        self.q, self.k, self.v, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.width, self.heads = 8, 2

    def forward(self, x):
        x = self.stem(x).transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            query=x.mean(0, keepdim=True), key=x, value=x, embed_dim_to_check=x.shape[-1], num_heads=self.heads,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
            in_proj_weight=None, in_proj_bias=torch.cat([self.q.bias, self.k.bias, self.v.bias]), bias_k=None,
            bias_v=None, add_zero_attn=False, dropout_p=0, out_proj_weight=self.c.weight, out_proj_bias=self.c.bias,
            use_separate_proj_weight=True, training=self.training, need_weights=self.weights)  # fmt: skip
        return self.fc(out.squeeze(0))


class ByAttribute(Pooled):
    def forward(self, x):
        x = self.stem(x).transpose(0, 1)
        zeros = torch.zeros(0, dtype=x.dtype)
        out, _ = F.multi_head_attention_forward(
            x, x, x, self.width, self.heads, None, None, None, None, bool(zeros.numel()), 0.0, self.c.weight,
            self.c.bias, need_weights=False, use_separate_proj_weight=True, q_proj_weight=self.q.weight,
            k_proj_weight=self.k.weight, v_proj_weight=self.v.weight)  # fmt: skip
        return self.fc(out.mean(0))


class ByNumber(Pooled):
    def forward(self, x):
        x = self.stem(x).transpose(0, 1)
        out, _ = F.multi_head_attention_forward(
            x, x, x, 8, 2, None, None, None, None, False, 0.0, self.c.weight, self.c.bias, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=self.q.weight, k_proj_weight=self.k.weight,
            v_proj_weight=self.v.weight)  # fmt: skip
        return self.fc(out.tanh().mean(0))


@pytest.mark.parametrize('kind', [Pooled, lambda: Pooled(weights=True), ByAttribute, ByNumber])
def test_the_function_leaves_the_trunk_free(kind):
    # Embedding and heads have one width there: the same index of each head goes in both.
    exact(kind(), TOKENS, {'stem': 4, 'c': 6})
