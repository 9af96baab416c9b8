"""A slim model in a file: whatever hooks, first forwards and shared tensors do, it comes back as it was."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.engine.slim_file import read_slim, save_slim
from mmcpd.engine.slim_model import cut_to_
from mmcpd.errors import SlimError
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.trial import random_keep
from mmcpd.slim.weights import set_weights_, weights
from tests.helpers import randomise_

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 3)
        self.fc = nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.b(self.bn(self.a(x)).relu()).relu().mean((2, 3)))


class Renaming(Plain):
    """Its state dict has other names, lacks the trunk, and has an entry that no module has."""

    def __init__(self):
        super().__init__()
        self._register_state_dict_hook(self.written)
        self._register_load_state_dict_pre_hook(self.read)

    @staticmethod
    def written(module, state, prefix, _):
        for name in list(state):
            value = state.pop(name)
            if not name.startswith(f'{prefix}bn'):
                state[prefix + 'inner.' + name.removeprefix(prefix)] = value
        state[prefix + 'stamp'] = torch.ones(1)

    def read(self, state, prefix, *_):
        state.pop(prefix + 'stamp', None)
        for name in list(state):
            state[name.replace('inner.', '')] = state.pop(name)


class Extra(Plain):
    def __init__(self, seen=None):
        super().__init__()
        self.seen = seen or {}

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


class Made(Plain):
    """It makes a buffer, another in a slot, and a parameter when it first runs."""

    def __init__(self):
        super().__init__()
        self.register_buffer('slot', None)
        self.scale = None

    def forward(self, x):
        x = self.bn(self.a(x)).relu()
        if not hasattr(self, 'table'):
            self.register_buffer('table', torch.rand(x.shape[1]))
            self.slot = torch.arange(x.shape[1])
            self.scale = nn.Parameter(torch.rand(x.shape[1], 1, 1))
        x = x * self.table[:, None, None] * self.scale + (self.slot.float()[:, None, None] * x).tanh()
        return self.fc(self.b(x).relu().mean((2, 3)))


class Lazy(Plain):
    def __init__(self):
        super().__init__()
        self.b = nn.LazyConv2d(6, 3)


class Constant(Plain):
    """It multiplies by a buffer that state dicts leave out."""

    def __init__(self):
        super().__init__()
        self.register_buffer('scales', torch.linspace(1, 2, 8)[:, None, None], persistent=False)

    def forward(self, x):
        return self.fc(self.b(self.bn(self.a(x)).relu() * self.scales).relu().mean((2, 3)))


class TwoPaths(nn.Module):
    """One convolution at two paths, a parameter under two names, an attention at two paths."""

    def __init__(self):
        super().__init__()
        shared = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.stem, self.levels, self.out = nn.Conv2d(3, 8, 3), nn.ModuleList([shared, shared]), nn.Conv2d(8, 6, 3)
        self.table, self.mix, self.back = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 6, bias=False)
        self.back.weight = nn.Parameter(self.table.weight.detach().clone().T.contiguous())
        self.again = nn.Linear(6, 10)
        self.again.weight = self.table.weight
        self.one = nn.MultiheadAttention(6, 2, batch_first=True)
        self.two, self.fc = self.one, nn.Linear(6, 2)

    def forward(self, x):
        x = self.out(self.levels[1](self.levels[0](self.stem(x)))).relu().flatten(2).mT
        x = self.back(self.mix(self.table(x).tanh() + self.again(x)).tanh())
        for attention in (self.one, self.two):
            x = attention(x, x, x, need_weights=False)[0]
        return self.fc(x.mean(1))


def cut(model, ratio=0.6):
    """Return a slim model with random weights, and what combing found."""
    with torch.no_grad():
        model(IMAGES)
    found = comb(randomise_(model).float(), IMAGES)
    return slim(model, found, random_keep(found, ratio, 0))


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES)


@pytest.mark.parametrize('kind', [Plain, Renaming, Extra, Made, Lazy, Constant, TwoPaths])
def test_a_fresh_model_takes_what_was_saved_and_computes_the_same(kind, tmp_path):
    small = cut(kind())
    save_slim(tmp_path / 'slim.pth', small, structure(kind(), small), {})
    content = read_slim(tmp_path / 'slim.pth')
    twin = cut_to_(kind(), content, 'slim.pth')
    assert torch.equal(outputs(twin), outputs(small))
    assert sum(p.numel() for p in twin.parameters()) == sum(p.numel() for p in small.parameters())
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == {
        n: p.requires_grad for n, p in small.named_parameters()
    }
    assert {n: b.dtype for n, b in twin.named_buffers()} == {n: b.dtype for n, b in small.named_buffers()}
    if kind is not Renaming:
        assert list(content['state_dict']) == list(small.state_dict())
    name = next(n for n in content['state_dict'] if n.endswith('weight'))
    content['state_dict'][name] = content['state_dict'][name] + 1
    assert not torch.equal(outputs(cut_to_(kind(), content, 'slim.pth')), outputs(small))  # the file is what is read


def test_plain_loaders_read_a_file_of_a_model_without_hooks(tmp_path):
    small = cut(Plain())
    save_slim(tmp_path / 'slim.pth', small, structure(Plain(), small), {})
    twin = restructure_(Plain(), structure(Plain(), small))
    twin.load_state_dict(torch.load(tmp_path / 'slim.pth', weights_only=True)['state_dict'])
    assert torch.equal(outputs(twin), outputs(small))


def test_an_extra_state_comes_back_and_one_that_could_run_code_is_refused(tmp_path):
    small = cut(Extra({'steps': 3, 'mean': torch.ones(2)}))
    save_slim(tmp_path / 'slim.pth', small, structure(Extra(), small), {})
    twin = cut_to_(Extra(), read_slim(tmp_path / 'slim.pth'), 'slim.pth')
    assert twin.seen['steps'] == 3
    small.seen = {'call': outputs}
    with pytest.raises(ValueError, match='_extra_state: what get_extra_state returns must be tensors and plain values'):
        save_slim(tmp_path / 'other.pth', small, structure(Extra(), small), {})


def test_what_no_model_makes_is_refused():
    plan = structure(Made(), cut(Made()))
    assert set(plan['added']) == {'table', 'slot', 'scale'}
    with pytest.raises(SlimError, match=r'fc of the structure does not fit what Plain has'):
        restructure_(Plain(), {**plan, 'added': {'fc': plan['added']['table']}, 'tensors': {'fc': [3]}})


def test_shared_modules_and_tensors_stay_shared_however_often_they_are_loaded():
    small, want = None, None
    for number in range(200):  # freed tensors' addresses come back sooner or later
        if number % 50 == 0:
            small = cut(TwoPaths(), 0.4 + number / 500)
            plan, values, want = structure(TwoPaths(), small), weights(small), outputs(small)
        twin = restructure_(TwoPaths(), plan)
        set_weights_(twin, values)
        assert torch.equal(outputs(twin), want)
        assert twin.levels[0] is twin.levels[1] and twin.one is twin.two
        assert twin.again.weight is twin.table.weight
        assert len(list(twin.parameters())) == len(list(small.parameters())) == len(list(TwoPaths().parameters()))
        del twin
        gc.collect(0)
    assert list(plan['replaced']) == ['one'] and small.two is small.one
    names = [*plan['tensors']]
    assert 'levels.0.0.weight' in names and 'levels.1.0.weight' not in names  # named once


def test_a_tie_that_training_made_is_made_again():
    tied = Plain()
    tied.more = nn.Linear(6, 2)
    fresh = copy.deepcopy(tied)
    tied.more.weight = tied.fc.weight
    forward = lambda m, x: m(x) + m.more(m.b(m.bn(m.a(x)).relu()).relu().mean((2, 3)))  # noqa: E731
    found = comb(randomise_(tied).float(), IMAGES, forward=forward)
    small = slim(tied, found, random_keep(found, 0.5, 0))
    plan = structure(fresh, small)
    assert plan['shared'] == {'more.weight': 'fc.weight'}
    twin = restructure_(fresh, plan)
    assert twin.more.weight is twin.fc.weight
    set_weights_(twin, weights(small))
    with torch.no_grad():
        assert torch.equal(forward(twin.eval(), IMAGES), forward(small.eval(), IMAGES))
        assert F.mse_loss(forward(twin, IMAGES), twin(IMAGES)) > 0
