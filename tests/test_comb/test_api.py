"""The public entry: determinism, JSON, cleaning up, and every complaint."""

from __future__ import annotations

import copy
import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from mmcpd.comb import comb
from mmcpd.comb.trace import Cursor, Policy, Run
from mmcpd.comb.traced_int import TracedInt
from mmcpd.comb.unused import Ran
from mmcpd.errors import CombError
from mmcpd.slim import mask_
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, check_equal, gap, randomise_, sample


class Block(nn.Module):
    """Attention and a convolution whose modules have plain integers, lists and a mode to put back."""

    def __init__(self):
        super().__init__()
        self.num_heads, self.sizes, self.pair, self.flag = 2, [6, 3], (1, 1), True
        self.conv, self.norm = nn.Conv2d(3, 9, 1), nn.BatchNorm2d(9)
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, 4)
        self.explode = False

    def forward(self, x):
        x, _ = self.norm(self.conv(x)).split(self.sizes, 1)
        x = x.flatten(2).transpose(1, 2)
        q, k, v = (f(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.explode:
            raise KeyError('in the middle')
        self.seen = x.shape[-1] // self.num_heads  # a module may store what it computed
        self.shape, self.nested = x.shape, {'of': [(x.shape[-1], self.num_heads)]}
        out = self.drop((q @ k.mT).softmax(-1)) @ v
        return self.fc(out.transpose(1, 2).flatten(2).mean(1))


IMAGE = sample((2, 3, 4, 4))


@pytest.fixture
def block():
    torch.manual_seed(0)
    return randomise_(Block())


def state(model: nn.Module) -> dict:
    """Return everything about a model that combing could leave behind."""
    return {
        'attributes': {
            path: {n: (type(v), repr(v)) for n, v in vars(m).items() if not n.startswith('_')}
            for path, m in model.named_modules()
        },
        'hooks': [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
            for m in model.modules()
        ],
        'training': [m.training for m in model.modules()],
        'tensors': {n: (sorted(vars(t)), t.clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]},
        'grad': [p.requires_grad for p in model.parameters()],
        'fastpath': torch.backends.mha.get_fastpath_enabled(),
        'modes': (len(_get_current_dispatch_mode_stack()), len(_get_current_function_mode_stack())),
    }


def assert_same(before: dict, after: dict) -> None:
    for name, (attributes, values) in before.pop('tensors').items():
        assert after['tensors'][name][0] == attributes == []
        assert torch.equal(after['tensors'][name][1], values)
    after.pop('tensors')
    assert before == after


def test_combing_leaves_the_model_as_it_was(block):
    block.train()
    block.norm.eval()
    with torch.no_grad():
        block(IMAGE)  # sets `seen`
    before = state(block)
    found = comb(block, IMAGE)
    assert found.groups
    after = state(block)
    assert type(block.num_heads) is int and type(block.sizes[0]) is int and type(block.seen) is int
    assert type(block.shape) is torch.Size and type(block.nested['of'][0][0]) is int
    assert_same(before, after)


def test_combing_cleans_up_after_an_exception_inside_the_forward(block):
    block.train()
    before = state(block)
    before_error = copy.deepcopy(block)
    block.explode = before_error.explode = True
    before['attributes']['']['explode'] = (bool, 'True')
    with pytest.raises(KeyError, match='in the middle'):
        comb(block, IMAGE)
    assert type(block.num_heads) is int
    assert type(block.sizes) is list and type(block.sizes[0]) is int
    assert type(block.conv.kernel_size) is tuple and type(block.conv.kernel_size[0]) is int
    assert type(block.conv.in_channels) is int
    assert_same(before, state(block))
    block.explode = False
    assert comb(block, IMAGE).groups


def test_what_a_forward_counts_is_put_back(block):
    block.calls = 0
    plain = type(block).forward

    class Counting(Block):
        def forward(self, x):
            self.calls = self.calls + 1
            return plain(self, x)

    block.__class__ = Counting
    comb(block, IMAGE)
    assert type(block.calls) is int and block.calls == 0
    block(IMAGE)
    assert block.calls == 1


def test_no_size_survives_anywhere(block):
    found = comb(block, IMAGE)

    def walk(value):
        assert not isinstance(value, TracedInt)
        inner = vars(value).values() if dataclasses.is_dataclass(value) else value
        for part in inner if isinstance(value, (list, tuple)) or dataclasses.is_dataclass(value) else ():
            walk(part)

    for rule in found.fixes.sizes:
        walk(rule.expression)
    for module in block.modules():
        for value in vars(module).values():
            walk(value)
    assert not hasattr(block, 'nested')  # which the forward makes


def test_two_runs_agree_to_the_byte(block):
    first = comb(block, IMAGE).to_json()
    assert comb(block, IMAGE).to_json() == first
    assert comb(copy.deepcopy(block), IMAGE).to_json() == first
    other = randomise_(Block(), seed=5)  # the weights do not matter
    assert comb(other, IMAGE).to_json() == first


def test_the_random_state_is_left_alone(block):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    comb(block, IMAGE)
    assert torch.equal(torch.get_rng_state(), before)


def test_json_holds_all_but_the_example_and_the_caches(block, tmp_path):
    found = comb(block, IMAGE)
    text = found.to_json(tmp_path / 'coupling.json')
    assert (tmp_path / 'coupling.json').read_text() == text
    data = json.loads(text)
    assert data.keys() == {field.name for field in dataclasses.fields(found)} - {'example', 'caches'}
    for group, read in zip(found.groups, data['groups'], strict=True):
        assert (read['name'], read['units']) == (group.name, group.units)
        for part in ('members', 'cut'):
            for member, row in zip(getattr(group, part), read[part], strict=True):
                assert (row['tensor'], row['dim'], row['role']) == (member.tensor, member.dim, member.role)
                assert row['index'] == member.index.tolist()
    assert [row['reason'] for row in data['frozen']] == [frozen.reason for frozen in found.frozen]
    kinds = {rule['expression']['type'] for rule in data['fixes']['sizes'] if isinstance(rule['expression'], dict)}
    assert kinds and kinds <= {'Attr', 'Live', 'Input', 'Op'}


class Odd(nn.Module):
    """Something with an operation that no rule knows, inside a module of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.inner, self.b, self.fc = nn.Linear(3, 6), nn.Module(), nn.Linear(6, 5), nn.Linear(5, 2)
        self.histogram = Histogram()

    def forward(self, x):
        return self.fc(self.b(self.a(x)).tanh() + self.histogram(self.a(x)).mean())


class Histogram(nn.Module):
    def forward(self, x):
        return torch.histc(x, 4)


def test_an_unknown_operation_freezes_and_is_reported():
    model = randomise_(Odd())
    found = comb(model, sample((2, 4, 3)))
    ((op, where),) = found.unsupported
    assert where == 'histogram'
    assert {g.name: g.units for g in found.groups} == {'b': 5}
    frozen = {f.reason for f in found.frozen if f.tensor == 'a.weight' and f.dim == 0}
    assert frozen == {f'no rule for {op} in histogram'}
    assert f'no rule for {op} in histogram (x1)' in str(found)


def test_strict_names_operation_and_module():
    with pytest.raises(CombError, match=r'no rule for \w+ in histogram \(x1\).*strict=False'):
        comb(randomise_(Odd()), sample((2, 4, 3)), strict=True)


def test_strict_passes_where_every_operation_has_a_rule(block):
    assert comb(block, IMAGE, strict=True).groups


def test_ignore(block):
    everything = [g.name for g in comb(block, IMAGE).groups]
    assert everything == ['conv', 'q', 'v']
    found = comb(block, IMAGE, ignore=('q*',))
    assert [g.name for g in found.groups] == [n for n in everything if not n.startswith('q')]
    assert 'ignored by the user' in {f.reason for f in found.frozen if f.tensor == 'q.weight' and f.dim == 0}
    assert found.cost(found.keep()) == comb(block, IMAGE).cost(found.keep() | {'q': torch.ones(4, dtype=torch.bool)})


def test_ignore_that_matches_nothing_names_what_is_near():
    model = Net(
        lambda m, x: m.fc(m.encoder_out(m.encoder_in(x).relu()).relu()),
        encoder_in=nn.Linear(3, 6),
        encoder_out=nn.Linear(6, 5),
        fc=nn.Linear(5, 2),
    )
    with pytest.raises(ValueError, match=r"'encoder_inn' fits no group: near are encoder_in"):
        comb(model, torch.rand(2, 3), ignore=('encoder_inn',))


def test_wrong_heads():
    with pytest.raises(ValueError, match=r"heads must be one of .*'dim', 'head'.*'heads'"):
        comb(nn.Linear(2, 2), torch.rand(1, 2), heads='heads')


def test_a_keep_is_checked(block):
    found = comb(block, IMAGE)
    name, units = found.groups[0].name, found.groups[0].units
    cases = [
        ({**found.keep(), 'convv': torch.ones(2, dtype=torch.bool)}, r"no group 'convv': did you mean conv"),
        (
            {n: k for n, k in found.keep().items() if n != name},
            f"no entry for group '{name}'; start from coupling.keep",
        ),
        ({**found.keep(), name: torch.ones(units)}, f'must be a BoolTensor of {units}, not torch.float32'),
        ({**found.keep(), name: torch.ones(units + 1, dtype=torch.bool)}, f'BoolTensor of {units}'),
        ({**found.keep(), name: torch.zeros(units, dtype=torch.bool)}, 'removes every unit; at least one must be kept'),
    ]
    before = copy.deepcopy(block.state_dict())
    for keep, message in cases:
        with pytest.raises(ValueError, match=message):
            mask_(block, found, keep)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), block.state_dict().values(), strict=True))


def test_an_output_without_a_tensor():
    model = Net(lambda m, x: float(m.fc(x).sum()), fc=nn.Linear(3, 2))
    with pytest.raises(CombError, match='returned float without a tensor; give `forward=`'):
        comb(model, torch.rand(2, 3))
    assert not vars(model.fc.weight)


def test_forward_chooses_what_is_run_and_what_is_an_output():
    model = Net(lambda m, x: m.fc(m.a(x).relu()), a=nn.Linear(3, 6), fc=nn.Linear(6, 4))
    assert {g.name for g in comb(model, torch.rand(2, 3)).groups} == {'a'}
    summed = comb(model, torch.rand(2, 3), forward=lambda m, x: m(x).sum(-1))
    assert {g.name for g in summed.groups} == {'a', 'fc'}
    inner = comb(model, (torch.rand(2, 3), 2.0), forward=lambda m, x, factor: {'features': [m.a(x) * factor]})
    assert not inner.groups
    reasons = {(f.tensor, f.dim): f.reason for f in inner.frozen}
    assert reasons['a.weight', 0] == 'model output'
    assert reasons['fc.weight', 0] == 'no layer that ran produces it: a position, a table or an unused part'


def test_an_output_that_is_not_finite():
    model = Net(lambda m, x: m.fc(m.norm(m.a(x))) / 0, a=nn.Linear(3, 6), norm=nn.LayerNorm(6), fc=nn.Linear(6, 4))
    with pytest.raises(CombError, match='not finite'):
        comb(model, torch.rand(2, 3))


def test_nothing_to_prune():
    model = nn.Linear(3, 2)
    found = comb(model, torch.rand(1, 3))
    assert found.groups == () and found.keep() == {} and found.units == 0
    cost = found.cost(found.keep())
    assert (cost.macs, cost.params, cost.memory) == (6, 8, 8)
    assert 'model output' in str(found)


def test_the_table_says_what_is_found(block):
    text = str(comb(block, IMAGE))
    assert 'groups' in text and 'MACs' in text and 'frozen because' in text
    for group in comb(block, IMAGE).groups:
        assert group.name in text


def test_python_control_flow_just_works():
    def run(m, x):
        for layer in m.layers:
            if x.shape[-1] == 6 and float(x.detach().abs().sum()) > 0:
                x = layer(x).relu()
        return m.fc(x)

    model = Net(run, layers=nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]), fc=nn.Linear(6, 2))
    found = comb(model, torch.rand(2, 6))
    # The forward compares the width with a number, so that nothing but 6 will do for the first layer's input.
    assert {f.reason for f in found.frozen if f.tensor == 'layers.0.weight' and f.dim == 0}


def test_a_shared_parameter_has_one_set_of_atoms():
    def build():
        model = Net(
            lambda m, x: m.out(m.b(m.a(x).tanh()).tanh()), a=nn.Linear(6, 6), b=nn.Linear(6, 6), out=nn.Linear(6, 2)
        )
        model.b.weight = model.a.weight
        return model

    found = comb(randomise_(build()), sample((2, 6)))
    assert {m.tensor for g in found.groups for m in g.members} == set()
    assert any('input channels' in f.reason for f in found.frozen if f.tensor == 'a.weight')


def test_a_forward_under_another_function_mode():
    class Outer(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Outer.calls += 1
            return func(*args, **(kwargs or {}))

    model = randomise_(Block())
    with Outer():
        found = comb(model, IMAGE)
    assert Outer.calls
    assert found.to_json() == comb(model, IMAGE).to_json()


def test_marginal_cost_is_the_difference_that_one_unit_makes(block):
    found = comb(block, IMAGE)
    keep = random_keep(found, 0.7, 0)
    for name, saved in found.marginal(keep).items():
        less = {n: k.clone() for n, k in keep.items()}
        less[name][int(less[name].nonzero()[0])] = False
        if bool(less[name].any()):
            now, then = found.cost(keep), found.cost(less)
            assert (saved.macs, saved.params, saved.memory) == (
                now.macs - then.macs,
                now.params - then.params,
                now.memory - then.memory,
            )


def test_masking_a_copy_masks_only_the_copy(block):
    found = comb(block, IMAGE)
    twin = copy.deepcopy(block)
    keep = random_keep(found, 0.5, 0)
    with torch.no_grad():
        before = block(IMAGE)
        mask_(twin, found, keep)
        assert gap(before, block(IMAGE)) == 0
        assert gap(before, twin(IMAGE)) > 1e-5


def test_a_shape_is_one_of_torch_and_so_are_its_pieces():
    seen = []

    def run(m, x):
        x = m.a(x)
        seen.append([x.shape, x.size(), x.shape[:2], x.shape + x.shape[2:], (*x.shape, 1)[:0] + x.shape])
        return m.fc(x.flatten(2).sum(2).view(x.shape[:2] + x.shape[4:]) / x.shape[2:].numel())

    model = randomise_(Net(run, a=nn.Conv2d(3, 6, 1), fc=nn.Linear(6, 2)))
    found = comb(model, IMAGE, trial=False)
    plain = torch.Size((2, 6, 4, 4))
    total = type(plain + plain[2:])  # a tuple in torch 2.4
    kinds = [torch.Size, torch.Size, torch.Size, total, type(tuple(plain[:0]) + plain)]
    assert [type(shape) for shape in seen[0]] == kinds
    assert {type(shape[1]) for shape in seen[0]} == {TracedInt}
    assert len(seen) == 1 and {g.name: g.units for g in found.groups} == {'a': 6}
    check_equal(model, found)


def test_modules_of_torchscript():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    model = Net(lambda m, x: m.fc(m.part.inner(m.a(x))), a=nn.Linear(3, 6), part=nn.Module(), fc=nn.Linear(6, 2))
    model.part.inner = scripted
    with pytest.raises(CombError, match=r'part\.inner is compiled by torch\.jit.*comb the module it was made of'):
        comb(model, torch.rand(2, 3))
    with pytest.raises(CombError, match=r'is compiled by torch\.jit'):
        comb(scripted, torch.rand(2, 6))
    assert not model.a._forward_hooks and not vars(model.a.weight)


def test_axes_of_different_lengths_freeze():
    run = Run(Policy(), Cursor({}), Ran(nn.Module()))
    table = run.record.table
    (long,), (short,) = table.add('long', torch.empty(6)), table.add('short', torch.empty(4))
    run.equate(long, short, 'meeting')
    component, why = table.solve()
    assert len(set(component.tolist())) == 10 and set(why.tolist()) == {0}
    assert table.reasons == ['meeting of 6 with 4 channels in the model itself']
