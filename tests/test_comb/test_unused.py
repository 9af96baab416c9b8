"""Parts that no observed pass runs: they are named, and what may feed them keeps its width."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.errors import SlimError
from mmcpd.modes import as_trained
from mmcpd.slim import slim
from mmcpd.slim.compare import compare, compare_gradients
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, masked, randomise_

IMAGE = torch.rand(2, 3, 9, 9, dtype=torch.float64)
LARGE = torch.rand(2, 3, 70, 70, dtype=torch.float64)


def conv(into: int, out: int, **options: int) -> nn.Module:
    return nn.Conv2d(into, out, 3, padding=1, **options)


def net(branch: Callable[[nn.Module, Tensor], Tensor], **parts: nn.Module) -> nn.Module:
    """Return conv `a` (3 -> 8), conv `b` (8 -> 6) and `fc`, with a branch for large pictures between `a` and `b`."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.a(x).relu()
        if x.shape[-1] > 64:
            x = branch(m, x)
        return m.fc(m.b(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    return randomise_(Net(run, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 4), **parts))


BRANCHES: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, nn.Module], tuple[str, ...]]] = {
    'a convolution': (lambda m, x: m.big(x), {'big': conv(8, 8)}, ('big',)),
    'a depthwise convolution': (lambda m, x: m.big(x), {'big': conv(8, 8, groups=8)}, ('big',)),
    'a transposed convolution': (
        lambda m, x: m.big(x)[..., :70, :70],
        {'big': nn.ConvTranspose2d(8, 8, 2)},
        ('big',),
    ),
    'a norm': (lambda m, x: m.big(x), {'big': nn.BatchNorm2d(8)}, ('big',)),
    'a norm without weights': (lambda m, x: m.big(x), {'big': nn.BatchNorm2d(8, affine=False)}, ('big',)),
    'a chain': (
        lambda m, x: m.big(x),
        {'big': nn.Sequential(nn.ReLU(), conv(8, 6), nn.Sequential(nn.BatchNorm2d(6), conv(6, 8)))},
        ('big.1', 'big.2.0', 'big.2.1'),
    ),
    'weight norm': (lambda m, x: m.big(x), {'big': parametrizations.weight_norm(conv(8, 8))}, ('big',)),
    'spectral norm': (lambda m, x: m.big(x), {'big': parametrizations.spectral_norm(conv(8, 8))}, ('big',)),
    'read without a call': (
        lambda m, x: F.conv2d(x, m.big.weight, m.big.bias, padding=1),
        {'big': conv(8, 8)},
        ('big',),
    ),
    'a list': (lambda m, x: m.more[0](x) + m.more[1](x), {'more': nn.ModuleList([conv(8, 8), conv(8, 8)])},
               ('more.0', 'more.1')),
    'joined channels': (lambda m, x: m.big(torch.cat([x, x.relu()], 1)), {'big': conv(16, 8)}, ('big',)),
    'instead of another layer': (lambda m, x: m.big(x.mean(1, keepdim=True).expand(-1, 3, -1, -1)), {'big': conv(3, 8)},
                                 ('big',)),
    'an own scale': (lambda m, x: m.big(x), {'big': Net(lambda m, x: x * m.scale.view(-1, 1, 1),
                                                       scale=nn.Parameter(torch.rand(8)))}, ('big',)),
}  # fmt: skip


@pytest.mark.parametrize('which', BRANCHES)
def test_a_branch_that_was_not_taken_runs_on_the_slim_model(which: str) -> None:
    branch, parts, names = BRANCHES[which]
    model = net(branch, **parts)
    found = comb(model, IMAGE)
    assert found.unused == names
    assert [group.name for group in found.groups] == ([] if which == 'joined channels' else ['b'])
    keep = random_keep(found, 0.5, 0)
    assert compare(model, found, keep) < 1e-12
    large = replace(found, example=replace(found.example, inputs=(LARGE,)))
    assert compare(model, large, keep) < 1e-12
    left = comb(model, IMAGE, unused='leave')  # the control
    assert left.unused == names and [group.name for group in left.groups] == ['a', 'b']
    with pytest.raises((RuntimeError, SlimError)):
        slim(model, left, random_keep(left, 0.5, 0))(LARGE)


def test_the_reason_names_the_layer_and_the_cure() -> None:
    found = comb(net(*BRANCHES['a convolution'][:1], big=conv(8, 8)), IMAGE)
    [reason] = {f.reason for f in found.frozen if f.tensor == 'a.weight' and f.dim == 0}
    assert reason.startswith('a layer that never ran may use them') and reason.endswith('(used by big)')
    assert 'also=[...]' in reason and "unused='leave'" in reason
    assert 'never ran, and keep their widths: big' in str(found)
    assert json.loads(found.to_json())['unused'] == ['big']


def test_a_pass_that_runs_it_frees_it() -> None:
    model = net(lambda m, x: m.big(x), big=conv(8, 8))
    found = comb(model, IMAGE, also=[lambda model, x: model(LARGE)])
    assert not found.unused and [group.name for group in found.groups] == ['a', 'b']
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-12


