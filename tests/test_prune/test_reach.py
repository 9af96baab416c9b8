"""A schedule that cannot reach its target is refused before training, and again where a run goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune import Schedule, few_events, select, shares
from mmcpd.prune.reach import check_reachable, check_resumed, least_left, units_on_the_way
from mmcpd.prune.schedule import CURVES, LATENCY, QUANTITIES
from tests.test_prune.test_pruner import built, train
from tests.test_prune.test_selection import combed, scores_of

COUNTED = [quantity for quantity in QUANTITIES if quantity != LATENCY]  # without times there is no latency

FLOORS = {'min_units': 1, 'round_to': 8}


@pytest.fixture(scope='module')
def coupling():
    return combed(16, 20, 6)


def paper(quantity, target, units, events=10):
    return Schedule({quantity: target}, 0, 10 * events, 10, curve='paper', units_per_event=units)


@pytest.mark.parametrize('quantity', COUNTED)
def test_too_few_units_or_events_are_refused_for_every_quantity_and_enough_are_not(coupling, quantity):
    with pytest.raises(
        PruneError, match=rf'1 units leave at least 0\.\d+ of {quantity}, and its target is 0\.3000: set'
    ) as error:
        check_reachable(coupling, paper(quantity, 0.3, 1, events=5))
    enough = int(str(error.value).partition('units_per_event=')[2].split()[0])
    check_reachable(coupling, paper(quantity, 0.3, enough, events=5))
    assert few_events(coupling, paper(quantity, 0.3, enough, events=5), FLOORS) == ''
    keep = coupling.keep()
    for _ in range(5):  # the advice is true where units go evenly
        even = {name: torch.linspace(0, 1, len(kept)) for name, kept in keep.items()}
        keep = select(even, coupling, keep, {quantity: 0.3}, limit=enough)
    assert shares(coupling, keep)[quantity] <= 0.3


@pytest.mark.parametrize('quantity', COUNTED)
def test_no_choice_of_units_goes_below_the_bound(coupling, quantity):
    for number in (3, 7, 12):
        least = least_left(coupling, coupling.keep(), number, 1, FLOORS)[quantity]
        for seed in range(5):
            keep = coupling.keep()
            chosen = torch.randperm(42, generator=torch.Generator().manual_seed(seed))
            for unit in [u for u in chosen.tolist() if u not in (0, 16, 36)][:number]:
                name = '0' if unit < 16 else '2' if unit < 36 else '4'
                keep[name][unit - {'0': 0, '2': 16, '4': 36}[name]] = False
            assert shares(coupling, keep)[quantity] >= least - 1e-9
    assert least_left(coupling, coupling.keep(), 12, 1, FLOORS)['units'] == pytest.approx(30 / 42)
    assert least_left(combed(64, 6), combed(64, 6).keep(), 2, 1, FLOORS)['units'] == pytest.approx(54 / 70)


def test_a_run_that_may_fall_short_is_allowed_and_said(coupling):
    plan = next(p for p in (paper('macs', 0.4, n, events=4) for n in range(1, 12)) if _allowed(coupling, p))
    assert 'may end before its target: 4 events of' in few_events(coupling, plan, FLOORS)
    assert few_events(coupling, Schedule({'macs': 0.4}, 0, 10), FLOORS) == ''


def _allowed(coupling, plan):
    try:
        check_reachable(coupling, plan)
    except PruneError:
        return False
    return True


@pytest.mark.parametrize('curve', [name for name in CURVES if name != 'paper'])
def test_a_run_that_goes_on_behind_the_end_of_its_schedule_is_refused_unless_it_is_at_its_target(coupling, curve):
    plan = Schedule({'macs': 0.5}, 0, 10, 2, curve=curve)
    partly = select(scores_of(coupling), coupling, coupling.keep(), {'macs': 0.7})
    check_resumed(coupling, plan, partly, 9, FLOORS)
    check_resumed(coupling, plan, partly, 10, FLOORS, waiting=True)
    with pytest.raises(
        PruneError, match=r'no unit is removed any more: 10 iterations are finished .* Set end=11 or later'
    ):
        check_resumed(coupling, plan, partly, 10, FLOORS)
    check_resumed(coupling, plan, select(scores_of(coupling), coupling, partly, {'macs': 0.5}), 10, FLOORS)


def test_events_that_are_left_are_counted():
    plan = Schedule({'macs': 0.5}, 4, 15, 4)  # at 8, 12 and 15
    assert [plan.events(i) for i in (0, 4, 7, 8, 11, 12, 14, 15, 99)] == [3, 3, 3, 2, 2, 1, 1, 0, 0]
    for iteration in range(20):
        assert plan.events(iteration) == sum(plan.due(i) for i in range(iteration + 1, 30))


def test_a_paper_run_that_goes_on_with_too_few_events_is_refused(coupling):
    half = select(scores_of(coupling), coupling, coupling.keep(), {'units': 0.8})
    check_resumed(coupling, paper('units', 0.5, 3), half, 30, FLOORS)
    with pytest.raises(PruneError, match='2 events of 3 units leave at least 0'):
        check_resumed(coupling, paper('units', 0.5, 3), half, 80, FLOORS)


def test_a_pruner_refuses_a_state_that_its_schedule_cannot_bring_to_the_target():
    model, optimizer, pruner = built()
    train(model, optimizer, pruner, 0, 8)
    state = pruner.state_dict()
    assert pruner.left()['macs'] > 0.5
    _, _, shorter = built(begin=1, end=8)
    with pytest.raises(PruneError, match='8 iterations are finished and pruning ends at 8'):
        shorter.load_state_dict(state)
    _, _, same = built()
    same.load_state_dict(state)


def test_units_on_the_way_is_what_an_even_choice_removes(coupling):
    assert units_on_the_way(coupling, {'units': 0.5}, coupling.keep(), FLOORS) == 21
    assert units_on_the_way(coupling, {'units': 0.99999}, coupling.keep(), FLOORS) == 1


@pytest.mark.parametrize(
    ('widths', 'stride', 'seed', 'without'),
    [((8, 8, 64), 1, 54, 0.445), ((64, 64, 128, 64), 2, 115, 0.49)],
    ids=['fewer', 'equal'],
)
def test_a_smaller_chunk_goes_where_the_last_one_would_overshoot(monkeypatch, widths, stride, seed, without):
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, stride if layers else 1, 1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))
    found, generator = comb(net, torch.rand(1, 3, 8, 8)), torch.Generator().manual_seed(seed)
    scores = {}
    for group in found.groups:
        raw = torch.rand(group.units, generator=generator)
        scores[group.name] = raw * (0.2 + torch.rand((), generator=generator))

    def chosen():
        return shares(found, select(scores, found, found.keep(), {'macs': 0.5}))['macs']

    assert 0.49 < chosen() <= 0.5
    monkeypatch.setattr('mmcpd.prune.selection._Search._smaller', lambda self, removed: removed[-1])
    assert chosen() < without
