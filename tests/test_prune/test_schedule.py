"""When units go and which: the curve, the floors, the smallest choice that reaches the metric."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune.schedule import CURVES, Schedule, check_reachable, reachable, select, share


@pytest.fixture(scope='module')
def net():
    """Three prunable groups: 16, 20 and 6 units."""
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 20, 3, stride=2, padding=1), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(20, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1))
    c = comb(model, torch.randn(1, 3, 8, 8))
    assert {g.name: g.units for g in c.groups} == {'0': 16, '2': 20, '4': 6}
    return c


def scores_of(c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=generator) for g in c.groups}


def live(keep):
    return {name: int(k.sum()) for name, k in keep.items()}


@pytest.mark.parametrize('curve', ['linear', 'cubic', 'cosine'])
def test_curves_fall_from_dense_to_the_target(curve):
    plan = Schedule(begin=0.25, end=0.75, interval=10, target=0.4, curve=curve).resolve(400)
    assert (plan.begin, plan.end) == (100, 300)
    ratios = [plan.ratio(i) for i in range(401)]
    assert ratios[:101] == [1.0] * 101
    assert ratios[300:] == [0.4] * 101
    assert all(a > b for a, b in pairwise(ratios[100:301]))
    halfway = {'linear': 0.7, 'cubic': 0.4 + 0.6 / 8, 'cosine': 0.7}[curve]
    assert ratios[200] == pytest.approx(halfway)


@pytest.mark.parametrize(('interval', 'at'), [(10, [30, 40, 50]), (20, [40, 50]), (99, [50]), (1, [*range(21, 51)])])
def test_due_after_each_interval_and_at_the_end(interval, at):
    plan = Schedule(begin=20, end=50, interval=interval, target=0.5)
    assert [i for i in range(101) if plan.due(i)] == at
    assert plan.events() == len(at)


def test_a_run_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match='from iteration 10 to 200 does not fit into a run of 100'):
        Schedule(begin=0.1, end=200, interval=1, target=0.5).resolve(100)
    with pytest.raises(ValueError, match=r'resolve\(iterations\)'):
        Schedule(begin=0.1, end=200, interval=1, target=0.5).due(3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'target': 0}, 'remains, between 0 and 1: got 0'),
        ({'target': 1.5}, 'got 1.5'),
        ({'target': 1}, 'got 1'),
        ({'interval': 0}, 'at least 1: got 0'),
        ({'interval': 0.5}, 'at least 1: got 0.5'),
        ({'begin': -1}, 'begin is an iteration'),
        ({'end': 1.5}, 'end is an iteration'),
        ({'begin': 50}, 'cannot end at 50'),
        ({'metric': 'flop'}, "unknown metric 'flop'"),
        ({'curve': 'cubik'}, "unknown curve 'cubik': did you mean cubic"),
        ({'curve': 'paper'}, 'units_per_event'),
        ({'units_per_event': 3}, 'units_per_event'),
        ({'curve': 'paper', 'units_per_event': 0}, 'at least 1: got 0'),
    ],
)
def test_arguments_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{'begin': 0, 'end': 50, 'interval': 10, 'target': 0.5, **change})


@pytest.mark.parametrize('metric', ['macs', 'params', 'memory', 'units'])
@pytest.mark.parametrize('ratio', [0.9, 0.5, 0.3])
def test_select_takes_the_fewest_of_the_lowest(net, metric, ratio):
    scores, keep = scores_of(net), net.keep()
    chosen = select(scores, net, keep, ratio, metric)
    assert all(k.all() for k in keep.values()), 'the old keep was changed'
    assert share(net, chosen, metric) <= ratio
    gone = sorted((float(scores[n][u]), n, u) for n, k in chosen.items() for u in (~k).nonzero().flatten().tolist())
    stay = [float(s) for n, k in chosen.items() if k.sum() > 1 for s in scores[n][k]]
    assert max(gone)[0] < min(stay)
    last = gone[-1]
    chosen[last[1]][last[2]] = True
    assert share(net, chosen, metric) > ratio, 'one unit fewer would have done'


def test_select_goes_on_from_a_keep_and_never_brings_a_unit_back(net):
    keep = net.keep()
    for seed, ratio in enumerate((0.9, 0.7, 0.7, 0.4)):
        chosen = select(scores_of(net, seed), net, keep, ratio)
        assert all((chosen[n] <= keep[n]).all() for n in keep)
        keep = chosen
    assert share(net, keep, 'macs') <= 0.4


@pytest.mark.parametrize('ratio', [0.8, 0.5, 0.35])
def test_round_to_holds_at_every_moment(net, ratio):
    keep = select(scores_of(net), net, net.keep(), ratio, round_to=8)
    n = live(keep)
    assert n['0'] % 8 == 0 and n['0'] >= 8
    assert n['2'] in (20, 16, 8), '20 is no multiple: dense, or the multiples below'
    assert 1 <= n['4'] <= 6, 'smaller than 8: one by one'


def test_floors_and_how_far_they_let_it_go(net):
    low = reachable(net, 'units', min_units=4, round_to=8, ignore=('4',))
    assert low == pytest.approx((8 + 8 + 6) / 42)
    keep = select(scores_of(net), net, net.keep(), low, 'units', min_units=4, round_to=8, ignore=('4',))
    assert live(keep) == {'0': 8, '2': 8, '4': 6}
    with pytest.raises(PruneError, match=r'cannot go down to 0\.1000 of the dense model, only to 0\.5238'):
        select(scores_of(net), net, net.keep(), 0.1, 'units', min_units=4, round_to=8, ignore=('4',))
    assert reachable(net, 'units') == pytest.approx(3 / 42), 'one unit stays in each group'
    assert reachable(net, 'units', min_units=7) == pytest.approx((7 + 7 + 6) / 42), 'a small group is left alone'


def test_what_cannot_be_done_is_refused_before_training(net):
    plan = Schedule(0, 100, 10, target=0.05, metric='units')
    with pytest.raises(PruneError, match=r'target=0\.05 of units cannot be reached, only 0\.0714 of the dense'):
        check_reachable(net, plan)
    with pytest.raises(PruneError, match='nothing can be pruned: 3 groups'):
        check_reachable(net, plan, ignore=('*',))
    with pytest.raises(ValueError, match="ignore pattern '22' fits no group: near are"):
        check_reachable(net, plan, ignore=('22',))
    with pytest.raises(ValueError, match='at least 1'):
        check_reachable(net, plan, min_units=0)
    slow = Schedule(0, 100, 10, target=0.5, metric='units', curve='paper', units_per_event=2)
    with pytest.raises(PruneError, match='10 events of 2 units take 20 of 42'):
        check_reachable(net, slow)
    check_reachable(net, Schedule(0, 100, 10, target=0.5, metric='units', curve='paper', units_per_event=3))


def test_paper_takes_a_fixed_number_until_the_target(net):
    plan = Schedule(0, 100, 10, target=0.55, metric='units', curve='paper', units_per_event=5)
    keep, counts = net.keep(), []
    for event in range(6):
        ratio = plan.ratio(10 * event + 10)
        keep = select(scores_of(net, event), net, keep, ratio, 'units', limit=plan.units_per_event)
        counts.append(sum(live(keep).values()))
    assert counts == [37, 32, 27, 23, 23, 23]  # 0.55 of 42 is 23.1


def test_ties_and_repetition_give_the_same_units(net):
    tied = {g.name: torch.zeros(g.units) for g in net.groups}
    first = select(tied, net, net.keep(), 0.5)
    again = select(dict(reversed(tied.items())), net, net.keep(), 0.5)
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_units_that_save_nothing_go_last(net):
    scores = scores_of(net)
    scores['2'] = torch.full((20,), torch.inf)
    keep = select(scores, net, net.keep(), 0.5, 'units')
    assert live(keep) == {'0': 1, '2': 19, '4': 1}


def test_every_curve_is_tested():
    assert set(CURVES) == {'linear', 'cubic', 'cosine', 'paper'}