def test_wrong_unused() -> None:
    with pytest.raises(ValueError, match=r"unused must be one of .*'freeze', 'leave'.*'drop'"):
        comb(nn.Linear(2, 2), torch.rand(1, 2), unused='drop')


# -- what only looks unused --------------------------------------------------------------------------------------------
def tied() -> nn.Module:
    model = Net(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), a=nn.Linear(5, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 3))
    model.twin = nn.Linear(8, 8, bias=False)
    model.twin.weight = model.b.weight
    return model


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attn, self.c = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.c(self.attn(x, x, x, need_weights=False)[0])


USED: dict[str, Callable[[], nn.Module]] = {
    'functions': lambda: Net(
        lambda m, x: F.linear(F.linear(x, m.a.weight, m.a.bias).relu(), m.c.weight.data),
        a=nn.Linear(5, 8),
        c=nn.Linear(8, 3, bias=False),
    ),
    'attention': Attends,
    'tied weights': tied,
    'a shared layer': lambda: (lambda b: Net(lambda m, x: m.c(m.b(m.a(x))), a=nn.Linear(5, 8), b=b, again=b,
                                             c=nn.Linear(8, 3)))(nn.Linear(8, 8)),
    'weight norm': lambda: Net(lambda m, x: m.c(m.a(x)), a=parametrizations.weight_norm(nn.Linear(5, 8)),
                               c=nn.Linear(8, 3)),
}  # fmt: skip


@pytest.mark.parametrize('which', USED)
def test_what_is_read_was_run(which: str) -> None:
    model = randomise_(USED[which]())
    found = comb(model, torch.rand(2, 4, 5, dtype=torch.float64))
    assert not found.unused and not any('never ran' in reason for reason in found.reasons())
    assert found.groups or which == 'weight norm'  # it freezes by itself
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-12


def test_what_is_only_asked_for_its_type_was_not_run() -> None:
    model = net(lambda m, x: x, big=conv(8, 8))
    run = model.run
    model.run = lambda m, x: run(m, x) + torch.zeros_like(m.big.weight).sum() + m.big.weight.new_zeros(1)
    assert comb(model, IMAGE, trial=False).unused == ('big',)


def test_a_wrapper_that_is_switched_off_keeps_what_it_wraps() -> None:
    class Adapted(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.base, self.on = base, False
            self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + self.up(self.down(x)) if self.on else self.base(x)

    model = randomise_(nn.Sequential(nn.Linear(5, 9), Adapted(nn.Linear(9, 8)), nn.Linear(8, 7), nn.Linear(7, 3)))
    x = torch.rand(2, 5, dtype=torch.float64)
    found = comb(model, x)
    assert found.unused == ('1.down', '1.up') and [group.name for group in found.groups] == ['2']
    small = slim(model, found, random_keep(found, 0.5, 0))
    small[1].on = True
    assert small(x).shape == (2, 3)
    assert [group.name for group in comb(model, x, unused='leave').groups] == ['0', '1.base', '2']


@pytest.mark.parametrize('idle', [nn.Embedding(8, 8), nn.ParameterList([torch.rand(8)])], ids=['embedding', 'list'])
def test_a_table_is_named_and_freezes_nothing(idle: nn.Module) -> None:
    found = comb(net(lambda m, x: x, idle=idle), IMAGE)
    assert found.unused == ('idle',) and [group.name for group in found.groups] == ['a', 'b']


def test_a_single_tensor_is_named_and_freezes_nothing() -> None:
    model = net(lambda m, x: x + m.token)
    model.token = nn.Parameter(torch.rand(1, 8, 1, 1, dtype=torch.float64))
    found = comb(model, IMAGE)
    assert found.unused == ('token',) and [group.name for group in found.groups] == ['a', 'b']


def test_layers_of_a_list_that_do_not_run() -> None:
    layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
    model = Net(
        lambda m, x: m.c(m.layers[1](m.a(x).relu()).relu()), a=nn.Linear(5, 8), layers=layers, c=nn.Linear(8, 3)
    )
    found = comb(randomise_(model), torch.rand(2, 5, dtype=torch.float64))
    assert found.unused == ('layers.0', 'layers.2') and not found.groups


def test_only_what_is_near_is_frozen() -> None:
    block = net(lambda m, x: m.big(x), big=conv(8, 8))
    model = nn.Sequential(conv(3, 8), conv(8, 3), Net(lambda m, x: m.inner(x), inner=block)).double()
    assert [group.name for group in comb(model, IMAGE).groups] == ['0', '1', '2.inner.b']


class Straight(nn.Module):
    """A forward without branches, which does not mention its second norm."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.mix = nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.one(x))


class Chooses(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.one(x) if x.shape[0] < 9 else self.two(x))


class HandsOver(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return x + mixed(self, x)


class CallsItself(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixed(x)

    def mixed(self, x: Tensor) -> Tensor:
        return mixed(self, x)


class ByName(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(getattr(self, ('one', 'two')[x.shape[0] // 9])(x))


def mixed(block: Straight, x: Tensor) -> Tensor:
    return block.mix((block.one if x.shape[0] < 9 else block.two)(x))


@pytest.mark.parametrize('kind', [Straight, Chooses, HandsOver, CallsItself, ByName])
def test_what_a_forward_without_branches_leaves_out_freezes_nothing(kind: type[Straight]) -> None:
    model = randomise_(nn.Sequential(nn.Linear(5, 8), kind(), nn.Linear(8, 6), nn.Linear(6, 3)))
    found = comb(model, torch.rand(2, 5, dtype=torch.float64))
    assert found.unused == ('1.two',)
    assert [group.name for group in found.groups] == (['0', '2'] if kind is Straight else ['2'])
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert small(torch.rand(9, 5, dtype=torch.float64)).shape == (9, 3)


# -- training ----------------------------------------------------------------------------------------------------------
class Sides(nn.Module):
    """A side head and a buffer that only training touches, and dropout."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = conv(3, 8), conv(8, 6), nn.Linear(6, 4)
        self.side = nn.Sequential(conv(8, 5), nn.BatchNorm2d(5), nn.Dropout(0.5), conv(5, 2))
        self.register_buffer('centre', torch.zeros(6))

    def forward(self, x: Tensor) -> object:
        x = self.a(x).relu()
        y = self.b(x).relu().mean((2, 3))
        if not self.training:
            return self.fc(y)
        self.centre.mul_(0.9).add_(y.detach().mean(0), alpha=0.1)
        return {'out': self.fc(F.dropout(y - self.centre)), 'side': self.side(x)}


def in_training(found: Coupling) -> Coupling:
    def run(model: nn.Module, x: Tensor) -> object:
        with as_trained(model):
            return model(x)

    return replace(found, example=replace(found.example, forward=run, also=()))


def test_what_only_training_runs_is_pruned_along() -> None:
    torch.manual_seed(0)
    model = randomise_(Sides())
    before = copy.deepcopy(model.state_dict())
    found = comb(model, IMAGE)
    assert not found.unused and [group.name for group in found.groups] == ['a', 'b', 'side.0']
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())
    keep = random_keep(found, 0.5, 0)
    assert compare(model, found, keep) < 1e-12
    trained = in_training(found)
    assert compare(model, trained, keep) < 1e-12 and compare_gradients(model, trained, keep) < 1e-9
    slim(model, found, keep).train()(IMAGE)['out'].sum().backward()
    # The control: a side head that was not observed keeps its width, and the slim model cannot be trained.
    alone = comb(model, IMAGE, forward=lambda model, x: model.eval()(x), unused='leave')
    with pytest.raises(RuntimeError):
        slim(model, alone, random_keep(alone, 0.5, 0)).train()(IMAGE)


