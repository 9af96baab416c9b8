"""A method may call its module what it likes: `self` is a habit of Python's, no word of it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from mmcpd.slim.methods import Reads, methods_of, reads_of
from mmcpd.slim.places import raised_at
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import randomise_, sample


def twice(function):
    @functools.wraps(function)
    def call(*args):
        return function(*args) + function(*args)

    return call


class Layers(nn.Module):
    """Two convolutions; what lies between them is a method of a subclass, whose module is called `net` or `m`."""

    def __init__(net):
        super().__init__()
        net.a, net.b, net.width = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), 8

    def forward(net, x):
        return net.b(net.between(net.a(x)))


class Softmax(Layers):
    def between(m, x):
        return x.softmax(1)


class Decorated(Layers):
    @twice
    def between(m, x):
        return x.softmax(1)


class Inherited(Softmax):
    def between(m, x):
        return x * super().between(x)


class Inner(Layers):
    def between(m, x):
        def spread(y):
            return y * (1 + y.var(1, keepdim=True) * m.width / m.width)

        return spread(x)


class Sized(Layers):
    def between(m, x):
        return x.flatten(2).reshape(len(x), 8, -1, x.shape[3]).softmax(1)


class ByHand(Layers):
    def between(m, x):
        mean = x.sum(1, keepdim=True) / m.width
        return (x - mean) / ((x - mean) ** 2).sum(1, keepdim=True).div(m.width).add(1e-5).sqrt()


@pytest.mark.parametrize('kind', [Softmax, Decorated, Inherited, Inner, Sized, ByHand])
def test_statistics_and_sizes_are_found(kind):
    exact(kind(), sample((2, 3, 7, 7)), {'a': 8})


class Fused(Layers):
    """Has a method that nobody runs before slimming."""

    def between(m, x):
        return x.relu()

    def fuse(m):
        return torch.zeros(m.width)


def test_what_methods_read_is_theirs():
    code = (lambda m, x: m.conv(x.data)).__code__
    assert reads_of(code, 'm') == Reads(frozenset({'conv'}), frozenset({'data'}))
    assert reads_of(code) == Reads(frozenset(), frozenset({'conv', 'data'}))
    assert 'width' in methods_of(Fused)['fuse'].own
    assert 'width' in methods_of(Inner)['between'].own  # in a function inside it
    model = Fused().double()
    found = comb(model, sample((2, 3, 7, 7)))
    keep = random_keep(found, 0.5, 0)
    assert slim(model, found, keep).fuse().numel() == int(keep['a'].sum())


class Block(nn.Module):
    """Reads its width where no operation on channels sees it: in a loop."""

    def __init__(self):
        super().__init__()
        self.conv, self.width = nn.Conv2d(3, 12, 3), 12

    def features(self, x):
        for _ in range(self.width):
            x = x * 1.01
        return self.conv(x)

    def forward(self, x):
        return self.features(x)


class ByStatic(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.fc = Block(), nn.Conv2d(12, 2, 1)

    @staticmethod
    def through(block, x):
        for _ in range(block.width):
            x = x * 1.01
        return block(x)

    def forward(self, x):
        return self.fc(self.through(self.block, x).relu())


class ByForward(ByStatic):
    def features(self, x):
        return self.fc(self.block.features(x).relu())

    def forward(self, x):
        raise NotImplementedError


@pytest.mark.parametrize(
    ('kind', 'forward'),
    [(ByStatic, None), (ByForward, lambda model, x: model.features(x)), (ByForward, lambda self, x: self.features(x))],
)
def test_what_a_forward_or_a_static_method_calls_is_run(kind, forward):
    """A number that a loop counts to stays, whoever calls the method with the loop."""
    model, x = randomise_(kind()), sample((2, 3, 7, 7))
    found = comb(model, (x,), forward=forward, trial=False)
    keep = random_keep(found, 0.5, 0, awkward=True)
    assert compare(model, found, keep) < 1e-12
    assert slim(model, found, keep).block.width == 12


def _another_name(m, x):
    return m.b(m.a(x).softmax(1))


class Assigned(Layers):
    forward = _another_name


class AnyNumber(Layers):
    def forward(*given):
        return given[0].b(given[0].a(given[1]).softmax(1))


def test_a_statistic_of_nobody_freezes():
    exact(Assigned(), sample((2, 3, 7, 7)), {'a': 8})
    found = comb(AnyNumber().double(), sample((2, 3, 7, 7)), trial=False)
    assert not found.groups


class Raising(Layers):
    def between(m, x):
        raise ValueError('no')


def helper(module, x):
    return module(x)


def test_an_error_names_the_module_that_raises_and_no_other():
    model = nn.ModuleDict({'inner': Raising()})
    with pytest.raises(ValueError, match='no') as caught:
        helper(model['inner'], torch.zeros(1, 3, 5, 5))
    assert raised_at(caught.value).startswith(' in the model itself (test_receivers.py:')

    def outer(module, x):  # takes a module and is no method of it
        raise ValueError('no')

    with pytest.raises(ValueError, match='no') as caught:
        outer(model, 0)
    assert raised_at(caught.value) == ''
