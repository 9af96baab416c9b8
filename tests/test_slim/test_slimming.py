"""Slimming: what a slim model keeps of its dense one, and the structure that brings it back."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, call, check_equal, gap, masked, members, randomise_, rows, sample

IMAGE = sample((2, 3, 6, 6))


class Small(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.a, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.b, self.fc = nn.Conv2d(width, 6, 1, groups=2), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.b(self.bn(self.a(x)).tanh()).mean((2, 3)))


@pytest.fixture
def small():
    torch.manual_seed(0)
    model = randomise_(Small())
    return model, comb(model, IMAGE)


class Attention(nn.Module):
    """Attention whose scale follows from its width, by torch's default."""

    def __init__(self, heads=2, width=4, bias=True):
        super().__init__()
        self.heads, self.width = heads, width
        self.qkv, self.proj = nn.Linear(3, 3 * heads * width, bias=bias), nn.Linear(heads * width, 2)

    def forward(self, x):
        batch, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, self.heads * self.width))


def test_the_dense_model_stays_as_it_is(small):
    model, found = small
    before = copy.deepcopy(model.state_dict())
    slim(model, found, random_keep(found, 0.5, 0))
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)
    assert model.a.out_channels == 8


def test_a_slim_model_is_of_the_same_classes_and_shares_nothing(small):
    model, found = small
    model.train()
    model.bn.eval()
    model.a.weight.requires_grad_(False)
    slender = slim(model, found, random_keep(found, 0.5, 0))
    assert [type(m) for m in slender.modules()] == [type(m) for m in model.modules()]
    assert [m.training for m in slender.modules()] == [m.training for m in model.modules()]
    assert [p.requires_grad for p in slender.parameters()] == [p.requires_grad for p in model.parameters()]
    assert list(slender.state_dict()) == list(model.state_dict())
    storages = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert not storages & ({p.data_ptr() for p in slender.parameters()} | {b.data_ptr() for b in slender.buffers()})
    assert all(p.is_leaf and p.grad is None for p in slender.parameters())
    assert all(p.is_contiguous() for p in slender.parameters())


def test_attributes_say_the_new_widths(small):
    model, found = small
    keep = found.keep()
    keep['a'][0] = False
    slender = slim(model, found, keep)
    assert found.group('a').units == 2
    assert (slender.a.in_channels, slender.a.out_channels) == (3, 4)
    assert (slender.b.in_channels, slender.b.out_channels, slender.b.groups) == (4, 3, 1)
    assert (slender.bn.num_features, slender.fc.in_features, slender.fc.out_features) == (4, 3, 2)


def test_a_slim_model_can_be_combed_and_slimmed_again(small):
    for model, found, build in (
        (*small, Small),
        (lambda m: (m, comb(m, sample((2, 5, 3))), Attention))(randomise_(Attention())),
    ):
        first = slim(model, found, random_keep(found, 0.8, 0))
        again = comb(first, found.example.inputs)
        assert [g.name for g in again.groups] == [g.name for g in found.groups]
        second = slim(first, again, random_keep(again, 0.5, 1))
        out = masked(first, again, random_keep(again, 0.5, 1))(*found.example.inputs)
        assert gap(out, second(*found.example.inputs)) < 1e-9
        assert sum(p.numel() for p in second.parameters()) < sum(p.numel() for p in first.parameters())
        plan = json.loads(json.dumps(structure(model, second)))
        twin = restructure_(build().double().eval(), plan)
        twin.load_state_dict(second.state_dict())
        assert gap(second(*found.example.inputs), twin(*found.example.inputs)) == 0


def test_the_scale_of_an_attention_stays_what_it_was():
    x = sample((2, 5, 3))
    for heads in (1, 2):
        for bias in (True, False):
            model = randomise_(Attention(heads, bias=bias))
            with torch.no_grad():
                model.qkv.weight.mul_(3)
            found = comb(model, x)
            assert len(found.fixes.scales) == 1
            keep = found.keep()
            keep['qkv'][:3] = False
            slender = slim(model, found, keep)
            assert slender.width == 1
            assert gap(masked(model, found, keep)(x), slender(x)) < 1e-12
            # Halving the width of the query twice changes its rows by the root of a fourth.
            torch.testing.assert_close(slender.qkv.weight[:heads], model.qkv.weight[3 : 4 * heads : 4] / 2)
            torch.testing.assert_close(slender.qkv.weight[heads:], model.qkv.weight[4 * heads + 3 :: 4])


def test_shared_parameters_stay_shared():
    parts = dict(table=nn.Embedding(7, 6), mix=nn.Linear(6, 6), out=nn.Linear(6, 7, bias=False))
    model = Net(lambda m, i: m.out(m.mix(m.table(i)).tanh() + m.table(i)), **parts)
    model.out.weight = model.table.weight
    randomise_(model)
    found = comb(model, torch.tensor([[0, 3, 6], [1, 1, 2]]))
    assert [(g.name, g.units) for g in found.groups] == [('mix', 6)]  # the table is read last, as a classifier
    check_equal(model, found)
    slender = slim(model, found, random_keep(found, 0.5, 0))
    assert slender.out.weight is slender.table.weight
    plan = json.loads(json.dumps(structure(model, slender)))
    fresh = copy.deepcopy(model)
    twin = restructure_(fresh, plan)
    assert twin.out.weight is twin.table.weight
    twin.load_state_dict(slender.state_dict())
    assert gap(call(found, slender), call(found, twin)) == 0