def test_the_cost_is_that_of_the_forward_alone() -> None:
    model = randomise_(Sides())
    found = comb(model, IMAGE)
    assert found.cost(found.keep()).macs == 2 * 81 * (9 * 3 * 8 + 9 * 8 * 6) + 2 * 6 * 4


class TwoModes(Sides):
    """Its own `train` makes what eval mode reads, and takes it away for training."""

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if mode:
            vars(self).pop('scale', None)
        else:
            self.scale = self.fc.bias.detach().exp()
        return self

    def forward(self, x: Tensor) -> object:
        return super().forward(x) if self.training else super().forward(x) * self.scale


def test_a_model_with_its_own_train_is_left_as_it_was() -> None:
    model = randomise_(TwoModes())
    before = model(IMAGE)
    found = comb(model, IMAGE)
    assert not found.unused and torch.equal(model(IMAGE), before)
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-12


class NeedsTargets(Sides):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> object:
        if self.training and targets is None:
            raise ValueError('targets should not be none when in training mode')
        return super().forward(x)


def test_training_that_does_not_run_freezes_what_feeds_it() -> None:
    found = comb(randomise_(NeedsTargets()), IMAGE)
    assert found.unused == ('centre', 'side.0', 'side.1', 'side.3')
    assert 'a' not in {group.name for group in found.groups}


def test_masking_and_slimming_agree_without_the_pass_as_a_control() -> None:
    model = randomise_(Sides())
    found = comb(model, IMAGE)
    keep = random_keep(found, 0.5, 0)
    other = masked(model, found, random_keep(found, 0.5, 1))
    with as_trained(other), as_trained(small := slim(model, found, keep)):
        assert not torch.allclose(other(IMAGE)['out'], small(IMAGE)['out'])


class Written(nn.Module):
    """A head that only training runs, behind sizes that stand in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.side = nn.Conv2d(3, 12, 1), nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x).reshape(x.shape[0], 12, -1).mean(2)
        return self.two(x) + self.side(x) if self.training else self.two(x)


def test_a_size_in_the_source_is_found_while_training_mode_is_observed_too() -> None:
    coupling = comb(Written(), torch.rand(2, 3, 4, 4))
    assert [(group.name, group.units) for group in coupling.groups] == [('one', 12)]
