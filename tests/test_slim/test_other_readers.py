"""Widths on a module that other code than methods reads, and widths that a first forward notes."""

from __future__ import annotations

from functools import cached_property, partial

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import gap, masked, randomise_, sample

X = (2, 3, 5, 5)


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.one, self.two = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return self.two(self.one(x).relu())


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.out = nn.Conv2d(3, 8, 1), Block(8), nn.Conv2d(8, 2, 1)
        self.prepare()

    def prepare(self):
        pass

    def forward(self, x):
        return self.out(self.scaled(self.stem(x)))

    def scaled(self, x):
        return self.block(x)


def scaled(module, x):
    return module(x) * module.channels**-0.5


class ByFunction(Whole):
    def scaled(self, x):
        return scaled(self.block, x)


class Runner:
    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        return self.module(x) * self.module.channels**-0.5


class ByObject(Whole):
    def scaled(self, x):
        return Runner(self.block)(x)


def hook(module, _, out):
    return out * module.channels**-0.5


class ByHook(Whole):
    def prepare(self):
        self.block.register_forward_hook(hook)


def hook_by(module, _, out, by=1):
    return out * (module.channels + by) ** -0.5


class ByPartial(Whole):
    def prepare(self):
        self.block.register_forward_hook(partial(hook_by, by=3))


def outer(model, x):
    return model.out(model.block(model.stem(x)) * model.block.channels**-0.5)


class Scaling:
    def __call__(self, module, _, out):
        return out * module.channels**-0.5


class ByObjectHook(Whole):
    def prepare(self):
        self.block.register_forward_hook(Scaling())


@pytest.mark.parametrize('cls', [ByFunction, ByObject, ByHook, ByPartial, ByObjectHook, Whole])
def test_an_attribute_that_is_no_methods_stays(cls):
    """All layers alike: with other numbers of units no attribute follows, and nothing would be wrong."""
    net = randomise_(cls()).eval()
    options = {'forward': outer} if cls is Whole else {}
    coupling = comb(net, sample(X), **options)
    assert {group.units for group in coupling.groups} == {8}, coupling.frozen
    keep = coupling.keep()
    for kept in keep.values():
        kept[4:] = False
    small, run = slim(net, coupling, keep), options.get('forward', lambda m, x: m(x))
    assert gap(run(masked(net, coupling, keep), sample(X)), run(small, sample(X))) < 1e-12
    assert small.block.channels == 8
    small.block.channels = 4
    assert gap(run(masked(net, coupling, keep), sample(X)), run(small, sample(X))) > 1e-3


def turn(module, x):
    return x if module.dim > 4 else -x


class Turned(nn.Module):
    """Nothing but convolutions, so that no trial is due."""

    def __init__(self):
        super().__init__()
        self.dim, self.one, self.out = 8, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.out(turn(self, self.one(x)))


def test_a_branch_in_a_function_stays_that_of_the_dense_model():
    net = randomise_(Turned()).eval()
    coupling = comb(net, sample(X))
    keep = coupling.keep()
    keep['one'][3:] = False
    assert gap(masked(net, coupling, keep)(sample(X)), slim(net, coupling, keep)(sample(X))) < 1e-12


# -- what a first forward notes ----------------------------------------------------------------------------------------
class Noting(nn.Module):
    half = None

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.sizes = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), {}

    @cached_property
    def cached(self):
        return self.conv.weight.shape[0] // 2

    def forward(self, x):
        x = self.conv(x)
        half = self.noted(x)
        return self.out(torch.cat([x[:, :half].tanh(), x[:, half:].relu()], 1))


class Lazy(Noting):
    def noted(self, x):
        if self.half is None:
            self.half = x.shape[1] // 2
        return self.half


class Missing(Noting):
    def noted(self, x):
        if not hasattr(self, 'width'):
            self.width = x.shape[1] // 2
        return self.width


class Cached(Noting):
    def noted(self, x):
        return self.cached


