"""Latency: paired, alternating, as long as asked; no test here depends on how fast the machine is."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch import nn

from mmcpd.deploy import export_onnx, latency, measure_latency


@pytest.fixture(scope='module')
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp('onnx')
    torch.manual_seed(0)
    heavy = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 3, 3))
    light = nn.Conv2d(3, 3, 1)
    x = torch.randn(1, 3, 64, 64)
    models = {'heavy': heavy, 'light': light}
    return {name: export_onnx(model, x, folder / f'{name}.onnx', opset=17) for name, model in models.items()}, x


def test_it_compares_with_the_first(paths):
    files, x = paths
    heavy, light = measure_latency(files, x, n=15, warmup=2, threads=1)
    assert (heavy.name, light.name) == ('heavy', 'light')
    assert (heavy.n, heavy.threads, light.n, light.threads) == (15, 1, 15, 1)
    assert heavy.ratio == heavy.ratio_p10 == heavy.ratio_p90 == 1
    assert light.ratio < 0.5  # a thousandth of the work
    assert light.median <= light.p90
    other, same = measure_latency(dict(reversed(files.items())), x, n=15, warmup=2, threads=1)
    assert (other.name, other.ratio) == ('light', 1)
    assert same.ratio > 2


class FakeSession:
    """Take a set number of milliseconds of a clock that nothing else moves."""

    def __init__(self, name, clock):
        self.name, self.clock, self.log = name, clock, clock['log']

    def run(self, *_):
        self.log.append(self.name)
        self.clock['now'] += {'dense': 4_000_000, 'slim': 1_000_000}[self.name]


@pytest.fixture
def clock(monkeypatch):
    state = {'now': 0, 'log': []}
    monkeypatch.setattr(latency, 'open_session', lambda path, threads: FakeSession(path, state))
    monkeypatch.setattr(latency, 'feed', lambda session, inputs: {})
    monkeypatch.setattr(time, 'perf_counter_ns', lambda: state['now'])
    monkeypatch.setattr(time, 'perf_counter', lambda: state['now'] / 1e9)
    return state


FILES = {'dense': 'dense', 'slim': 'slim'}


def test_runs_alternate_and_their_order_turns_round(clock):
    dense, slim = measure_latency(FILES, torch.zeros(1), n=4, warmup=1, threads=2)
    assert clock['log'] == ['dense', 'slim'] + ['dense', 'slim', 'slim', 'dense'] * 2
    assert (dense.median, dense.mean, slim.median, slim.p90, slim.ratio) == (4, 4, 1, 1, 0.25)


def test_a_time_limit_ends_it(clock):
    seen = []
    dense, _ = measure_latency(
        FILES,
        torch.zeros(1),
        n=1000,
        time_limit=0.05,
        warmup=3,
        progress=lambda done, total, left: seen.append((done, total, round(left, 4))),
    )
    assert dense.n == 10  # 5 ms a round, warm-up apart
    assert seen[0] == (1, 1000, 0.045)
    assert seen[-1] == (10, 1000, 0.0)
    assert measure_latency(FILES, torch.zeros(1), n=9, time_limit=1e-9)[0].n == 1  # one round at least


def test_progress_tells_the_time_left_by_the_rounds(clock):
    seen = []
    measure_latency(FILES, torch.zeros(1), n=4, progress=lambda *state: seen.append(state[2]))
    assert np.allclose(seen, [0.015, 0.010, 0.005, 0.0])


def test_summaries_are_paired():
    times = np.array([[10.0, 5.0], [20.0, 5.0], [40.0, 30.0]])
    first, second = latency._summaries(['a', 'b'], times, threads=3)
    assert (first.median, second.median) == (20, 5)
    assert second.ratio == 0.5  # of 0.5, 0.25 and 0.75, not 5 / 20
    assert second.mean == pytest.approx(40 / 3)
    assert second.p90 == pytest.approx(25)


@pytest.mark.parametrize('wrong', [dict(n=0), dict(warmup=-1), dict(threads=0), dict(paths={})])
def test_wrong_arguments_are_named(clock, wrong):
    with pytest.raises(ValueError, match='nothing to measure'):
        measure_latency(**{'paths': FILES, 'inputs': torch.zeros(1), **wrong})


def test_the_default_is_a_thread_per_core(clock, monkeypatch):
    monkeypatch.setattr(latency, 'usable_cores', lambda: 7)
    assert measure_latency(FILES, torch.zeros(1), n=1)[0].threads == 7
