"""The fuzz of random nets in miniature: nothing is wrong, and what is broken is found and made short."""

from __future__ import annotations

import pytest

pytest.importorskip('torchvision')

from benchmarks import fuzz
from benchmarks.fuzz_nets import BLOCKS, plan_of
from mmcpd.comb import comb


@pytest.mark.parametrize('seed', [11, 12, 13])
def test_random_nets_are_slimmed_exactly(seed):
    found = fuzz.run(60, seed, None, shrink=False)
    assert found['operations'] >= 60
    assert (found['wrong'], found['controls_that_differ'], found['controls']) == (0, found['nets'], found['nets'])


def test_a_mask_that_does_nothing_is_found_and_made_short(monkeypatch):
    plan = [('Conv', 1), ('Residual', 2), ('Glu', 3), ('Excite', 4)]
    assert not fuzz.attempt(plan).wrong
    monkeypatch.setattr('mmcpd.slim.compare.mask_', lambda model, coupling, keep: None)
    monkeypatch.setattr('benchmarks.fuzz.comb', lambda net, x, **_: comb(net, x, trial=False))
    assert 'outputs differ' in fuzz.attempt(plan).wrong
    assert len(fuzz.shrunk(plan, 'wrong')) == 1


def test_whatever_a_net_raises_is_a_finding(monkeypatch):
    monkeypatch.setattr('benchmarks.fuzz.comb', lambda *_, **__: 1 / 0)
    assert fuzz.attempt([('Conv', 0)]).wrong == 'ZeroDivisionError: division by zero'


def test_every_block_is_drawn():
    drawn = {name for seed in range(600) for name, _ in plan_of(seed, 8)}
    assert drawn == set(BLOCKS)
