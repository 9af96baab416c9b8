"""Sizes in methods that another method hides, and that run by `super()`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.compare import compare
from mmcpd.slim.size_functions import definitions, functions_of
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import check_structure, randomise_, sample
from tests.test_slim import rewritten_nets
from tests.test_slim.rewritten_nets import Attention, Spreading, Transformer

X = sample((2, 5, 6))


class Gated(Attention):
    """Only adds to what its base does."""

    def forward(self, x):
        return super().forward(x).tanh()


class Twice(Gated):
    def forward(self, x):
        return super(Twice, self).forward(x) * 0.5  # noqa: UP008 - the older way to say it


class Mixed:
    """A class that is no module, between a module and its base."""

    def forward(self, x):
        return super().forward(x) + 1


class Beside(Mixed, Attention):
    pass


class Helped(Attention):
    """Hides a size of its own behind the base's, in another method."""

    def forward(self, x):
        return self.flattened(x) + x

    def flattened(self, x):
        return super().forward(x.reshape(x.shape[0] * x.shape[1] // 5, 5, x.shape[2]))


class Explicit(Attention):
    """No class before the base is asked: nothing can take the place of the base's method."""

    def forward(self, x):
        return Attention.forward(self, x).tanh()


class OnlySaid(Attention):
    """Calls the base by name though it uses `super()` elsewhere."""

    def forward(self, x):
        return Attention.forward(self, x).tanh()

    def other(self, x):
        return super().forward(x)


def net(kind):
    model = Transformer()
    model.blocks = nn.Sequential(kind(16, 2), kind(16, 4))
    return model


Namesake = type('Attention', (Gated,), {'__module__': __name__})


HEADS = {'embed': 16, 'blocks.0.qkv': 8, 'blocks.1.qkv': 4}
GROUPS = {**HEADS, 'blocks.0.proj': 16, 'blocks.1.proj': 16}


@pytest.mark.parametrize(
    ('kind', 'method', 'groups'),
    [
        (Gated, 'super.forward', GROUPS),
        (Twice, 'super.super.forward', GROUPS),
        (Beside, 'super.forward', GROUPS),
        (Helped, 'super.forward', HEADS),
        (Namesake, 'super.forward', GROUPS),
    ],
)
def test_a_size_in_the_method_behind_super_is_written(kind, method, groups):
    model = net(kind)
    found = exact(model, X, groups)
    small = slim(model, found, random_keep(found, 0.5, 3, awkward=True))
    assert method in {each.method for each in rewrites_of(small.blocks[0])}
    check_structure(model, found, small, lambda: net(kind))


def test_a_slim_model_is_copied_pickled_and_combed_again():
    model = randomise_(net(Gated))
    found = comb(model, X)
    small = slim(model, found, random_keep(found, 0.5, 0))
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert torch.equal(twin(X), small(X))
        assert isinstance(twin.blocks[0], Gated)
        assert type(twin.blocks[0]).__name__ == 'Gated'
    again = comb(small, X)
    assert again.reasons() == found.reasons()
    assert compare(small, again, random_keep(again, 0.5, 1)) < 1e-12


@pytest.mark.parametrize('kind', [Explicit, OnlySaid])
def test_a_method_that_is_called_by_its_class_is_not_written(kind):
    model = randomise_(net(kind))
    assert [base for base, _ in definitions(kind, 'forward')] == [kind]
    found = comb(model, X)
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-12
    assert {group.name: group.units for group in found.groups} != GROUPS


def spread(x, q):
    b, n, c = x.shape
    return q.reshape(b, n, 4, c // 4).transpose(1, 2).reshape(b, 4, -1).mean(-1)


class Namesakes(Spreading):
    """Calls its own file's function, and a method behind super() that calls another one of that name."""

    def other(self, x):
        return super().other(x)

    def forward(self, x):
        x = self.embed(x)
        return self.head(self.other(x).tanh()) + spread(x, self.queries(x))[:, :3, None].mean()


def test_a_function_is_the_one_of_its_own_file():
    model = Namesakes()
    found = exact(model, X, {'embed': 16, 'queries': 4})
    assert 'super.other' not in functions_of(Namesakes)
    check_structure(model, found, slim(model, found, random_keep(found, 0.5, 3, awkward=True)), Namesakes)


def test_definitions_are_those_that_super_reaches():
    assert [base for base, _ in definitions(Twice, 'forward')] == [Twice, Gated, Attention]
    assert [base for base, _ in definitions(Beside, 'forward')] == [Mixed, Attention]
    assert [base for base, _ in definitions(rewritten_nets.Attention, 'forward')] == [Attention]
