"""Claims of masking, slimming and the trial that only one line holds up: each fails where that line is changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.fixes import Attr, Live, Op
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from mmcpd.slim.size_expressions import solve
from mmcpd.slim.trial import random_keep
from tests.helpers import Net, call, check_equal, gap, masked, randomise_, sample

X = sample((4, 3))


def frozen_by_trial(found) -> set[str]:
    return {f.tensor.removesuffix('.bias') for f in found.frozen if 'a trial' in f.reason and f.tensor.endswith('bias')}


def hidden_width(x) -> int:
    """Return the width of a tensor past everything that combing observes."""
    return x.stride(0)


# -- the trial ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kept', [range(1, 11), range(11, 16)], ids=['half are gone', 'a few are gone'])
def test_a_trial_sees_what_goes_wrong_only_where(kept):
    """Combing observes no width that goes through numpy; the trial's keeps leave 9 and 13 of these 16 channels."""

    def run(m, x):
        x = m.a(x).tanh()
        return m.fc(x) * (2.0 if hidden_width(x) in kept else 1.0)

    model = randomise_(Net(run, a=nn.Linear(3, 16), fc=nn.Linear(16, 2)))
    assert frozen_by_trial(comb(model, X)) == {'a'}


def test_a_trial_is_held_again_in_float64():
    """A sine of a large number depends on the last bits of float32, in which sums of other lengths differ."""

    def run(m, x):
        return m.fc((m.b(m.a(x).tanh()) * 1e5).sin())

    model = randomise_(Net(run, a=nn.Linear(3, 64), b=nn.Linear(64, 6), fc=nn.Linear(6, 2))).float()
    x = X.float()
    found = comb(model, x)
    assert {g.name: g.units for g in found.groups} == {'a': 64, 'b': 6}
    keep = random_keep(found, 0.5, 0)
    assert compare(model, found, keep) > 1e-3, 'float32 is exact enough, so that there was nothing to hold again'
    assert compare(model.double(), comb(model, X), keep) < 1e-9


@pytest.mark.parametrize('gain', [1 + 1e-6, 1 + 1e-12])
def test_a_small_difference_is_a_fault_and_rounding_is_none(gain):
    def run(m, x):
        x = m.a(x).tanh()
        return m.fc(x) * (gain if hidden_width(x) < 8 else 1.0)

    model = randomise_(Net(run, a=nn.Linear(3, 8), fc=nn.Linear(8, 2)))
    assert frozen_by_trial(comb(model, X)) == ({'a'} if gain - 1 > 1e-9 else set())


def test_a_fault_of_two_groups_together_is_found():
    def run(m, x):
        x = m.a(x).tanh()
        y = m.b(x).tanh()
        return m.fc(y) * (2.0 if hidden_width(x) < 8 and hidden_width(y) < 8 else 1.0)

    model = randomise_(Net(run, a=nn.Linear(3, 8), b=nn.Linear(8, 8), fc=nn.Linear(8, 2)))
    found = comb(model, X)
    assert [g.name for g in found.groups] == ['a']
    assert frozen_by_trial(found) == {'b'}
    check_equal(model, found)


# -- solving for attributes --------------------------------------------------------------------------------------------
HEADS, WIDTH = Attr('attention', 'heads'), Attr('attention', 'width')


def test_what_names_one_attribute_decides_it_before_a_product_does():
    product, attributes = Op('*', HEADS, WIDTH), {HEADS: 4, WIDTH: 8}
    assert solve([(product, 24), (WIDTH, 6)], attributes, []) == ({WIDTH: 6}, [])
    assert solve([(product, 24), (WIDTH, 8)], attributes, []) == ({HEADS: 3}, [])


def test_what_is_decided_is_not_decided_again():
    product, attributes = Op('*', WIDTH, HEADS), {HEADS: 4, WIDTH: 8}
    assert solve([(WIDTH, 6), (product, 12)], attributes, []) == ({WIDTH: 6, HEADS: 2}, [])
    assert solve([(HEADS, 4), (product, 24)], attributes, []) == ({WIDTH: 6}, [])
    assert solve([(WIDTH, 8), (product, 24)], attributes, []) == ({HEADS: 3}, [])
    assert solve([(WIDTH, 6), (HEADS, 4), (product, 12)], attributes, []) == ({WIDTH: 6}, [2])


def test_what_reads_a_width_as_well_decides_no_attribute():
    """A divisor of 2 would do as well: but these are the heads, and the width is what has to change."""
    assert solve([(Op('//', Live(0), HEADS), 6)], {HEADS: 4}, [12]) == ({}, [0])
    assert solve([(Op('//', Live(0), HEADS), 3)], {HEADS: 4}, [12]) == ({}, [])


def test_the_value_of_an_attribute_is_searched_for():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.half, self.a, self.fc = 4, nn.Linear(3, 8), nn.Linear(4, 2)

        def forward(self, x):
            return self.fc(self.a(x).tanh().view(-1, 2 * self.half).chunk(2, 1)[0] ** 2)

    model = randomise_(Half())
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'a': 4}
    keep = found.keep()
    keep['a'][1] = False
    assert slim(model, found, keep).half == 3
    check_equal(model, found)


