"""Tensors that modules hold in plain attributes take part as parameters and buffers do."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.prune import Pruner, Schedule
from mmcpd.slim import mask_, restructure_, slim, structure
from mmcpd.slim.plain_tensors import plain_tensors, register_plain_
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import Net, randomise_

TOKENS = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).double()


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).double()


class Positions(nn.Module):
    """Positions that are computed once and kept, as those of a small transformer are; `name` is the attribute."""

    name = 'table'

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.fc = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)
        vars(self)[self.name] = drawn(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mix(self.stem(x) + vars_of(self, self.name).to(x.dtype)).relu())


def vars_of(module: nn.Module, name: str) -> Tensor:
    return getattr(module, name)


class Private(Positions):
    name = '_table'


GROUPS = {'stem': 8, 'mix': 6}


@pytest.mark.parametrize('kind', [Positions, Private])
def test_they_are_cut(kind):
    model = kind()
    found = exact(model, TOKENS, GROUPS)
    assert list(dict(model.named_buffers())) == [model.name]
    assert model.name not in model.state_dict()
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert getattr(small, model.name).shape == (5, 4)


def test_a_factor_between_two_layers_and_a_scale_below():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = drawn(1, 6, 1, 1)

        def forward(self, x):
            return x * self.gain

    parts = {'a': nn.Conv2d(3, 6, 1), 'scaled': Scaled(), 'norm': nn.BatchNorm2d(6), 'b': nn.Conv2d(6, 2, 1)}
    model = Net(lambda m, x: m.b(m.norm(m.scaled(m.a(x)))), **parts)
    exact(model, torch.randn(2, 3, 4, 4).double(), {'a': 6})


def test_one_tensor_on_two_modules_stays_one():
    def build() -> nn.Module:
        parts = {'stem': nn.Linear(3, 8), 'fc': nn.Linear(8, 2), 'other': nn.Module()}
        model = Net(lambda m, x: m.fc(m.stem(x) + m.table + m.other.table), **parts)
        model.table = model.other.table = drawn(5, 8)
        return model.double()

    model = build()
    found = exact(model, TOKENS, {'stem': 8})
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert small.table is small.other.table and small.table.shape == (5, 4)
    twin = restructure_(build(), structure(build(), small))
    twin.load_state_dict(small.state_dict())
    assert twin.table is twin.other.table and torch.equal(twin(TOKENS), small(TOKENS))


def test_a_file_says_how_they_are_cut():
    """No state dict holds them: the structure says which rows of a new model's stay."""
    model = randomise_(Positions().double())
    found = comb(model, TOKENS)
    small = slim(model, found, random_keep(found, 0.5, 0))
    plan = structure(Positions().double(), small)
    assert plan['tensors']['table'] == [5, 4] and plan['rows']['table'][0] is None
    twin = restructure_(Positions().double(), plan)
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(TOKENS), small(TOKENS))
    turned = copy.deepcopy(plan)
    turned['rows']['table'][1] = [row for row in range(8) if row not in plan['rows']['table'][1]]
    other = restructure_(Positions().double(), turned)
    other.load_state_dict(small.state_dict())
    assert not torch.allclose(other(TOKENS), small(TOKENS))

    again = comb(small, TOKENS)
    smaller = slim(small, again, random_keep(again, 0.5, 1))
    twin = restructure_(Positions().double(), structure(Positions().double(), smaller))
    twin.load_state_dict(smaller.state_dict())
    assert torch.equal(twin(TOKENS), smaller(TOKENS))


def test_what_a_file_may_not_say_about_them():
    model = randomise_(Positions().double())
    found = comb(model, TOKENS)
    plan = structure(Positions().double(), slim(model, found, random_keep(found, 0.5, 0)))
    without = Positions().double()
    del without.table
    without.table = torch.arange(40).view(5, 8)  # no floating point: it is never cut
    with pytest.raises(SlimError, match='table is missing in this model'):
        restructure_(without, plan)
    assert not dict(without.named_buffers())
    larger = copy.deepcopy(plan) | {'tensors': {**plan['tensors'], 'table': [5, 9]}}
    with pytest.raises(SlimError, match=r'table is \(5, 8\) in this model, and \(5, 9\)'):
        restructure_(untouched := Positions().double(), larger)
    assert 'table' in vars(untouched)


