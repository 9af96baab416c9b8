"""Sizes that no attribute holds: found in the source, replaced, carried by the structure, exported."""

from __future__ import annotations

import copy
import json
import linecache
import math
import pickle
import sys
import types

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.deploy.onnx import HAS_NEW_EXPORTER
from mmcpd.errors import SlimError
from mmcpd.modes import as_trained
from mmcpd.slim import call_sites, restructure_, slim, structure
from mmcpd.slim.call_sites import Rewrite, rewrite_, rewrites_of, source_range
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, check_cost, check_equal, check_structure, gap, masked, randomise_, sample

X = sample((2, 5, 3))


class Timm(nn.Module):
    """Attention as timm and many others write it: the width of a head is the embedding's divided by the heads."""

    def __init__(self, dim=12, heads=3):
        super().__init__()
        self.num_heads = heads
        self.scale = (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Block(nn.Module):
    def __init__(self, kind=Timm):
        super().__init__()
        self.stem, self.norm, self.attn = nn.Linear(3, 12), nn.LayerNorm(12), kind()
        self.fc = nn.Linear(12, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.fc((x + self.attn(self.norm(x))).tanh().mean(1))


GROUPS = {'stem': 12, 'attn.qkv': 4}


def uneven(found: Coupling) -> dict[str, torch.Tensor]:
    """Return a keep after which the embedding's width is not that of all heads together."""
    keep = found.keep()
    keep['stem'][:3] = False
    keep['attn.qkv'][:2] = False
    return keep


@pytest.fixture
def block():
    torch.manual_seed(0)
    model = randomise_(Block())
    return model, comb(model, X)


def test_an_attention_whose_width_comes_from_its_input(block):
    model, found = block
    assert {g.name: g.units for g in found.groups} == GROUPS
    small = check_equal(model, found)
    check_cost(model, found)
    twin = check_structure(model, found, small, Block)
    assert rewrites_of(twin.attn) == rewrites_of(small.attn)


def test_only_what_no_attribute_makes_right_is_rewritten(block):
    model, found = block
    keep = found.keep()
    keep['stem'][:3] = False
    keep['attn.qkv'][0] = False  # 9 // 3 is 3 all the same
    small = slim(model, found, keep)
    assert rewrites_of(small.attn) == []
    keep['attn.qkv'][1] = False
    small = slim(model, found, keep)
    assert {(r.index, r.count, r.number) for r in rewrites_of(small.attn)} == {(4, 5, -1), (2, 3, -1)}
    assert type(small.attn).__name__ == 'Timm' and isinstance(small.attn, Timm)
    assert type(model.attn) is Timm and not rewrites_of(model.attn)
    assert gap(masked(model, found, keep)(X), small(X)) < 1e-12


def test_whole_heads_of_such_an_attention():
    model = randomise_(Block())
    found = comb(model, X, heads='head')
    assert {g.name: g.units for g in found.groups} == {'stem': 12, 'attn.qkv': 3}
    small = check_equal(model, found)
    check_structure(model, found, small, Block)
    keep = found.keep()
    keep['attn.qkv'][1] = False
    assert slim(model, found, keep).attn.num_heads == 2


def test_other_batches_and_lengths_still_work(block):
    model, found = block
    keep = uneven(found)
    small, big = slim(model, found, keep), masked(model, found, keep)
    for shape in ((1, 5, 3), (4, 9, 3)):
        assert gap(big(sample(shape)), small(sample(shape))) < 1e-9


def test_the_rewrites_are_in_the_structure_as_numbers(block):
    model, found = block
    small = slim(model, found, uneven(found))
    plan = json.loads(json.dumps(structure(model, small)))
    assert set(plan['rewritten']) == {'attn'}
    for method, call, index, count, value in plan['rewritten']['attn']:
        assert method == 'forward' and 'reshape(B, N' in call
        assert all(type(v) is int for v in (index, count, value))


def test_a_structure_cannot_bring_code(block):
    model, found = block
    plan = json.loads(json.dumps(structure(model, slim(model, found, uneven(found)))))
    for value in ('__import__("os")', [1], None, 'x'):
        changed = json.loads(json.dumps(plan))
        changed['rewritten']['attn'][0][4] = value
        with pytest.raises((SlimError, ValueError, TypeError)):
            restructure_(Block(), changed)
    changed = json.loads(json.dumps(plan))
    changed['rewritten']['attn'][0][1] = '__import__("os").system("true")'
    with pytest.raises(SlimError, match='has no call'):
        restructure_(Block(), changed)
    changed['rewritten']['attn'][0][0] = '__class__'
    with pytest.raises(SlimError, match='has no source of its own'):
        restructure_(Block(), changed)


def test_another_release_of_the_class_is_an_error(block):
    class Renamed(Timm):
        def forward(self, x):
            B, N, width = x.shape
            q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
            return self.proj(((q * self.scale) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(B, N, width))

    model, found = block
    plan = structure(model, slim(model, found, uneven(found)))
    assert comb(randomise_(Block(Renamed)), X).groups
    with pytest.raises(SlimError, match=r'Renamed\.forward has no call .*another release of this class'):
        restructure_(Block(Renamed), plan)


def test_one_place_with_two_values_is_an_error():
    call = 'self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)'
    with pytest.raises(SlimError, match=r'Timm\.forward runs .* with different sizes'):
        rewrite_(Timm(), [Rewrite('forward', call, 4, 5, 2), Rewrite('forward', call, 4, 5, 3)])
    module = Timm()
    rewrite_(module, [Rewrite('forward', call, 4, 5, 2)] * 2)
    assert rewrites_of(module) == [Rewrite('forward', call, 4, 5, 2)]


def test_a_class_without_source_is_frozen_with_a_reason():
    space: dict = {'nn': nn, 'torch': torch}
    exec(
        'def forward(self, x):\n'
        '    B, N, C = x.shape\n'
        '    q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)\n'
        '    return self.proj(((q * self.scale) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(B, N, C))\n',
        space,
    )
    sourceless = type('Sourceless', (Timm,), {'forward': space['forward']})
    model = randomise_(Block(sourceless))
    found = comb(model, X)
    assert any('a trial failed: no attribute makes' in f.reason for f in found.frozen)
    assert 'attn.qkv' not in {g.name for g in found.groups}


class Number(nn.Module):
    """A plain number in a method."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 8), nn.Linear(8, 12)

    def forward(self, x):
        width = int(math.sqrt(64.0))
        return self.outer(self.inner(x).tanh().reshape(-1, width).reshape(x.shape[0], -1, width))


def test_a_number_in_a_method_is_replaced_where_it_stands():
    model = randomise_(Block(Number))
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'stem': 12, 'attn.inner': 8}
    small = check_equal(model, found)
    check_structure(model, found, small, lambda: Block(Number))


class Helper(Timm):
    """The size is asked for in another method, by keyword and as a tuple."""

    def split_heads(self, x):
        return torch.reshape(x, (x.shape[0], x.shape[1], 3, self.num_heads, x.shape[2] // self.num_heads // 3))

    @staticmethod
    def merge(x, shape):
        B, N, C = shape
        return x.reshape((B, N, C))

    def forward(self, x):
        q, k, v = self.split_heads(self.qkv(x)).permute(2, 0, 3, 1, 4)
        return self.proj(self.merge((((q * self.scale) @ k.mT).softmax(-1) @ v).transpose(1, 2), x.shape))


class Decorated(Timm):
    """A decorator around the forward, which uses a global of its module and a name from an enclosing function."""

    @torch.no_grad()
    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).view(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.softmax((q * self.scale) @ k.mT, -1).matmul(v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize('kind', [Helper, Decorated])
def test_other_ways_to_write_it(kind):
    model = randomise_(Block(kind))
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == GROUPS
    small = check_equal(model, found)
    check_structure(model, found, small, lambda: Block(kind))
    assert rewrites_of(slim(model, found, uneven(found)).attn)


class Apart(nn.Module):
    """Two widths under one attribute."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.width = nn.Linear(3, 6), nn.Linear(3, 6), 6
        self.fc, self.other = nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x):
        return self.fc(self.a(x).view(-1, 5, self.width)) + self.other(self.b(x).view(-1, 5, self.width).tanh())


class Starred(Apart):
    """The rest of the shape is somebody else's."""

    def forward(self, x):
        left = self.a(x).mT.reshape(-1, self.width, *x.shape[1:2])
        right = self.b(x).reshape(*x.shape[:-1], self.width)
        return self.fc(left.mT) + self.other(right)


class Whole(Apart):
    """A shape that was read elsewhere, of a tensor with other channels."""

    def forward(self, x):
        left = self.a(x)
        shape = left.shape
        return self.fc(left) + self.other(self.b(x).flatten(1).reshape(shape))


@pytest.mark.parametrize('kind', [Apart, Starred, Whole])
def test_what_one_attribute_cannot_hold_is_rewritten(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 6}
    keep = found.keep()
    keep['a'][1:4], keep['b'][2] = False, False
    small = slim(model, found, keep)
    assert len(rewrites_of(small)) == 1
    assert gap(masked(model, found, keep)(X), small(X)) < 1e-12
    check_structure(model, found, check_equal(model, found), kind)


def test_decorators_stay():
    model = randomise_(Block(Decorated))
    found = comb(model, X)
    small = slim(model, found, uneven(found))
    assert rewrites_of(small.attn)
    assert not small.attn(sample((2, 5, 9))).requires_grad
    assert small(X).requires_grad


def test_a_rewritten_module_can_be_copied_and_saved(block, tmp_path):
    model, found = block
    small = slim(model, found, uneven(found))
    twin = copy.deepcopy(small)
    assert gap(small(X), twin(X)) == 0
    assert rewrites_of(twin.attn) == rewrites_of(small.attn)
    torch.save(small.state_dict(), tmp_path / 'weights.pth')
    twin.load_state_dict(torch.load(tmp_path / 'weights.pth', weights_only=True))
    assert rewrites_of(pickle.loads(pickle.dumps(small.attn))) == rewrites_of(small.attn)


def test_two_modules_of_one_class_are_rewritten_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two, self.fc = nn.Linear(3, 12), Timm(), Timm(), nn.Linear(12, 2)

        def forward(self, x):
            x = self.stem(x)
            return self.fc(self.two(x + self.one(x)).tanh().mean(1))

    model = randomise_(Two())
    found = comb(model, X)
    keep = found.keep()
    keep['one.qkv'][:1] = False
    keep['two.qkv'][:2] = False
    small = slim(model, found, keep)
    assert {r.number for r in rewrites_of(small.one)} == {r.number for r in rewrites_of(small.two)} == {-1}
    assert gap(masked(model, found, keep)(X), small(X)) < 1e-12


@pytest.mark.filterwarnings('ignore::DeprecationWarning')  # torch's own, about the exporter without dynamo
@pytest.mark.parametrize('dynamo', sorted({False, HAS_NEW_EXPORTER}))
def test_a_rewritten_model_exports(block, tmp_path, dynamo):
    model, found = block
    small = slim(model, found, uneven(found)).float().eval()
    assert rewrites_of(small.attn)
    path = tmp_path / 'small.onnx'
    example = torch.rand(2, 5, 3)
    options = {'dynamic_shapes': ({0: torch.export.Dim('batch')},)} if dynamo else {'dynamic_axes': {'x': {0: 'batch'}}}
    torch.onnx.export(small, (example,), str(path), input_names=['x'], dynamo=dynamo, **options)
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for batch in (2, 4):
        x = torch.rand(batch, 5, 3)
        (out,) = session.run(None, {'x': x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(out, small(x).numpy(), rtol=1e-4, atol=1e-5)


def test_a_slim_model_can_be_slimmed_again(block):
    model, found = block
    first = slim(model, found, uneven(found))
    assert rewrites_of(first.attn)
    again = comb(first, X)
    assert isinstance(type(first.attn).forward, types.FunctionType)
    assert {g.name: g.units for g in again.groups} == {'stem': 9, 'attn.qkv': 2}
    small = slim(first, again, random_keep(again, 0.6, 0))
    assert gap(masked(first, again, random_keep(again, 0.6, 0))(X), small(X)) < 1e-9
    assert len(rewrites_of(small.attn)) == len(rewrites_of(first.attn))
    plan = json.loads(json.dumps(structure(model, small)))
    twin = restructure_(Block().double().eval(), plan)
    twin.load_state_dict(small.state_dict())
    assert gap(small(X), twin(X)) == 0


class Unhooked(nn.Module):
    """A head that is called by its forward, as mmseg's are, so that no hook tells that it runs."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 6), Head()

    def forward(self, x):
        return self.head.forward(self.stem(x))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.fc = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        batch, tokens, channels = x.shape
        x = self.inner(x - x.mean(-1, keepdim=True)).view(batch, tokens, channels)
        return self.fc(x.sigmoid())


def test_a_module_that_is_called_without_its_hooks():
    model = randomise_(Unhooked())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'stem': 6, 'head.inner': 6}
    keep = found.keep()
    keep['stem'][1:4], keep['head.inner'][2] = False, False
    assert [len(rewrites_of(m)) for m in slim(model, found, keep).modules()] == [0, 0, 1, 0, 0]
    check_structure(model, found, check_equal(model, found), Unhooked)


class WithASide(nn.Module):
    """A head that only training runs, behind a size that stands in the source."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(3, 12, 1), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x):
        x = self.one(x).reshape(x.shape[0], 12, -1).mean(2)
        return self.two(x) + self.side(x) if self.training else self.two(x)


def test_a_size_is_found_while_training_mode_is_observed():
    def trained(model, *inputs):
        with as_trained(model):
            return model(*inputs)

    model, x = WithASide(), torch.rand(2, 3, 4, 4)
    found = comb(model, x, also=[trained])
    assert [(group.name, group.units) for group in found.groups] == [('one', 12)]
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-6


# -- where an instruction is -------------------------------------------------------------------------------------------
class Spy:
    """Note the source of what its caller runs."""

    def __init__(self):
        self.texts = []

    def see(self, *_):
        frame = sys._getframe(1)
        line, _, start, stop = source_range(frame.f_code, frame.f_lasti)
        self.texts.append(linecache.getline(__file__, line)[start:stop])
        return self

    __call__ = __mul__ = __imul__ = __getitem__ = see


def test_the_node_of_an_instruction_is_found():
    spy = Spy()
    _ = spy(1), spy(2), spy * 3, spy[4], spy.see(5)[6]
    spy *= 7
    nested = [spy(number) for number in [8]]
    assert nested and spy.texts == [
        'spy(1)', 'spy(2)', 'spy * 3', 'spy[4]', 'spy.see(5)', 'spy.see(5)[6]', 'spy *= 7', 'spy(number)',
    ]  # fmt: skip


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = x - x.mean(1, keepdim=True)
        return self.fc(y.tanh())


class Inherited(Centred):
    def forward(self, x):
        y = x - x.mean(1, keepdim=True)
        return Centred.forward(self, y * 2)


def test_methods_of_one_name_are_two_places(monkeypatch):
    def places():
        net = Net(lambda m, x: m.last(m.stem(x)), stem=nn.Linear(3, 8), last=Inherited())
        return {statistic.place for statistic in comb(randomise_(net), sample((2, 3))).fixes.statistics}

    assert len(places()) == 2
    monkeypatch.setattr(call_sites, '_qualified_name', lambda code: code.co_name)
    assert len(places()) == 1