@pytest.mark.parametrize('groups', [1, 3])
def test_a_transposed_convolution_says_its_own_widths(groups):
    parts = dict(a=nn.Conv2d(3, 6, 1), up=nn.ConvTranspose2d(6, 12, 2, groups=groups), last=nn.Conv2d(12, 2, 1))
    model = randomise_(Net(lambda m, x: m.last(m.up(m.a(x)).relu()), **parts))
    found = comb(model, sample((1, 3, 4, 4)))
    keep = found.keep()
    for kept in keep.values():
        kept[0] = False
    up = slim(model, found, keep).up
    assert (up.in_channels, up.out_channels, up.groups) == ((5, 11, 1) if groups == 1 else (4, 8, 2))
    assert tuple(up.weight.shape[:2]) == (up.in_channels, up.out_channels // up.groups)


# -- sizes in the source -----------------------------------------------------------------------------------------------
class Lines(nn.Module):
    """One call with three literal widths, two of which are pruned apart: torch can work out one of them."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Linear(3, 6), nn.Linear(5, 4), nn.Linear(6, 2)

    def forward(self, x):
        x = self.a(x).tanh().transpose(1, 2)  # (N, 6, 5)
        x = self.b(x).tanh().reshape(2, 6, 4)
        return self.fc(x.sum(2))


def test_a_call_has_one_size_that_torch_works_out():
    model, x = randomise_(Lines()), sample((2, 5, 3))
    found = comb(model, x)
    assert {g.name: g.units for g in found.groups} == {'a': 6, 'b': 4}
    keep = found.keep()
    keep['a'][:2] = keep['b'][0] = False
    (first, second) = sorted(slim(model, found, keep).rewrites, key=lambda r: r.index)
    assert (first.index, first.number, second.index, second.number) == (1, -1, 2, 3)
    check_equal(model, found)


class Repeated(nn.Module):
    """One line that runs with two widths beside a third: only -1 does for those that differ."""

    def __init__(self):
        super().__init__()
        self.lines = nn.ModuleList(nn.Linear(3, 6) for _ in '12')
        self.outs = nn.ModuleList(nn.Linear(6, 2) for _ in '12')

    def forward(self, x):
        y = 0
        for line, out in zip(self.lines, self.outs, strict=True):
            y = y + out(line(x).tanh().reshape(2, 5, 6))
        return y


def test_the_size_that_varies_is_left_to_torch():
    model, x = randomise_(Repeated()), sample((2, 5, 3))
    found = comb(model, x)
    assert {g.name: g.units for g in found.groups} == {'lines.0': 6, 'lines.1': 6}
    keep = found.keep()
    keep['lines.0'][:2] = keep['lines.1'][0] = False
    (rewrite,) = slim(model, found, keep).rewrites
    assert (rewrite.index, rewrite.number) == (2, -1)
    check_equal(model, found)


# -- statistics --------------------------------------------------------------------------------------------------------
def test_one_line_over_two_sets_of_channels_cannot_be_masked():
    """Combing couples or freezes these, so that the two are put into one line by hand."""

    def run(m, x):
        one, other = m.a(x), m.b(x)
        return m.fc(torch.cat([F.softmax(one, -1), F.softmax(other, -1)], -1))

    model = randomise_(Net(run, a=nn.Linear(3, 6), b=nn.Linear(3, 6), fc=nn.Linear(12, 2)))
    found = comb(model, X)
    assert len(found.groups) == 2
    first, second = found.fixes.statistics
    one_line = replace(found.fixes, statistics=(first, replace(second, place=first.place)))
    keep = found.keep()
    mask_(model, found, keep)
    keep['a'][0] = False
    with pytest.raises(SlimError, match='takes statistics over two different sets of 6 channels'):
        mask_(model, replace(found, fixes=one_line), keep)
    assert gap(call(found, masked(model, found, keep)), call(found, slim(model, found, keep))) < 1e-9


class Nested(nn.Module):
    """A module with another one of its own class inside: the same line takes a statistic of both."""

    def __init__(self, inner: nn.Module | None = None):
        super().__init__()
        self.grow, self.back, self.inner = nn.Linear(3, 6), nn.Linear(6, 3), inner

    def forward(self, x):
        x = self.grow(x)
        x = self.back(x / (1 + x.square().mean(-1, keepdim=True)))
        return x if self.inner is None else self.inner(x)


@pytest.mark.parametrize('name', ['grow', 'inner.grow'])
def test_a_masked_module_leaves_those_inside_alone(name):
    model = randomise_(Nested(Nested()))
    found = comb(model, X)
    assert {g.name: g.units for g in found.groups} == {'grow': 6, 'back': 3, 'inner.grow': 6}
    keep = random_keep(found, 0.5, 0, among={name})
    assert gap(call(found, masked(model, found, keep)), call(found, slim(model, found, keep))) < 1e-9
