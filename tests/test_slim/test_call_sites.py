"""Sizes that no attribute holds: found in the source, replaced, carried by the structure, exported."""

from __future__ import annotations

import copy
import json
import linecache
import pickle
import sys
import types

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.deploy.onnx import HAS_NEW_EXPORTER
from mmcpd.errors import SlimError
from mmcpd.slim import call_sites, restructure_, slim, structure
from mmcpd.slim.call_sites import Rewrite, rewrite_, rewrites_of, source_range
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, check_cost, check_equal, check_structure, gap, masked, randomise_, sample

from .attention_nets import GROUPS, Block, Timm, uneven

X = sample((2, 5, 3))


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


def test_widths_that_a_class_without_source_holds_together_are_coupled():
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
    assert {g.name: g.units for g in found.groups} == {'stem': 4}  # one of each head, and of the stream
    check_equal(model, found)
    whole = comb(model, X, heads='head')
    assert {g.name: g.units for g in whole.groups} == {'stem': 3}
    check_equal(model, whole)


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
