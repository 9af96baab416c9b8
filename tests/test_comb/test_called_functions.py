"""Sizes and constants in plain functions that a method calls: each class gets a copy of its own."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.size_functions import called_functions, callers_of
from mmcpd.slim.trial import random_keep
from tests.exact import exact
from tests.helpers import check_structure, gap, sample

TOKENS = sample((2, 5, 3))


def split_heads(x, heads):
    n, tokens, width = x.shape
    return x.reshape(n, tokens, 3, heads, width // 3 // heads).permute(2, 0, 3, 1, 4)


def attend(x, weight, bias, heads):
    """Attend as functional attentions do: the width of a head comes from the channels of the embedding."""
    n, tokens, width = x.shape
    q, k, v = split_heads(F.linear(x, weight, bias), heads)
    q = q * (width // heads) ** -0.5
    return (q @ k.mT).softmax(-1).matmul(v).transpose(1, 2).reshape(n, tokens, width)


def doubled(function):
    @functools.wraps(function)
    def run(*args, **kwargs):
        return 2 * function(*args, **kwargs)

    return run


@doubled
def attend_twice(x, weight, bias, heads):
    n, tokens, width = x.shape
    q, k, v = F.linear(x, weight, bias).reshape(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    return F.softmax(q @ k.mT * (width // heads) ** -0.5, -1).matmul(v).transpose(1, 2).reshape(n, tokens, width)


class Functional(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x):
        return x + self.proj(attend(x, self.qkv.weight, self.qkv.bias, self.heads))


class Decorated(Functional):
    def forward(self, x):
        return x + self.proj(attend_twice(x, self.qkv.weight, self.qkv.bias, self.heads))


class Chain(nn.Module):
    """Two blocks of one class, and one with its own forward."""

    def __init__(self, kind=Functional):
        super().__init__()
        self.stem, self.a, self.b, self.fc = nn.Linear(3, 8), kind(), kind(heads=4), nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.b(self.a(self.stem(x))))


@pytest.mark.parametrize('kind', [Functional, Decorated])
def test_sizes_and_scales_in_functions(kind):
    model = Chain(kind)
    found = exact(model, TOKENS, {'stem': 8, 'a.qkv': 4, 'b.qkv': 2})
    keep = random_keep(found, 0.5, 0, awkward=True)
    small = slim(model, found, keep)
    assert type(small.a) is not type(small.b)  # each has its own copy of the function
    check_structure(model, found, small, lambda: Chain(kind))
    for twin in (copy.deepcopy(small), pickle.loads(pickle.dumps(small))):
        assert gap(small(TOKENS), twin(TOKENS)) == 0


def test_the_function_of_the_file_stays_what_it_is():
    model, before = Chain().double().eval(), attend.__code__
    expected = model(TOKENS)
    found = comb(model, TOKENS)
    small = slim(model, found, random_keep(found, 0.5, 0, awkward=True))
    assert attend.__code__ is before
    assert gap(expected, model(TOKENS)) == 0
    again = comb(small, TOKENS)  # a slim model is combed, and slimmed once more
    assert {g.name for g in again.groups} == {g.name for g in found.groups}
    smaller = slim(small, again, random_keep(again, 0.5, 1))
    assert smaller(TOKENS).shape == expected.shape
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in small.parameters())


class Thirds(nn.Module):
    """A part of a bias is cleared, of which the length is that of all its elements."""

    def __init__(self):
        super().__init__()
        self.qkv, self.fc = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x):
        bias = self.qkv.bias.clone()
        length = bias.numel() // 3
        bias[length : 2 * length].zero_()
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return self.fc((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v)


def test_the_number_of_elements_is_a_size():
    exact(Thirds(), TOKENS, {'qkv': 4})


class Hidden:
    """A decorator that keeps its function in an attribute, and says what it wraps."""

    def __init__(self, function):
        functools.update_wrapper(self, function)
        self.function = function

    def __get__(self, model, kind):
        return functools.partial(self.function, model)


class Documented(nn.Module):
    """A method that cannot be written anew mentions `forward`, in which a size has to be written."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(3, 24), nn.Linear(8, 2)

    @Hidden
    def arguments(self):
        return self.forward.__code__.co_argcount

    def forward(self, x):
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(n, tokens, 8))


def test_methods_that_mention_the_written_one_stay_as_they_are():
    model = Documented()
    found = exact(model, TOKENS, {'qkv': 4})
    small = slim(model, found, random_keep(found, 0.5, 0))
    assert small.arguments() == 2 and 'arguments' not in vars(type(small)) and 'forward' in vars(type(small))


def test_which_functions_a_method_calls():
    methods = [('forward', Functional.forward)]
    called = called_functions(methods)
    assert called == {'attend': attend, 'split_heads': split_heads}
    functions = {**called, 'forward': Functional.forward}
    assert callers_of(functions, ['split_heads'], called) == {'split_heads', 'attend', 'forward'}
    assert callers_of(functions, ['attend'], called) == {'attend', 'forward'}
    assert callers_of(functions, ['attend'], ()) == {'attend'}
    assert called_functions([*methods, ('attend', Functional.forward)]) == {'split_heads': split_heads}
    other = type(attend)(Functional.forward.__code__, {'attend': doubled(attend)})
    assert 'attend' not in called_functions([*methods, ('forward_again', other)])  # it means two functions
    assert not called_functions([('forward', nn.Linear.forward)])  # torch's own stay what they are


def test_a_line_of_a_function_that_runs_with_two_widths_couples_them():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.fc = nn.Linear(3, 8), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 2)

        def forward(self, x):
            x = self.stem(x)
            x = x + attend(x, self.a.weight, self.a.bias, 2)
            return self.fc(x + attend(x, self.b.weight, self.b.bias, 2))

    found = comb(Twice().double(), TOKENS, trial=False)
    assert found.groups
    exact(Twice(), TOKENS, {g.name: g.units for g in found.groups})
