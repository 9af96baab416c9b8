"""Claims of combing that only one line holds up: each test here fails where that line is changed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from tests.helpers import Net, check_equal, members, randomise_, rows, sample
from tests.toys import Toy, check_toy, pooled

IMAGE = ((2, 3, 4, 4),)
TOKENS = ((2, 5, 3),)
PATTERN = torch.linspace(0.1, 1, 6, dtype=torch.float64)


def net(run, width=6, **parts) -> Toy:
    """Return a toy in which only `b` may lose channels: `a`, a function, `b`, a classifier."""

    def build():
        return Net(
            lambda m, x: m.fc(pooled(m.b(run(m, m.a(x))).tanh())),
            a=nn.Conv2d(3, 6, 1),
            b=nn.Conv2d(width, 4, 1),
            fc=nn.Linear(4, 2),
            **{name: part() for name, part in parts.items()},
        )

    return Toy(build, IMAGE, {'b': 4})


def padded(x, before: int, after: int):
    """Add channels of zeros."""
    return F.pad(x, (0, 0, 0, 0, before, after))


# -- products ----------------------------------------------------------------------------------------------------------
def test_what_a_convolution_group_reads_beside_padding_stays():
    """No group can go whole, but of what the groups make the same channel of each can."""
    toy = net(lambda m, x: m.grouped(padded(x, 1, 1)), width=8, grouped=lambda: nn.Conv2d(8, 8, 1, groups=4))
    toy.groups = {'grouped': 2, 'b': 4}
    toy.frozen = {'a.weight:0': 'a fixed position'}
    check_toy(toy)


def test_of_groups_that_read_padding_only_channels_that_are_none_go():
    """Of the groups (padding, 0, 1, 2) and (3, 4, 5, padding) the second and the third channel of both may go."""
    toy = net(lambda m, x: m.grouped(padded(x, 1, 1)), width=8, grouped=lambda: nn.Conv2d(8, 8, 1, groups=2))
    toy.groups = {'a': 2, 'grouped': 4, 'b': 4}
    toy.members = {'a': {'a.weight:0': [[0, 4], [1, 5]], 'a.bias:0': [[0, 4], [1, 5]], 'grouped.weight:1': [[1], [2]]}}
    check_toy(toy)


def test_channels_where_a_pooling_looks_for_space_stay():
    toy = Toy(
        lambda: Net(lambda m, x: m.fc(F.avg_pool2d(m.a(x), (1, 3))), a=nn.Linear(3, 6), fc=nn.Linear(2, 2)),
        TOKENS,
        {},
        frozen={'a.weight:0': 'a spatial dimension'},
    )
    check_toy(toy)


def test_channels_that_an_attention_takes_for_tokens_stay():
    def run(m, x):
        x = m.a(x).transpose(1, 2).unsqueeze(1).contiguous()  # (N, 1, C, L)
        return m.fc(F.scaled_dot_product_attention(x, x, x)[:, 0].transpose(1, 2))

    toy = Toy(
        lambda: Net(run, a=nn.Linear(3, 6), fc=nn.Linear(6, 2)), TOKENS, {}, frozen={'a.weight:0': 'a token dimension'}
    )
    check_toy(toy)


def test_the_entries_of_an_embedding_stay_where_a_product_sums_over_them():
    def run(m, tokens):
        x = m.embed(tokens)
        return m.fc(F.linear(x, m.embed.weight).relu() @ m.embed.weight)

    tokens = torch.arange(10).reshape(2, 5)
    toy = Toy(
        lambda: Net(run, embed=nn.Embedding(10, 6), fc=nn.Linear(6, 2)),
        (tokens,),
        {'embed': 6},
        frozen={'embed.weight:0': 'the entries of an embedding'},
    )
    check_toy(toy)


@pytest.mark.parametrize(
    ('left', 'right', 'groups'),
    [
        (torch.sigmoid, torch.cos, {}),
        (torch.sigmoid, torch.tanh, {'q': 6}),
        (torch.tanh, torch.sigmoid, {'q': 6}),
    ],
)
def test_a_product_of_activations_sums_over_channels_of_which_one_factor_is_zero(left, right, groups):
    def run(m, x):
        return m.fc((left(m.q(x)) @ right(m.k(x)).mT).softmax(-1) @ x)

    toy = Toy(lambda: Net(run, q=nn.Linear(3, 6), k=nn.Linear(3, 6), fc=nn.Linear(3, 2)), TOKENS, groups)
    if not groups:
        toy.frozen = dict.fromkeys(('q.weight:0', 'k.weight:0'), 'sums over channels that are not zero')
    check_toy(toy)


def test_heads_of_values_go_with_their_heads_of_queries():
    def run(m, x):
        heads = (m.heads, m.heads, m.value_heads)  # one attribute for all would couple them by itself
        layers = zip((m.q, m.k, m.v), heads, strict=True)
        q, k, v = (layer(x).unflatten(-1, (count, -1)).transpose(1, 2) for layer, count in layers)
        return m.fc(F.scaled_dot_product_attention(q, k, v, scale=0.6).transpose(1, 2).flatten(2))

    parts = dict(q=(3, 8), k=(3, 8), v=(3, 8), fc=(8, 2))  # of one width, or torch takes another kernel
    toy = Toy(
        lambda: Net(run, heads=4, value_heads=4, **{name: nn.Linear(*size) for name, size in parts.items()}),
        TOKENS,
        {'q': 4},
        {
            'q': {
                'q.weight:0': rows(4, 2),
                'q.bias:0': rows(4, 2),
                'k.weight:0': rows(4, 2),
                'k.bias:0': rows(4, 2),
                'v.weight:0': rows(4, 2),
                'v.bias:0': rows(4, 2),
                'fc.weight:1': rows(4, 2),
            }
        },
        heads='head',
    )
    check_toy(toy)


def test_channels_that_were_folded_into_the_batch_cost_and_go():
    def run(m, x):
        n, _, h, w = x.shape
        y = m.one(m.a(x).reshape(-1, 1, h, w)).tanh()
        return m.fc(pooled(y.reshape(n, -1, h, w)))

    parts = dict(a=nn.Conv2d(3, 6, 1), one=nn.Conv2d(1, 1, 3, padding=1), fc=nn.Linear(6, 2))
    check_toy(Toy(lambda: Net(run, **copy.deepcopy(parts)), IMAGE, {'a': 6}))


@pytest.mark.parametrize('bias', [True, False])
def test_a_linear_layer_that_arrives_whole(bias):
    """As it does on devices with a kernel of their own; on a CPU only where autograd is passed by."""

    def build(whole: bool):
        def run(m, x):
            x = m.a(x).tanh()
            if not whole:
                return m.fc(m.b(x).tanh())
            with torch._C._AutoDispatchBelowAutograd():
                x = m.b(x)
            return m.fc(x.tanh())

        return randomise_(
            Net(run, a=nn.Linear(3, 6), b=nn.Linear(6, 4, bias=bias), fc=nn.Linear(4, 2)),
        )

    model, twin = build(True), build(False)
    x = sample((2, 5, 3))
    found, plain = comb(model, x), comb(twin, x)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 4}
    for name in ('a', 'b'):
        assert members(found, name) == members(plain, name)
    keep = found.keep()
    keep['a'][:2] = keep['b'][1] = False
    assert found.cost(keep) == plain.cost(keep)
    check_equal(model, found)


# -- what is zero, and what is fixed -----------------------------------------------------------------------------------
def test_padding_with_a_number_is_seen_by_a_sum_over_the_channels():
    def run(m, x):
        x = F.pad(x, (1, 1, 1, 1), value=0.5)
        return x * x.sum(1, keepdim=True)

    toy = net(run)
    toy.groups = {'a': 6, 'b': 4}
    _, found = check_toy(toy)
    assert len(found.fixes.statistics) == 1


def test_one_part_that_is_not_zero_is_seen_by_a_sum_over_all_parts():
    def run(m, x):
        x = torch.cat([x, x.cos()], 1)
        return x * x.sum(1, keepdim=True)

    toy = net(run, width=12)
    toy.groups = {'a': 6, 'b': 4}
    _, found = check_toy(toy)
    assert len(found.fixes.statistics) == 1


@pytest.mark.parametrize(
    'function',
    [
        lambda m, x: x.flatten(2).softmax(-1).view_as(x),
        lambda m, x: m.norm(x.cos()),
    ],
    ids=['softmax over space', 'batch norm without a weight'],
)
def test_what_is_not_zero_is_seen_by_a_sum_over_the_channels(function):
    def run(m, x):
        x = function(m, x)
        return x * x.sum(1, keepdim=True)

    toy = net(run, norm=lambda: nn.BatchNorm2d(6, affine=False))
    toy.groups = {'a': 6, 'b': 4}
    _, found = check_toy(toy)
    assert len(found.fixes.statistics) == 1


def test_a_step_over_padding_freezes_the_neighbours():
    toy = net(lambda m, x: padded(x, 1, 1)[:, 1::2], width=4)
    toy.groups = {'a': 2, 'b': 4}
    toy.members = {
        'a': {
            'a.weight:0': [[1, 2], [3, 4]],
            'a.bias:0': [[1, 2], [3, 4]],
            'b.weight:1': [[1], [2]],
        }
    }
    toy.frozen = {'a.weight:0': 'a step over a fixed position'}
    check_toy(toy)


@pytest.mark.parametrize('swap', [False, True])
def test_a_channel_that_meets_padding_stays(swap):
    def run(m, x):
        y = padded(m.narrow(x), 1, 1)
        return y + x if swap else x + y

    toy = net(run, narrow=lambda: nn.Conv2d(6, 4, 1))
    rest = [[1], [2], [3], [4]]
    toy.groups = {'a': 4, 'b': 4}
    toy.members = {
        'a': {
            'a.weight:0': rest,
            'a.bias:0': rest,
            'narrow.weight:0': rows(4),
            'narrow.bias:0': rows(4),
            'narrow.weight:1': rest,
            'b.weight:1': rest,
        }
    }
    toy.frozen = {'a.weight:0': 'add with a fixed position'}
    check_toy(toy)


def test_channels_that_meet_those_of_no_layer_stay():
    toy = net(lambda m, x: x * PATTERN[:, None, None])
    toy.frozen = {'a.weight:0': 'mul with channels that no layer produces'}
    check_toy(toy)


def test_channels_of_an_index_stay():
    def run(m, x):
        return torch.tensor([0.3, -0.7], dtype=x.dtype)[(x > 0).long()]

    toy = net(run)
    toy.frozen = {'a.weight:0': 'channels in an index'}
    check_toy(toy)


def test_the_reason_that_was_met_first_is_given():
    toy = Toy(
        lambda: Net(lambda m, x: m.a(x) + PATTERN[:, None, None], a=nn.Conv2d(3, 6, 1)),
        IMAGE,
        {},
        frozen={'a.weight:0': 'add with channels that no layer produces'},
    )
    check_toy(toy)


# -- tensors -----------------------------------------------------------------------------------------------------------
def test_a_parameter_that_is_a_buffer_elsewhere_has_one_set_of_atoms():
    def run(m, x):
        return m.fc(m.a(x).tanh() + F.linear(x, m.copy.tied))

    model = randomise_(Net(run, a=nn.Linear(3, 6), copy=nn.Module(), fc=nn.Linear(6, 2)))
    model.copy.register_buffer('tied', model.a.weight)
    found = comb(model, sample((4, 3)), unused='leave')
    assert {g.name: g.units for g in found.groups} == {'a': 6}
    assert members(found, 'a') == {'a.weight:0': rows(6), 'a.bias:0': rows(6), 'fc.weight:1': rows(6)}
    small = check_equal(model, found)
    assert small.copy.tied is small.a.weight


def test_an_element_in_a_prunable_row_and_column_counts_once():
    toy = net(lambda m, x: padded(m.narrow(x), 1, 1) + x, narrow=lambda: nn.Conv2d(6, 4, 1))
    toy.groups = {'a': 4, 'b': 4}
    model, found = check_toy(toy)
    marked = {name: torch.zeros(parameter.shape, dtype=torch.bool) for name, parameter in model.named_parameters()}
    for group in found.groups:
        for member in group.members:
            marked[member.tensor].index_fill_(member.dim, member.index.flatten(), True)
    assert found.prunable() == (sum(int(m.sum()) for m in marked.values()), sum(m.numel() for m in marked.values()))
    assert 0 < int(marked['b.weight'].sum()) == 4 * 6 and int(marked['narrow.weight'].sum()) == 4 * 6
    assert int(marked['a.weight'].sum()) == 4 * 3


# -- inference mode ----------------------------------------------------------------------------------------------------
def test_an_input_that_was_made_under_inference_mode_is_one_like_any_other():
    def run(m, x):
        x = F.relu(m.norm(m.stem(x)))
        return m.fc(F.gelu(m.mix(F.adaptive_avg_pool2d(x, 2).flatten(2).transpose(1, 2)))).softmax(1)

    parts = dict(stem=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6), mix=nn.Linear(6, 5), fc=nn.Linear(5, 2))
    model, x = randomise_(Net(run, **parts)), sample((2, 3, 4, 4))
    expected = comb(model, x)
    assert {g.name: g.units for g in expected.groups} == {'stem': 6, 'mix': 5}
    with torch.inference_mode():
        assert comb(model, x.clone()).to_json() == expected.to_json()
