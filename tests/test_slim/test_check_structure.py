"""A structure says only what slimming says; anything else is one line, and the model stays as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from benchmarks import chaos_files
from mmcpd.comb import comb
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.slim_model import build_fresh
from mmcpd.errors import SlimError
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.check_structure import check_structure, may_become
from mmcpd.slim.weights import all_tensors
from tests.helpers import call, gap, randomise_, sample

CFG = chaos_files.config(8)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp('slim') / 'slim.pth'
    chaos_files.write(path, 8)
    return read_slim(path)['structure']


@pytest.fixture
def plan(written):
    return copy.deepcopy(written)


def state(model):
    """Return everything that a structure could change."""
    tensors = {name: None if is_lazy(t) else t.clone() for name, t in all_tensors(model).items()}
    modules = {path: (type(m), {n: v for n, v in vars(m).items() if type(v) in (int, tuple, bool)})
               for path, m in model.named_modules()}  # fmt: skip
    return tensors, modules


def put(*path_and_value):
    """Return an edit that puts a value at a place in the plan."""

    def edit(plan):
        *path, key, value = path_and_value
        for part in path:
            plan = plan[part]
        plan[key] = value

    return edit


def drop(*path):
    def edit(plan):
        *above, key = path
        for part in above:
            plan = plan[part]
        del plan[key]

    return edit


TABLE = {'parameter': False, 'dtype': 'torch.float32'}
REWRITE = ['forward', 'self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)', 4, 5, -1]
FAULTS = {
    'an unknown key': (put('extra', {}), 'a structure has the entries'),
    'a key too few': (drop('shared'), 'a structure has the entries'),
    'a list of tensors': (put('tensors', []), 'tensors of the structure is'),
    # tensors
    'no tensor': (put('tensors', 'stem.other', [1]), r'stem\.other is missing'),
    'larger': (put('tensors', 'stem.weight', [9, 3, 3, 3]), r'stem\.weight is \(8, 3, 3, 3\) .* \(9, 3, 3, 3\)'),
    'empty': (put('tensors', 'stem.weight', [0, 3, 3, 3]), r'stem\.weight is'),
    'other dims': (put('tensors', 'stem.weight', [4, 27]), r'stem\.weight is'),
    'negative': (put('tensors', 'stem.bias', [-4]), r'stem\.bias is \[-4\] .* no shape'),
    'a float': (put('tensors', 'stem.bias', [4.0]), r'stem\.bias is \[4.0\] .* no shape'),
    'a bool': (put('tensors', 'stem.bias', [True]), r'stem\.bias is \[True\] .* no shape'),
    'lazy without shape': (drop('tensors', 'lazy.weight'), r'lazy\.weight has no shape'),
    'lazy and huge': (put('tensors', 'lazy.weight', [10**6] * 4), r'lazy\.weight is too large'),
    'long shape': (put('tensors', 'lazy.weight', [1] * 10**5), r'lazy\.weight .* no shape'),
    # added
    'added over a parameter': (put('added', 'fc.weight', TABLE), r'fc\.weight of the structure does not fit'),
    'added over a method': (put('added', 'stem.forward', TABLE), r'stem\.forward of the structure does not fit'),
    'added over an attribute': (put('added', 'own.num_heads', TABLE), r'own\.num_heads of the structure'),
    'added dunder': (put('added', '__class__', TABLE), '__class__ of the structure'),
    'added nowhere': (put('added', 'nowhere.table', TABLE), "no module 'nowhere'"),
    'added dtype': (put('added', 'table', 'dtype', 'torch.load'), 'table is added with an unknown dtype'),
    'added quantized': (put('added', 'table', 'dtype', 'torch.quint8'), 'table is added with an unknown dtype'),
    'added kind': (put('added', 'table', 'parameter', 1), 'table is added as'),
    'added without shape': (drop('tensors', 'table'), 'table of the structure does not fit'),
    'added and huge': (put('tensors', 'table', [2**40]), 'table is too large'),
    # shared
    'shared with nothing': (put('shared', 'more.weight', 'none'), r'more\.weight and none are one tensor'),
    'shared with a list': (put('shared', 'more.weight', []), r'more\.weight and \[\] are one tensor'),
    'shared with another shape': (put('shared', 'more.weight', 'stem.weight'), 'cannot be in this model'),
    'a parameter that is a buffer': (put('shared', 'more.bias', 'bn.num_batches_tracked'), 'cannot be'),
    'shared in a circle': (put('shared', 'fc.weight', 'more.weight'), 'are one tensor'),
    # attributes
    'no attribute': (put('attributes', 'stem', 'depth', 1), 'stem has no attribute depth'),
    'of a class': (put('attributes', 'stem', '_version', 1), 'stem has no attribute _version'),
    'one more': (put('attributes', 'stem', 'out_channels', 9), r'stem\.out_channels is 8 .* 9'),
    'zero': (put('attributes', 'stem', 'out_channels', 0), r'stem\.out_channels is 8 .* 0'),
    'as a float': (put('attributes', 'stem', 'out_channels', 4.0), r'stem\.out_channels'),
    'not a number': (put('attributes', 'stem', 'out_channels', float('nan')), r'stem\.out_channels'),
    'as text': (put('attributes', 'stem', 'out_channels', '4'), r'stem\.out_channels'),
    'training': (put('attributes', 'stem', 'training', 1), r'stem\.training'),
    'an address': (put('attributes', '', {'init_cfg': {'type': 'Pretrained', 'checkpoint': 'evil.pth'}}), 'init_cfg'),
    'hooks': (put('attributes', 'stem', '_forward_hooks', {}), r'stem\._forward_hooks'),
    'a float of the model': (put('attributes', 'bn', 'eps', 1), r'bn\.eps'),
    'a longer tuple': (put('attributes', 'stem', 'kernel_size', [3, 3, 3]), r'stem\.kernel_size'),
    'larger in a tuple': (put('attributes', 'stem', 'kernel_size', [3, 4]), r'stem\.kernel_size'),
    'a text of the model': (put('attributes', 'stem', 'padding_mode', 'circular'), r'stem\.padding_mode'),
    'of a lazy module': (put('attributes', 'lazy', 'in_channels', 10**9), r'lazy\.in_channels is 0 .* 1000000000'),
    'a list of attributes': (put('attributes', 'stem', []), 'the attributes of stem'),
    # replaced
    'another kind': (put('replaced', 'attention', 'kind', 'Linear'), "which 'Linear' of the structure"),
    'kind as list': (put('replaced', 'attention', 'kind', ['a']), 'attention is a MultiheadAttention'),
    'another source': (put('replaced', 'fc', {'kind': 'MultiheadAttention', 'arguments': {}}), 'fc is a Linear'),
    'more heads': (put('replaced', 'attention', 'arguments', 'num_heads', 3), r'attention\.num_heads is 2 .* 3'),
    'no heads': (put('replaced', 'attention', 'arguments', 'num_heads', 0), r'attention\.num_heads'),
    'another scale': (put('replaced', 'attention', 'arguments', 'scale', 1e300), r'attention\.scale'),
    'an argument more': (put('replaced', 'attention', 'arguments', 'source', 1), 'attention is replaced with'),
    'below a replaced one': (put('attributes', 'attention.out_proj', {'in_features': 1}), 'attention is replaced'),
    # rewritten
    'many sizes': (put('rewritten', 'own', 0, 3, 3_000_000), 'own is rewritten by'),
    'outside of the call': (put('rewritten', 'own', [[*REWRITE[:2], 5000, 5, -1]]), 'own is rewritten by'),
    'an operand of many': (put('rewritten', 'own', [[*REWRITE[:2], -3, 5, 2]]), 'own is rewritten by'),
    'another side': (put('rewritten', 'own', [[*REWRITE[:2], -4, 0, 2]]), 'own is rewritten by'),
    'a large number': (put('rewritten', 'own', [[*REWRITE[:4], 10**9]]), 'own is rewritten by'),
    'minus two': (put('rewritten', 'own', [[*REWRITE[:4], -2]]), 'own is rewritten by'),
    'code as number': (put('rewritten', 'own', [[*REWRITE[:4], 'print()']]), 'own is rewritten by'),
    'another call': (put('rewritten', 'own', [['forward', 'eval("1")', 0, 1, 1]]), r'forward has no call eval'),
    'no method': (put('rewritten', 'own', [['for ward', *REWRITE[1:]]]), 'own is rewritten by'),
    'four entries': (put('rewritten', 'own', [REWRITE[:4]]), 'own is rewritten by'),
    'often': (put('rewritten', 'own', [REWRITE] * 5000), 'what is rewritten in own'),
    'long text': (put('rewritten', 'own', [['forward', 'x' * 10**6, 0, 1, 1]]), 'own is rewritten by'),
    'lines': (put('rewritten', 'own', [['forward', 'a(\n)', 0, 1, 1]]), 'own is rewritten by'),
    'rewritten nowhere': (put('rewritten', 'a\nb', []), "no module 'a"),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_a_structure_that_says_more_is_refused_before_anything_is_changed(plan, fault):
    edit, message = FAULTS[fault]
    edit(plan)
    model = build_fresh(CFG)
    before = state(model)
    with pytest.raises(SlimError, match=message) as error:
        restructure_(model, plan)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    tensors, modules = state(model)
    assert modules == before[1] and tensors.keys() == before[0].keys()
    assert all(
        (a is None and b is None) or torch.equal(a, b)
        for a, b in zip(tensors.values(), before[0].values(), strict=True)
    )


def test_the_structure_itself_passes_and_the_check_changes_nothing(plan):
    model = build_fresh(CFG)
    before = state(model)
    check_structure(model, plan)
    assert state(model)[1] == before[1]
    restructure_(model, plan)
    assert state(model)[1] != before[1]
    assert all(plan.values()), 'each kind of entry is there'


def test_two_names_of_one_tensor_have_one_shape():
    model = nn.ModuleDict({'a': nn.Linear(4, 4), 'b': nn.Linear(4, 4)})
    model['b'].weight = model['a'].weight
    plan = structure(copy.deepcopy(model), model)
    plan['tensors'] = {'a.weight': [2, 4], 'b.weight': [2, 4]}
    check_structure(model, plan)
    with pytest.raises(SlimError, match=r'b\.weight is \(4, 4\) in this model, and \(3, 4\)'):
        check_structure(model, plan | {'tensors': {'a.weight': [2, 4], 'b.weight': [3, 4]}})


class Counting(nn.Module):
    """It counts its calls, and reads a width under a private name."""

    def __init__(self):
        super().__init__()
        self._width, self.calls, self.left = 6, 0, 100
        self.a, self.fc = nn.Conv2d(3, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        self.calls, self.left = self.calls + 1, self.left - 1
        return self.fc(self.a(x).tanh().mean((2, 3)).reshape(-1, self._width))


def test_slimming_writes_no_counter_and_keeps_private_widths():
    model = randomise_(Counting())
    model(sample((2, 3, 6, 6)))
    found = comb(model, sample((2, 3, 6, 6)))
    keep = found.keep()
    keep['a'][:3] = False
    small = slim(model, found, keep)
    assert small.calls > 0
    plan = json.loads(json.dumps(structure(Counting(), small)))
    assert plan['attributes']['']['_width'] == 3 and 'calls' not in plan['attributes']['']
    twin = restructure_(Counting().double().eval(), plan)
    twin.load_state_dict(small.state_dict())
    assert gap(call(found, twin), call(found, small)) == 0


@pytest.mark.parametrize(
    ('dense', 'value', 'made', 'may'),
    [
        (8, 8, 0, True), (8, 1, 0, True), (8, 9, 0, False), (8, True, 0, False), (True, 1, 0, False),
        (0, 5, 6, True), (0, 7, 6, False), (0, 0, 0, True), (-1, 1, 6, False), ((8, 0), [4, 0], 0, True),
        ((8, 0), [4, 1], 0, False), ((8, 8), (4, 4), 0, False), ([8], [3], 0, True), (None, 1, 6, False),
        ((8, 'a'), [4, 'a'], 0, False), (torch.Size([8]), [4], 0, False),
    ],
)  # fmt: skip
def test_an_attribute_becomes_smaller_and_keeps_its_type(dense, value, made, may):
    assert may_become('width', dense, value, made) is may
    assert not may_become('__width', dense, value, made)
