"""What only training runs, what backward computes, and functions that hold other modules: seen by name."""

from __future__ import annotations

import functools
import weakref

import pytest
import torch
import torch.utils.checkpoint as checkpoints
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.checkpoint import checkpoint as again

from mmcpd.comb import comb
from mmcpd.comb.mentions import is_special, names_in
from mmcpd.slim import slim
from mmcpd.slim.compare import compare_gradients
from mmcpd.slim.shape_attributes import DESCRIBED, SHAPE_ATTRS, described, local_shapes
from tests.helpers import check_equal, gap, masked, randomise_, sample

X = sample((2, 5, 6))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.width = 8
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def centred(self, y):
        return y - y.mean(-1, keepdim=True)


class NoiseInTraining(Layers):
    def forward(self, x):
        y = self.a(x)
        if self.training:
            y = y * torch.full((len(y), 1, self.width), 0.5, dtype=y.dtype)
        return self.b(y.relu())


class ViewInTraining(Layers):
    def forward(self, x):
        y = self.a(x)
        return self.b((y.view(-1, 5, self.width) * 2 if self.training else y).relu())


class LossInTraining(Layers):
    def forward(self, x):
        y = self.a(x)
        out = self.b(y.relu())
        return (out, y.softmax(-1).var(-1).mean()) if self.training else out


class BehindAProperty(ViewInTraining):
    @property
    def trains(self):
        return self.training

    def forward(self, x):
        y = self.a(x)
        return self.b((y.view(-1, 5, self.width) * 2 if self.trains else y).relu())


class Raindrop(ViewInTraining):
    """A model, whatever its name has in it."""


@pytest.mark.parametrize('kind', [NoiseInTraining, ViewInTraining, LossInTraining, BehindAProperty, Raindrop])
def test_what_only_training_runs_is_observed(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'a': 8}
    check_equal(model, found)
    keep = {'a': torch.arange(8) % 3 > 0}
    small, other = slim(model, found, keep).train(), masked(model, found, keep).train()
    assert gap(small(X), other(X)) < 1e-12
    assert compare_gradients(model, found, keep) < 1e-9


class Checkpointed(Layers):
    def forward(self, x):
        return self.b(checkpoint(self.centred, self.a(x), use_reentrant=True).tanh())


class InTraining(Layers):
    def forward(self, x):
        y = self.a(x)
        return self.b((checkpoint(self.centred, y, use_reentrant=True) if self.training else self.centred(y)).tanh())


class NotReentrant(Layers):
    def forward(self, x):
        y = self.a(x)
        return self.b((again(self.centred, y, use_reentrant=False) if self.training else self.centred(y)).tanh())


class Renamed(Layers):
    def forward(self, x):
        return self.b(again(self.centred, self.a(x), use_reentrant=True).tanh())


class ByModule(Layers):
    def forward(self, x):
        run = checkpoints.checkpoint if self.width else None
        return self.b(run(self.centred, self.a(x), use_reentrant=True).tanh())


class ByAttribute(Layers):
    """As the models of transformers have it."""

    def __init__(self):
        super().__init__()
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=True)

    def forward(self, x):
        return self.b(self._gradient_checkpointing_func(self.centred, self.a(x)).tanh())


class Hooked(Layers):
    def forward(self, x):
        y = self.a(x).sin()
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient - gradient.mean(-1, keepdim=True))
        return self.b(y.tanh())


class ModuleHook(Layers):
    def __init__(self):
        super().__init__()
        self.act = nn.Tanh()
        self.act.register_full_backward_hook(lambda _module, grads, _out: (self.centred(grads[0]),))

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class ModulePreHook(ModuleHook):
    def __init__(self):
        Layers.__init__(self)
        self.act = nn.Tanh()
        self.act.register_full_backward_pre_hook(lambda _module, grads: (self.centred(grads[0]),))


class PlainHook(Layers):
    """In a net that is slimmed by slicing alone."""

    def forward(self, x):
        y = self.a(x).relu()
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient / gradient.shape[-1])
        return self.b(y)


BACKWARD = [Checkpointed, InTraining, NotReentrant, Renamed, ByModule, ByAttribute, Hooked, ModuleHook, ModulePreHook,
            PlainHook]  # fmt: skip


