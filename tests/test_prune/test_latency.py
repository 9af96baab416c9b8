"""Latency as a target: with made-up times in steps, units go where they buy time, and stay where they buy none."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.cost import Cost, LatencyModel, StepTable, TimedLayer, WidthGrid
from mmcpd.errors import PruneError
from mmcpd.prune import (
    Pruner,
    Schedule,
    check_reachable,
    default_normalizer,
    few_events,
    normalize,
    reachable,
    select,
    shares,
)
from mmcpd.prune.reach import least_left
from mmcpd.slim import slim
from mmcpd.slim.compare import compare

FLOORS = {'min_units': 1, 'round_to': 1}


class Net(nn.Module):
    """Two chains of layers whose widths are free: 24 and 40 channels, then 20 of a product."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 24, 3), nn.Conv2d(24, 40, 1)
        self.hidden, self.last = nn.Linear(40, 20), nn.Linear(20, 5)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu().mean((2, 3))
        return self.last(self.hidden(x).relu())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().eval()


IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def layer(coupling, name, step, ms, dense):
    """A layer whose time is linear in one group's width, in steps."""
    start = coupling.start[name]
    own = set(range(start, start + dense))
    axis = next(i for i, units in enumerate(coupling.axes) if set(units.tolist()) == own)
    points = (*range(step, dense, step), dense)
    return TimedLayer(StepTable((WidthGrid(points, step),), tuple(ms * p / dense for p in points)), (axis,))


def timed(coupling, step=8, first=6.0, second=2.0, hidden=0.0, rest=0.0):
    layers = (
        layer(coupling, 'first', step, first, 24),
        layer(coupling, 'second', step, second, 40),
        layer(coupling, 'hidden', step, hidden, 20),
    )
    model = LatencyModel(first + second + hidden + rest, layers)
    return replace(coupling, cost_model=replace(coupling.cost_model, latency=model))


def even(coupling):
    return {g.name: torch.arange(g.units, dtype=torch.float64) for g in coupling.groups}


def widths(keep):
    return {name: int(kept.sum()) for name, kept in keep.items()}


def test_a_step_is_a_step_and_nothing_is_slower_than_what_is_wider():
    table = StepTable((WidthGrid((4, 8, 16), 4),), (5.0, 1.0, 3.0))  # 4 channels are slower than 8
    assert [table((w,)) for w in (16, 13, 12, 9, 8, 5, 4, 1)] == [3, 3, 2, 2, 1, 1, 1, 1]
    two = StepTable((WidthGrid((8, 16), 8), WidthGrid((2, 4), 1)), (1.0, 2.0, 3.0, 6.0))
    assert (two((16, 4)), two((9, 3)), two((8, 3)), two((1, 1))) == (6, 4.5, 1.5, 1)


@pytest.mark.parametrize(
    ('grids', 'times'),
    [(((8, 4), 4), (1.0, 2.0)), (((4, 8), 0), (1.0, 2.0)), (((4, 8), 4), (1.0,)), (((4, 8), 4), (1.0, -2.0))],
)
def test_a_table_that_does_not_fit_its_grid_is_refused(grids, times):
    with pytest.raises(ValueError, match='does not fit a grid'):
        StepTable((WidthGrid(*grids),), times)


def test_the_dense_model_takes_what_was_measured(net):
    coupling = comb(net, IMAGES)
    for rest in (0.0, 3.0, -2.0):  # layers that take longer alone than the whole file are scaled to it
        model = timed(coupling, rest=rest)
        assert model.cost(model.keep()).latency == pytest.approx(8 + rest)
    assert coupling.cost(coupling.keep()).latency == 0 and 'latency' not in shares(coupling, coupling.keep())


def test_units_that_buy_no_time_are_kept(net):
    coupling = comb(net, IMAGES)
    model = timed(coupling, rest=1.0)
    for ratio in (0.9, 0.7, 0.45):
        scores = normalize(even(coupling), model, model.keep(), by='latency')
        keep = select(scores, model, model.keep(), {'latency': ratio}, **FLOORS)
        assert shares(model, keep)['latency'] <= ratio
        found = widths(keep)
        assert found['first'] % 8 == 0 and found['second'] % 8 == 0 and found['hidden'] == 20
        # the control: by MACs, widths end between the steps
        plain = normalize(even(coupling), coupling, coupling.keep(), by='macs')
        blind = widths(select(plain, model, model.keep(), {'macs': ratio}, **FLOORS))
        assert any(blind[name] % 8 for name in ('first', 'second')) or blind['hidden'] < 20