def test_buffers_without_a_place_in_the_state_dict():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc = nn.Linear(3, 6), nn.Linear(6, 2)
            self.register_buffer('scale', torch.linspace(1, 2, 6), persistent=False)

        def forward(self, x):
            return self.fc((self.a(x) * self.scale).tanh())

    model = randomise_(Scaled())
    found = comb(model, sample((4, 3)))
    assert [(g.name, g.units) for g in found.groups] == [('a', 6)]
    slender = check_equal(model, found)
    assert slender.scale.shape == (4,)


def test_a_structure_is_plain_json(small):
    model, found = small
    plan = structure(model, slim(model, found, random_keep(found, 0.5, 0)))

    def walk(value):
        if isinstance(value, dict):
            assert all(type(k) is str for k in value)
            list(map(walk, value.values()))
        elif isinstance(value, list):
            list(map(walk, value))
        else:
            assert type(value) in (int, float, str, bool), value

    walk(plan)
    assert plan['tensors']['a.weight'] == [4, 3, 3, 3]
    assert plan['attributes']['b'] == {'in_channels': 4, 'out_channels': 3, 'groups': 1}


def test_the_structure_of_the_dense_model_is_empty(small):
    model, found = small
    plan = structure(model, slim(model, found, found.keep()))
    assert set(map(len, plan.values())) == {0}


def test_a_structure_of_another_model_is_refused(small):
    model, found = small
    plan = json.loads(json.dumps(structure(model, slim(model, found, random_keep(found, 0.5, 0)))))
    with pytest.raises(SlimError, match=r"no module 'bn'|bn\.weight is missing"):
        restructure_(
            Net(lambda m, x: x, a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 6, 1, groups=2), fc=nn.Linear(6, 2)), plan
        )
    with pytest.raises(SlimError, match=r'is \(2, 3, 3, 3\) in this model, and \(4, 3, 3, 3\) in the structure'):
        restructure_(Small(width=2), plan)
    with pytest.raises(SlimError, match='a has no attribute depth, which the structure sets'):
        restructure_(Small(), {**plan, 'attributes': {'a': {'depth': 3}}})


def test_a_size_that_cannot_follow_is_an_error_that_names_it():
    model = randomise_(Net(lambda m, x: m.fc(m.a(x).relu().view(-1, 20)), a=nn.Conv2d(3, 5, 5), fc=nn.Linear(20, 2)))
    found = comb(model, IMAGE, trial=False)
    keep = found.keep()
    keep['a'][0] = False
    with pytest.raises(SlimError, match='no attribute makes 20 equal 16'):
        slim(model, found, keep)


class Picky(nn.Module):
    """Goes on where a size is what it always was."""

    def __init__(self, size, factor):
        super().__init__()
        self.a, self.fc, self.size, self.factor = nn.Linear(3, 6), nn.Linear(6, 2), size, factor

    def forward(self, x):
        x = self.a(x)
        if self.size(x, self) != 12:
            raise ValueError('twelve')
        return self.fc(x)


@pytest.mark.parametrize('size', [lambda x, m: x.shape[-1] * 2, lambda x, m: x.shape[-1] + x.shape[-1]])
def test_a_width_that_the_forward_checks_against_a_number_freezes(size):
    found = comb(randomise_(Picky(size, 2)), sample((4, 3)), trial=False)
    assert not found.groups
    assert any('compares (channels' in reason and '12, which never changes' in reason for reason in found.reasons())


def test_a_width_that_the_forward_checks_is_an_error():
    model = randomise_(Picky(lambda x, m: x.shape[-1] * m.factor, 2))
    found = comb(model, sample((4, 3)), trial=False)
    with pytest.raises(SlimError, match=r'compares \(channels \* factor\) with 12, which no longer agree'):
        slim(model, found, random_keep(found, 0.5, 0))
    frozen = comb(model, sample((4, 3)))
    assert not frozen.groups
    assert any('compares (channels * factor) with 12' in f.reason for f in frozen.frozen)


def test_a_width_that_the_forward_compares_with_an_attribute_follows():
    class Assertive(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.fc, self.width = nn.Linear(3, 6), nn.Linear(6, 2), 6

        def forward(self, x):
            x = self.a(x)
            assert x.shape[-1] == self.width
            return self.fc(x)

    model = randomise_(Assertive())
    found = comb(model, sample((4, 3)))
    assert [(g.name, g.units) for g in found.groups] == [('a', 6)]
    check_equal(model, found)


def test_two_runs_of_one_line_that_disagree_are_coupled():
    class Apart(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = (
                nn.ModuleList(nn.Linear(3, 6) for _ in '12'),
                nn.ModuleList(nn.Linear(6, 2) for _ in '12'),
            )
            self.third, self.last, self.width = nn.Linear(3, 5), nn.Linear(5, 2), 6

        def forward(self, x):
            y = self.last(self.third(x))
            for into, out in zip(self.into, self.out, strict=True):
                y = y + out(into(x).view(-1, self.width))
            return y

    model = randomise_(Apart())
    found = comb(model, sample((4, 3)))
    assert {g.name: g.units for g in found.groups} == {'into.0': 6, 'third': 5}
    assert members(found, 'into.0')['into.1.weight:0'] == rows(6)
    check_equal(model, found)