def test_copies_that_were_made_before_follow():
    model = randomise_(Positions().double())
    before, average = copy.deepcopy(model), copy.deepcopy(model)
    found = comb(model, TOKENS)
    keep = random_keep(found, 0.5, 0)
    small = slim(before, found, keep)
    assert 'table' in vars(before), 'it stays as it is'
    mask_(before, found, keep)
    assert torch.allclose(small(TOKENS), before(TOKENS), rtol=1e-12, atol=1e-12)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, found, optimizer, Schedule({'macs': 0.5}, begin=0, end=2, interval=1), round_to=1)
    pruner.also_mask(average)
    pruner.choose(keep)
    assert torch.allclose(average(TOKENS), before(TOKENS), rtol=1e-12, atol=1e-12)


def test_a_slim_model_is_pickled_and_moves_with_its_type():
    model = randomise_(Positions().double())
    found = comb(model, TOKENS)
    small = slim(model, found, random_keep(found, 0.5, 0))
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    twin = torch.load(file, weights_only=False)
    assert torch.equal(twin(TOKENS), small(TOKENS))
    assert small.float().table.dtype == torch.float32


# -- what stays as it is -----------------------------------------------------------------------------------------------
def test_what_meets_no_channels_stays_plain():
    model = randomise_(Positions().double())
    model.thresholds, model.steps = drawn(8), torch.arange(8)
    comb(model, TOKENS)
    assert 'thresholds' in vars(model) and 'steps' in vars(model) and 'table' not in vars(model)


def test_what_meets_frozen_channels_alone_stays_plain():
    """Of a transformer without a width of its own, the channels of the input are those of the positions."""
    model = Net(lambda m, x: m.fc(m.mix(x + m.table)) + m.level, mix=nn.Linear(3, 6), fc=nn.Linear(6, 2))
    model.table, model.level = drawn(5, 3), drawn(2)
    found = exact(model, TOKENS, {'mix': 6})
    assert 'table' in vars(model) and 'level' in vars(model) and not {'table', 'level'} & found.tensors.keys()


def test_a_detached_parameter_still_follows_the_parameter():
    model = Net(lambda m, x: m.fc(m.stem(x) * m.gain + m.seen), stem=nn.Linear(3, 8), fc=nn.Linear(8, 2))
    model.gain = nn.Parameter(torch.rand(8))
    model.double()
    model.seen = model.gain.detach()
    assert not plain_tensors(model)
    comb(model, TOKENS)
    assert 'seen' in vars(model) and model.seen.data_ptr() == model.gain.data_ptr()


class Named(Positions):
    """A class that has something of the same name: a buffer would be hidden behind it."""

    table = None


def test_what_cannot_be_a_buffer_freezes_and_says_so():
    found = comb(randomise_(Named().double()), TOKENS)
    assert [group.name for group in found.groups] == ['mix']
    assert 'table is neither a parameter nor a buffer: `register_buffer` lets it be cut' in found.reasons()


class Renewed(Positions):
    """A table that is made anew where more tokens come."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > len(self.table):
            self.table = torch.zeros(x.shape[1], 8, dtype=x.dtype)
        return super().forward(x)


def test_one_that_a_forward_makes_anew_freezes_like_a_buffer():
    model = randomise_(Renewed().double())
    found = comb(model, TOKENS)
    assert [group.name for group in found.groups] == ['mix']
    assert any('Renewed.forward makes it anew' in reason for reason in found.reasons())
    model(torch.zeros(1, 9, 3).double())  # and it is still the model's
    exact(Renewed(), TOKENS, GROUPS)


def test_names_of_other_things_are_left_alone():
    model = randomise_(Positions())
    register_plain_(model, ['stem.weight', 'nowhere', 'stem.nowhere', 'name'])
    assert 'table' in vars(model) and not dict(model.named_buffers())
