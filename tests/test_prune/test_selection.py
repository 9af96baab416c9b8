"""Which units are removed: the floors, and the smallest choice that brings every quantity down."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune.reach import check_reachable
from mmcpd.prune.schedule import LATENCY, QUANTITIES, Schedule
from mmcpd.prune.selection import check_floors, reachable, select, shares

COUNTED = [quantity for quantity in QUANTITIES if quantity != LATENCY]  # without times there is no latency


def combed(*widths):
    layers = [nn.Conv2d(3, widths[0], 3, padding=1), nn.ReLU()]
    for before, width in zip(widths, (*widths[1:], 4), strict=True):
        layers += [nn.Conv2d(before, width, 3, padding=1, stride=1 + (before == widths[0])), nn.ReLU()]
    coupling = comb(nn.Sequential(*layers), torch.randn(1, 3, 8, 8))
    assert [group.units for group in coupling.groups] == list(widths)
    return coupling


@pytest.fixture(scope='module')
def small():
    """Three prunable groups: 16, 20 and 6 units."""
    return combed(16, 20, 6)


@pytest.fixture(scope='module')
def large():
    """Four groups around the size from which chunks are removed: 64, 63, 100 and 8 units."""
    return combed(64, 63, 100, 8)


def scores_of(coupling, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.units, generator=generator) for group in coupling.groups}


def live(keep):
    return [int(kept.sum()) for kept in keep.values()]


@pytest.mark.parametrize('quantity', COUNTED)
@pytest.mark.parametrize('ratio', [0.9, 0.5, 0.3])
def test_select_takes_the_fewest_of_the_lowest(small, quantity, ratio):
    scores, keep = scores_of(small), small.keep()
    chosen = select(scores, small, keep, {quantity: ratio})
    assert all(kept.all() for kept in keep.values()), 'the old keep was changed'
    assert shares(small, chosen)[quantity] <= ratio
    lowest_first = sorted((float(s), n, u) for n in scores for u, s in enumerate(scores[n]))
    expected = small.keep()
    removed = []
    for _, name, unit in lowest_first:  # one by one
        if expected[name].sum() > 1 and shares(small, expected)[quantity] > ratio:
            expected[name][unit] = False
            removed.append((name, unit))
    for name, unit in reversed(removed):  # what need not have gone
        expected[name][unit] = True
        if shares(small, expected)[quantity] > ratio:
            expected[name][unit] = False
    assert all(torch.equal(expected[name], chosen[name]) for name in expected)


@pytest.mark.parametrize('round_to', [1, 8])
@pytest.mark.parametrize('quantity', ['macs', 'params', 'memory'])
def test_a_large_last_chunk_is_made_up_for_by_keeping_smaller_ones(large, quantity, round_to):
    scores = scores_of(large)
    scores[large.groups[-1].name] = torch.full((8,), 0.6)  # after many others have gone
    for ratio in (0.7, 0.5, 0.4):
        chosen = select(scores, large, large.keep(), {quantity: ratio}, round_to=round_to)
        for group in large.groups:
            kept, rounded = chosen[group.name], group.units >= 64
            chunk = round_to if rounded else 1
            assert not rounded or kept.sum() % chunk == 0 or kept.all()
            gone = (~kept).nonzero().flatten()
            if len(gone):
                back = {name: value.clone() for name, value in chosen.items()}
                count = (int(kept.sum()) + chunk) // chunk * chunk - int(kept.sum())
                back[group.name][gone[scores[group.name][gone].argsort(descending=True)][:count]] = True
                assert shares(large, back)[quantity] > ratio, f'{group.name} could have kept {count} more'


@pytest.mark.parametrize('binding', COUNTED)
def test_of_several_targets_each_binds_in_turn(small, binding):
    loose = dict.fromkeys(COUNTED, 0.9)
    alone = select(scores_of(small), small, small.keep(), {binding: 0.4})
    both = select(scores_of(small), small, small.keep(), {**loose, binding: 0.4})
    assert all(torch.equal(alone[name], both[name]) for name in alone)
    less = select(scores_of(small), small, small.keep(), loose)
    assert sum(live(less)) > sum(live(both)) and all(share <= 0.9 for share in shares(small, less).values())


def test_several_targets_remove_what_the_hardest_alone_removes(small):
    ratios = {'macs': 0.35, 'params': 0.45, 'memory': 0.6, 'units': 0.55}
    alone = {quantity: select(scores_of(small), small, small.keep(), {quantity: r}) for quantity, r in ratios.items()}
    chosen = select(scores_of(small), small, small.keep(), ratios)
    counts = {quantity: sum(live(keep)) for quantity, keep in alone.items()}
    assert len(set(counts.values())) > 1 and sum(live(chosen)) == min(counts.values())
    assert all(shares(small, chosen)[quantity] <= ratio for quantity, ratio in ratios.items())


def test_nothing_is_removed_where_the_ratios_hold_already(small):
    keep = select(scores_of(small), small, small.keep(), {'macs': 0.5})
    again = select(scores_of(small, 1), small, keep, {'macs': 0.5, 'units': 1.0})
    assert all(torch.equal(again[name], keep[name]) and again[name] is not keep[name] for name in keep)


def test_select_goes_on_from_a_keep_and_never_brings_a_unit_back(small):
    keep = small.keep()
    for seed, ratio in enumerate((0.9, 0.7, 0.7, 0.4)):
        chosen = select(scores_of(small, seed), small, keep, {'macs': ratio})
        assert all((chosen[n] <= keep[n]).all() for n in keep)
        keep = chosen
    assert shares(small, keep)['macs'] <= 0.4


@pytest.mark.parametrize('ratio', [0.8, 0.5, 0.35, 0.1])
def test_large_groups_keep_a_multiple_of_round_to_at_every_moment(large, ratio):
    first, second, third, fourth = live(select(scores_of(large), large, large.keep(), {'macs': ratio}))
    assert first % 8 == 0 and first < 64, 'at 64: multiples'
    assert second < 63, 'below 64: one by one'
    assert third in range(8, 97, 8), '100 is no multiple: dense, or the multiples below'
    assert 1 <= fourth <= 8


def test_groups_below_64_lose_single_units(large):
    scores = {name: torch.full_like(score, 9.0) for name, score in scores_of(large).items()}
    one, two = large.groups[1].name, large.groups[0].name
    scores[one][5] = scores[two][7] = 0.0
    keep = select(scores, large, large.keep(), {'units': 0.999})
    assert live(keep) == [64, 62, 100, 8] and not keep[one][5]
    keep = select(scores, large, large.keep(), {'units': 0.999}, round_to=1)
    assert live(keep) == [63, 63, 100, 8] and not keep[two][7]


def test_a_group_of_at_most_round_to_units_loses_single_ones(large):
    assert reachable(large, round_to=64)['units'] == pytest.approx((1 + 1 + 64 + 1) / 235)


def test_floors_and_how_far_they_let_it_go(small, large):
    low = reachable(small, min_units=4)
    assert low.keys() == set(COUNTED) and low['units'] == pytest.approx(3 * 4 / 42)
    keep = select(scores_of(small), small, small.keep(), low, min_units=4)
    assert live(keep) == [4, 4, 4] and shares(small, keep) == low
    with pytest.raises(
        PruneError, match=r'units cannot go down to 0\.1000 of the dense model, only to 0\.2857 \(min_u'
    ):
        select(scores_of(small), small, small.keep(), {'macs': 0.9, 'units': 0.1}, min_units=4)
    assert reachable(small)['units'] == pytest.approx(3 / 42), 'one unit of each group remains'
    assert reachable(small, min_units=7)['units'] == pytest.approx((7 + 7 + 6) / 42), 'a small group stays whole'
    assert reachable(large, min_units=9)['units'] == pytest.approx((16 + 9 + 16 + 8) / 235), 'floors are rounded up'


def test_groups_that_the_user_ignores_stay_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 20, 1), nn.ReLU(), nn.Conv2d(20, 4, 1))
    coupling = comb(model, torch.randn(1, 3, 8, 8), ignore=['0'])
    keep = select(scores_of(coupling), coupling, coupling.keep(), {'units': 0.5})
    assert live(keep) == [10] and list(keep) == ['2']


@pytest.mark.parametrize(('name', 'value'), [(n, v) for n in ('min_units', 'round_to') for v in (0, -1, 1.5, True)])
def test_floors_are_checked_before_there_is_a_model(small, name, value):
    floors = {'min_units': 1, 'round_to': 8, name: value}
    for refuse in (lambda: check_floors(**floors), lambda: reachable(small, **floors)):
        with pytest.raises(ValueError, match=f'{name} counts units, at least 1: got {value}'):
            refuse()


def test_what_cannot_be_done_is_refused_before_training(small):
    plan = Schedule({'macs': 0.5, 'units': 0.05}, 0, 100)
    with pytest.raises(PruneError, match=r'units cannot go down to 0\.0500 of the dense model, only to 0\.0714'):
        check_reachable(small, plan)
    with pytest.raises(PruneError, match='nothing can be pruned: 3 groups were found, none above its floor'):
        check_reachable(small, plan, min_units=20)
    with pytest.raises(ValueError, match='at least 1'):
        check_reachable(small, plan, min_units=0)
    message = r'10 events of 2 units leave at least 0\.5238 of units, and its target is 0\.5000: set units_per_event=3'
    with pytest.raises(PruneError, match=message):
        check_reachable(small, Schedule({'units': 0.5}, 0, 100, curve='paper', units_per_event=2))
    check_reachable(small, Schedule({'units': 0.5}, 0, 100, curve='paper', units_per_event=3))
    with pytest.raises(ValueError, match="unknown quantity 'flops'"):
        select(scores_of(small), small, small.keep(), {'flops': 0.5})


def test_paper_takes_a_fixed_number_until_every_target_holds(small):
    plan = Schedule({'units': 0.55, 'macs': 0.9}, 0, 100, 10, curve='paper', units_per_event=5)
    keep, counts = small.keep(), []
    for event in range(6):
        ratios = plan.ratios(10 * event + 10)
        keep = select(scores_of(small, event), small, keep, ratios, limit=plan.units_per_event)
        counts.append(sum(live(keep)))
    assert counts == [37, 32, 27, 23, 23, 23]  # 0.55 of 42 is 23.1


def test_ties_and_repetition_give_the_same_units(small):
    tied = {group.name: torch.zeros(group.units) for group in small.groups}
    first = select(tied, small, small.keep(), {'macs': 0.5})
    again = select(dict(reversed(tied.items())), small, small.keep(), {'macs': 0.5})
    assert all(torch.equal(first[n], again[n]) for n in first)


def test_units_that_save_nothing_are_removed_last(small):
    scores = scores_of(small)
    scores['2'] = torch.full((20,), torch.inf)
    assert live(select(scores, small, small.keep(), {'units': 0.5})) == [1, 19, 1]