def test_units_go_where_they_buy_time(net):
    coupling = comb(net, IMAGES)
    for slow, fast in (('first', 'second'), ('second', 'first')):
        model = timed(coupling, **{slow: 9.0, fast: 1.0})
        scores = normalize({n: torch.rand(len(s)) + 1 for n, s in even(coupling).items()}, model, model.keep(),
                           by='latency')  # fmt: skip
        left = widths(select(scores, model, model.keep(), {'latency': 0.6}, **FLOORS))
        dense = widths(model.keep())
        assert left[slow] / dense[slow] < 0.65 and left[fast] == dense[fast]


def test_masked_is_slimmed_at_a_latency_target(net):
    coupling = comb(net, IMAGES)
    model = timed(coupling)
    scores = normalize(even(coupling), model, model.keep(), by='latency')
    keep = select(scores, model, model.keep(), {'latency': 0.5}, **FLOORS)
    assert compare(net, model, keep) < 1e-10
    other = {**keep, 'first': ~keep['first']}  # the control: the slim model of other units
    assert compare(net, model, keep, slim(net, model, other)) > 1e-3


def test_a_target_below_reach_is_refused_in_one_line(net):
    model = timed(comb(net, IMAGES), rest=1.0, hidden=1.0)
    lowest = reachable(model, **FLOORS)['latency']
    check_reachable(model, Schedule({'latency': lowest + 0.01}, 0, 10), **FLOORS)
    with pytest.raises(PruneError, match=f'latency cannot go down to .* only to {lowest:.4f}') as error:
        check_reachable(model, Schedule({'latency': lowest - 0.01}, 0, 10), **FLOORS)
    assert '\n' not in str(error.value)


def test_latency_without_times_is_refused(net):
    coupling = comb(net, IMAGES)
    for refused in (
        lambda: select(even(coupling), coupling, coupling.keep(), {'latency': 0.5}),
        lambda: check_reachable(coupling, Schedule({'latency': 0.5}, 0, 10)),
        lambda: normalize(even(coupling), coupling, coupling.keep(), by='latency'),
    ):
        with pytest.raises(ValueError, match=r'were not timed.*with_latency'):
            refused()


def test_remain_holds_with_a_latency_target(net):
    model = timed(comb(net, IMAGES))
    scores = normalize({**even(model), 'second': torch.full((40,), 1e3)}, model, model.keep(), by='latency')
    free = select(scores, model, model.keep(), {'latency': 0.6}, **FLOORS)
    keep = select(scores, model, model.keep(), {'latency': 0.6}, remain={'first': 0.6}, **FLOORS)
    assert int(free['first'].sum()) < 15 <= int(keep['first'].sum())
    assert shares(model, keep)['latency'] <= 0.6


def test_events_of_the_paper_are_counted_for_latency_too(net):
    model = timed(comb(net, IMAGES))
    schedule = Schedule({'latency': 0.4}, 0, 10, 10, 'paper', 1)
    assert 'units_per_event' in few_events(model, schedule, FLOORS)
    left = least_left(model, model.keep(), 1, 1, FLOORS)
    assert left['latency'] == pytest.approx(reachable(model, **FLOORS)['latency']) and left['units'] < 1


def test_a_pruner_reaches_a_latency_target_in_training(net):
    net = net.float()
    images = IMAGES.float()
    model = timed(comb(net, images))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    schedule = Schedule({'latency': 0.5}, 0, 12, 2)
    pruner = Pruner(net, model, optimizer, schedule, normalize='latency', **FLOORS)
    for _ in range(12):
        optimizer.zero_grad()
        net(images).square().mean().backward()
        optimizer.step()
        pruner.step()
        assert all(n % 8 == 0 or n == 20 for n in widths(pruner.keep).values())
    assert pruner.left()['latency'] <= 0.5 < pruner.left()['units']


def test_time_is_what_scores_are_divided_by():
    assert default_normalizer({'latency': 0.5, 'macs': 0.5}, 'memory') == 'latency'
    assert default_normalizer({'macs': 0.5}, 'memory') == 'memory'


def test_what_saves_nothing_is_worth_most(net):
    model = timed(comb(net, IMAGES))
    found = normalize({n: torch.ones(len(s)) for n, s in even(model).items()}, model, model.keep(), by='latency')
    assert found['hidden'].isinf().all() and found['first'].isfinite().all()
    assert float(found['first'][0]) == pytest.approx(16 / 4)  # 16 units save 4 of 6 ms
    assert float(found['second'][0]) == pytest.approx(16 / 0.8)


def test_latency_is_no_whole_number_and_is_not_cut_to_one():
    cost = Cost(1, 2, 3, 0.7)
    assert (cost['macs'], cost['memory'], cost.latency) == (1, 3, 0.7)
    with pytest.raises(KeyError, match='latency'):
        cost['latency']