@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize(
    'kind',
    [
        Checkpointed,
        InTraining,
        NotReentrant,
        Renamed,
        ByModule,
        ByAttribute,
        Hooked,
        ModuleHook,
        ModulePreHook,
        PlainHook,
    ],
)
def test_backward_over_all_channels_freezes_them(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert not found.groups
    assert any('trial failed' in reason for reason in found.reasons())
    assert comb(model, X, trial=False).units == 8  # which only a trial tells


class ByHook(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n, self.b, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 7), nn.Linear(7, 2)
        self.hold()

    def hold(self):
        self.a.register_forward_hook(lambda _module, _inputs, out: self.n(out))

    def forward(self, x):
        return self.out(self.b(self.a(x).relu()).relu())


class ByFunction(ByHook):
    def hold(self):
        self.then = lambda x: self.n(x).relu()

    def forward(self, x):
        return self.out(self.b(self.then(self.a(x).relu())).relu())


class ByReference(ByFunction):
    def hold(self):
        parent = weakref.ref(self)
        self.then = functools.partial(lambda x: parent().n(x).relu())


@pytest.mark.parametrize('kind', [ByHook, ByFunction, ByReference])
def test_a_function_that_holds_another_module_than_the_copys_is_tried(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'b': 7}
    check_equal(model, found)


def test_names_are_those_of_what_runs():
    class Describing(nn.Linear):
        def __init__(self):
            super().__init__(2, self.in_features_of())

        def in_features_of(self):
            return 3

        def extra_repr(self):
            return f'{self.out_features}'

        def forward(self, x):
            return again(super().forward, x)

    assert 'out_features' not in names_in(Describing)
    assert {'forward', 'checkpoint'} <= names_in(Describing)
    assert names_in(nn.Linear) == set()


class RandomInTraining(Layers):
    def forward(self, x):
        y = self.a(x)
        return self.b(y + torch.randn_like(y) if self.training else y)


class SizedNoise(Layers):
    def forward(self, x):
        y = self.a(x)
        return self.b(y + torch.randn(len(y), 5, self.width, dtype=y.dtype) if self.training else y)


@pytest.mark.parametrize('kind', [RandomInTraining, SizedNoise])
def test_noise_that_only_training_draws_freezes_nothing(kind):
    model = randomise_(kind())
    found = comb(model, X)
    assert found.units == 8
    assert slim(model, found, {'a': torch.arange(8) < 3}).train()(X).isfinite().all()


class Residual(nn.Module):
    """As in MobileNetV2: a property asks the layer's own widths."""

    def __init__(self, width, out):
        super().__init__()
        self.conv = nn.Conv2d(width, out, 1)

    @property
    def has_shortcut(self):
        return self.conv.in_channels == self.conv.out_channels

    def forward(self, x):
        return x + self.conv(x) if self.has_shortcut else self.conv(x)


def test_a_branch_behind_a_property_is_tried_or_stays():
    model = randomise_(nn.Sequential(nn.Conv2d(3, 8, 1), Residual(8, 12), Residual(12, 12), nn.Conv2d(12, 2, 1)))
    picture = sample((2, 3, 4, 4))
    found = comb(model, picture)
    for count in range(1, 8):
        keep = {name: torch.arange(len(units)) < count for name, units in found.keep().items()}
        assert gap(masked(model, found, keep)(picture), slim(model, found, keep)(picture)) < 1e-12


class Refusing(Layers):
    """Wants labels in training, and says so in its own way."""

    def forward(self, x):
        if self.training:
            raise BaseFault('labels')
        return self.b(self.a(x).relu())


class BaseFault(Exception):
    pass


def test_a_forward_that_training_cannot_run_is_combed_as_it_is():
    model = randomise_(Refusing())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'a': 8}
    check_equal(model, found)


class ByPlainFunction(nn.Module):
    """Functions that lead to no module of the model need no trial."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Linear(6, 8), nn.Linear(8, 3), torch.relu
        self.scale = functools.partial(torch.mul, other=2.0)
        factor = 3.0
        self.then = lambda x: x * factor

        def twice(x, more=True):
            return twice(x * 2, False) if more else x

        self.twice = twice

    def forward(self, x):
        return self.b(self.act(self.twice(self.then(self.scale(self.a(x))))))


def test_plain_functions_are_no_reason_for_a_trial():
    model = randomise_(ByPlainFunction())
    del model.twice
    assert not is_special(model)
    model = randomise_(ByPlainFunction())
    assert is_special(model)  # how deep a function refers to itself is not known
    check_equal(model, comb(model, X))


def test_the_names_of_widths_are_those_that_the_table_writes():
    layers = [nn.Conv2d(2, 3, 1), nn.ConvTranspose1d(2, 3, 1), nn.Linear(2, 3), nn.Bilinear(2, 3, 4), nn.BatchNorm2d(2),
              nn.LayerNorm(2), nn.RMSNorm(2), nn.GroupNorm(1, 2), nn.Embedding(2, 3), nn.PReLU(2)]  # fmt: skip
    assert all(any(isinstance(layer, kind) for layer in layers) for kind, _ in SHAPE_ATTRS)
    assert {name for layer in layers for name in described(layer, local_shapes(layer))} == DESCRIBED
