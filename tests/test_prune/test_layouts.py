"""Where the samples of a batch lie is found by changing one of them, or the reason is told."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.prune import score
from mmcpd.prune.importance import build_importance
from mmcpd.prune.layouts import CONSTANT, FIRST, MIXED, Layout, find_layouts
from tests.helpers import Net
from tests.test_prune.gate_nets import ConvBNReLU, built
from tests.test_prune.layer_nets import TokensFirst


def test_where_samples_lie():
    net, coupling, _, _ = built(TokensFirst)
    gates = build_importance('gauss_newton', coupling.groups).gates
    found = {cut.tensor: layout for cut, layout in find_layouts(net, gates, coupling.example).items()}
    assert found == {'b.weight': Layout(1), 'c.weight': Layout(0, inner=True)}
    net, coupling, _, _ = built(ConvBNReLU)
    gates = build_importance('gauss_newton', coupling.groups).gates
    assert set(find_layouts(net, gates, coupling.example).values()) == {FIRST}


def layouts_of(net, coupling):
    return find_layouts(net, build_importance('gauss_newton', coupling.groups).gates, coupling.example)


def test_samples_that_change_one_another_are_counted_as_one_and_that_is_said():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 4, 3))
    x = torch.randn(2, 3, 8, 8)
    coupling = comb(net.eval(), x)
    assert set(layouts_of(net, coupling).values()) == {MIXED}
    with pytest.warns(UserWarning, match=r"where '3\.weight' is used: samples of a batch change one another") as seen:
        score(net, coupling, [x, x])
    assert len(seen) == 1


def test_why_no_larger_batch_runs_is_said():
    def run(m, x):
        return m.b(m.a(x).view(2, -1).tanh())

    net = Net(run, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    x = torch.randn(2, 3)
    coupling = comb(net, x)
    why = r'takes no batch of twice its example \(RuntimeError: .*shape'
    with pytest.warns(UserWarning, match=rf"counts each batch as one sample where 'b\.weight' is used: .*{why}"):
        assert float(score(net, coupling, [x])['a'].min()) > 0
    with pytest.raises(ValueError, match=rf"cannot tell samples apart where 'b\.weight' is used: .*{why}"):
        build_importance('group_fisher', coupling.groups).check(net, coupling.example)


@pytest.mark.parametrize('error', [torch.cuda.OutOfMemoryError, KeyboardInterrupt, TypeError])
def test_what_is_no_refusal_of_a_larger_batch_is_raised(error):
    def run(m, x):
        if len(x) > 2:
            raise error('here')
        return m.b(m.a(x).tanh())

    net = Net(run, a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    coupling = comb(net, torch.randn(2, 3))
    with pytest.raises(error, match='here'):
        layouts_of(net, coupling)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass(frozen=True)
class Held:
    x: torch.Tensor
    name: str = 'a'
    both: Pair | None = None


def test_inputs_of_any_form_are_doubled():
    x = torch.randn(2, 3)
    net = Net(lambda m, x: m.b(m.a(x.both.x + x.both.y + x.x).tanh()), a=nn.Linear(3, 6), b=nn.Linear(6, 2))
    coupling = comb(net, (Held(x, both=Pair(x, x)),))
    assert set(layouts_of(net, coupling).values()) == {FIRST}


def test_a_table_that_no_input_changes_is_no_reason_to_warn():
    def run(m, x):
        return m.b(m.a(x).tanh()) * m.d(m.c(x.new_ones(1, 3)).tanh())

    parts = {name: nn.Linear(*size) for name, size in zip('abcd', [(3, 6), (6, 2)] * 2, strict=True)}
    net, x = Net(run, **parts), torch.randn(2, 3)
    coupling = comb(net, x)
    assert {cut.tensor: at for cut, at in layouts_of(net, coupling).items()} == {
        'b.weight': FIRST,
        'd.weight': CONSTANT,
    }
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        score(net, coupling, [x])
    with pytest.raises(ValueError, match=r"'d\.weight' is used: its activations are the same for all inputs"):
        build_importance('group_fisher', coupling.groups).check(net, coupling.example)