class InDictionary(Noting):
    def noted(self, x):
        return self.sizes.setdefault('half', x.shape[1] // 2)


@pytest.mark.parametrize('cls', [Lazy, Missing, Cached, InDictionary])
@pytest.mark.parametrize('when', ['never', 'before', 'between', 'both'])
def test_a_size_that_a_forward_notes_is_made_anew(cls, when):
    net = randomise_(cls()).eval()
    x = sample(X)
    if when in ('before', 'both'):
        net(x)
    coupling = comb(net, x)
    if when in ('between', 'both'):
        net(x)
    keep = coupling.keep()
    keep['conv'][[0, 5] if len(keep['conv']) == 8 else [0]] = False
    small = slim(net, coupling, keep)
    assert coupling.groups and small.conv.out_channels < 8
    assert gap(masked(net, coupling, keep)(x), small(x)) < 1e-12
    assert gap(slim(net, coupling, {'conv': keep['conv'].roll(1)})(x), small(x)) > 1e-3


class Sized(nn.Module):
    """A table of places, and beside it the size that it was made for: 0 at first."""

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.table, self.size = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), None, 0

    def forward(self, x):
        if self.size != x.shape[-1]:
            self.table, self.size = torch.linspace(0, 1, x.shape[-1], dtype=x.dtype), x.shape[-1]
        return self.out(self.conv(x) * self.table)


def test_the_size_that_a_table_is_for_goes_with_it():
    net = randomise_(Sized()).eval()
    x = sample(X)
    coupling = comb(net, x)
    net(x)
    keep = coupling.keep()
    keep['conv'][:3] = False
    small = slim(net, coupling, keep)
    assert small.table is None and small.size == 0
    assert gap(masked(net, coupling, keep)(x), small(x)) < 1e-12


# -- what must stay ----------------------------------------------------------------------------------------------------
class Sharing(nn.Module):
    """Two modules hold one dictionary: the first writes the size that the second reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Writing(), Reading()
        self.first.meta = self.second.meta = {}

    def forward(self, x):
        return self.second(self.first(x))


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        self.meta['half'] = x.shape[1] // 2
        return x


class Reading(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        half = self.meta['half']
        return self.out(torch.cat([x[:, :half].tanh(), x[:, half:].relu()], 1))


def test_a_dictionary_that_modules_share_stays_one():
    net = randomise_(Sharing()).eval()
    x = sample(X)
    coupling = comb(net, x)
    assert coupling.groups, coupling.frozen
    net(x)
    keep = random_keep(coupling, 0.5, 0)
    small = slim(net, coupling, keep)
    assert small.first.meta is small.second.meta and not small.first.meta
    assert gap(masked(net, coupling, keep)(x), small(x)) < 1e-12


class Averaging(nn.Module):
    """A running average and a flag, nothing at first: state, and no sizes."""

    def __init__(self):
        super().__init__()
        self.conv, self.out, self.level, self.ready = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), None, None

    def forward(self, x):
        now = float(x.mean())
        self.level, self.ready = now if self.level is None else 0.9 * self.level + 0.1 * now, True
        return self.out(self.conv(x)) * self.level


def test_state_that_begins_as_nothing_is_kept():
    net = randomise_(Averaging()).eval()
    coupling = comb(net, sample(X))
    net(sample(X))
    small = slim(net, coupling, random_keep(coupling, 0.5, 0))
    assert small.level == net.level is not None and small.ready


def describe(tensor):
    return tensor.dim()


class Deployable(nn.Module):
    """Its width is read when it is deployed; a function that only its construction calls names it too."""

    def __init__(self):
        super().__init__()
        self.dim, self.conv, self.out = 8, nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.dims = describe(self.conv.weight)

    def forward(self, x):
        return self.out(self.conv(x))

    def switch_to_deploy(self):
        return torch.eye(self.dim) @ self.conv.weight.float().flatten(1)


def test_what_no_forward_runs_hinders_no_attribute():
    net = randomise_(Deployable()).eval()
    coupling = comb(net, sample(X))
    keep = coupling.keep()
    keep['conv'][:5] = False
    assert slim(net, coupling, keep).switch_to_deploy().shape == (3, 3)
