"""When units are removed, and what share of each quantity may remain by then."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mmcpd.prune.schedule import CURVES, Schedule

TARGET = "target names quantities and the share of the dense model's that remains, between 0 and 1: "
EXAMPLE = TARGET + 'target=dict(macs=0.5); got '


@pytest.mark.parametrize('curve', ['linear', 'cubic', 'cosine'])
def test_curves_fall_from_dense_to_each_target(curve):
    plan = Schedule({'macs': 0.4, 'params': 0.8}, begin=0.25, end=0.75, interval=10, curve=curve).resolve(400)
    assert (plan.begin, plan.end) == (100, 300)
    halfway = {'linear': 1 / 2, 'cubic': 1 / 8, 'cosine': 1 / 2}[curve]  # still to go
    for quantity, target in plan.target.items():
        ratios = [plan.ratios(i)[quantity] for i in range(401)]
        assert ratios[:101] == [1.0] * 101
        assert ratios[300:] == [target] * 101
        assert all(a > b for a, b in pairwise(ratios[100:301]))
        assert ratios[200] == pytest.approx(target + (1 - target) * halfway)


def test_every_curve_is_tested():
    assert set(CURVES) == {'linear', 'cubic', 'cosine', 'paper'}  # the last one in test_selection


@pytest.mark.parametrize(('interval', 'at'), [(10, [30, 40, 50]), (20, [40, 50]), (99, [50]), (1, [*range(21, 51)])])
def test_due_after_each_interval_and_at_the_end(interval, at):
    plan = Schedule({'macs': 0.5}, begin=20, end=50, interval=interval)
    assert [i for i in range(101) if plan.due(i)] == at
    assert plan.events() == len(at)


def test_begin_may_be_an_iteration_where_end_is_a_share():
    plan = Schedule({'macs': 0.5}).resolve(1000)
    assert (plan.begin, plan.end, plan.interval) == (0, 600, 10)
    assert Schedule({'macs': 0.5}, end=1.0).resolve(1000).end == 1000


def test_a_run_of_unknown_or_too_small_length_is_refused():
    with pytest.raises(ValueError, match='from iteration 10 to 200 does not fit into a run of 100'):
        Schedule({'macs': 0.5}, begin=0.1, end=200).resolve(100)
    plan = Schedule({'macs': 0.5}, begin=0.1, end=200)
    for ask in (plan.span, plan.events, lambda: plan.due(3), lambda: plan.ratios(3)):
        with pytest.raises(ValueError, match=r'begin=0\.1 and end=200 hold a share.*schedule\.resolve\(iterations\)'):
            ask()


def test_the_target_is_a_copy():
    target = {'macs': 0.5}
    plan = Schedule(target)
    target['macs'] = 7
    assert plan.target == {'macs': 0.5}


@pytest.mark.parametrize(
    ('target', 'message'),
    [
        (0.5, EXAMPLE + '0.5'),
        (None, EXAMPLE + 'None'),
        ('macs', EXAMPLE + "'macs'"),
        ({}, EXAMPLE + '{}'),
        ({'macs': 0}, EXAMPLE + "{'macs': 0}"),
        ({'macs': 0.0}, EXAMPLE + "{'macs': 0.0}"),
        ({'macs': 1}, EXAMPLE + "{'macs': 1}"),
        ({'macs': 1.0}, EXAMPLE + "{'macs': 1.0}"),
        ({'macs': 1.5}, EXAMPLE + "{'macs': 1.5}"),
        ({'macs': -0.5}, EXAMPLE + "{'macs': -0.5}"),
        ({'macs': float('nan')}, EXAMPLE + "{'macs': nan}"),
        ({'macs': True}, EXAMPLE + "{'macs': True}"),
        ({'macs': '0.5'}, EXAMPLE + "{'macs': '0.5'}"),
        ({'macs': 0.5, 'params': 2.0}, EXAMPLE + "{'macs': 0.5, 'params': 2.0}"),
        ({'mac': 0.5}, "unknown quantity 'mac': did you mean macs, latency?"),
    ],
)
def test_a_bad_target_is_refused_in_one_sentence(target, message):
    with pytest.raises(ValueError) as error:
        Schedule(target)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'interval': 0}, 'at least 1: got 0'),
        ({'interval': 0.5}, 'at least 1: got 0.5'),
        ({'interval': True}, 'at least 1: got True'),
        ({'begin': -1}, 'begin is an iteration'),
        ({'begin': False}, 'begin is an iteration'),
        ({'end': 1.5}, 'end is an iteration'),
        ({'end': float('nan')}, 'end is an iteration'),
        ({'end': '50'}, "got '50'"),
        ({'end': 1}, 'write 1.0 for the whole run'),
        ({'begin': 50}, 'cannot end at 50'),
        ({'begin': 0.7, 'end': 0.6}, 'begins at 0.7, so it cannot end at 0.6'),
        ({'curve': 'cubik'}, "unknown curve 'cubik': did you mean cubic"),
        ({'curve': 'paper'}, 'units_per_event'),
        ({'units_per_event': 3}, 'units_per_event'),
        ({'curve': 'paper', 'units_per_event': 0}, 'at least 1: got 0'),
    ],
)
def test_arguments_that_make_no_sense(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**{'target': {'macs': 0.5}, 'begin': 0, 'end': 50, **change})
