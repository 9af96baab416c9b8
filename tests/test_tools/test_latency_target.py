"""`--target latency=0.6` of `mmcpd prune` and `mmcpd comb`, and its benchmark in miniature."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.latency_target import chosen, report
from mmcpd.comb import comb
from mmcpd.deploy import layer_times, times_of, with_times
from mmcpd.prune import shares
from tests.test_tools.test_prune import SMALL, dense  # noqa: F401 - a fixture


def clock(layer, widths, threads):
    """Times that are made up, in steps of eight channels."""
    return {each: float(np.prod([-(-width // 8) * 8 for width in each])) / 1e5 for each in widths}


@pytest.fixture(autouse=True)
def made_up(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(layer_times, 'profiled', clock)


def test_prune_says_what_was_promised_predicted_and_measured(tool, tiny, dense, tmp_path):  # noqa: F811
    code, out, err = tool('prune', tiny, dense, '--target', 'latency=0.7', '--threads', 1, *SMALL, '--no-validate')
    assert code == 0, err
    assert 'ms dense on' in out and 'layers take' in out
    assert 'latency: promised 70.0% of the dense model, predicted' in out
    written = json.loads((tmp_path / 'work_dirs' / 'tiny' / 'prune.json').read_text())
    assert written['latency']['predicted'] == written['left']['latency'] <= 0.7
    assert written['latency']['measured'] > 0 and written['reached']
    assert len(list((tmp_path / 'cache' / 'mmcpd').iterdir())) == 1


def test_comb_looks_ahead_to_a_latency(tool, tiny, tmp_path):
    code, out, err = tool('comb', tiny, '--target', 'latency=0.7', '--pictures', 8, '--threads', 1, '--json', 'a.json')
    assert code == 0, err
    found = json.loads((tmp_path / 'a.json').read_text())['preview']
    assert found['left']['latency'] <= 0.7 and f'predicted latency: {found["left"]["latency"]:.1%}' in out


@pytest.mark.parametrize(
    ('arguments', 'line'),
    [
        (('latency=0.01',), r'latency cannot go down to 0\.0100 of the dense model, only to'),
        (('latency=0.7', '--threads', 0), r'threads counts threads of ONNX Runtime, at least 1: got 0'),
        (('macs=0.7', '--threads', 2), 'threads belongs to a target of latency'),
    ],
)
def test_mistakes_are_one_line(tool, tiny, dense, arguments, line):  # noqa: F811
    code, _, err = tool('prune', tiny, dense, '--target', *arguments, *SMALL, '--no-validate')
    last = err.strip().splitlines()[-1]
    assert code and re.search(line, last), err


def test_the_benchmark_compares_at_equal_macs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 1), nn.ReLU(), nn.Conv2d(96, 4, 1)).eval()
    coupling = comb(model, torch.randn(1, 3, 8, 8))
    known = with_times(model, coupling, times_of(model, coupling, threads=1, folder=tmp_path))
    keeps = chosen(known, {g.name: torch.rand(g.units) for g in known.groups}, 0.6)
    left = {name: shares(known, keep) for name, keep in keeps.items()}
    assert all(0.4 < each['macs'] <= 0.6 for each in left.values())
    assert left['latency']['latency'] <= min(left['macs']['latency'], left['any width']['latency']) + 0.02
    row = {'ratio': 0.5, 'ratio_p10': 0.4, 'ratio_p90': 0.6, 'median': 3.0, 'n': 9}
    rows = [{'name': name, 'left': each, **row} for name, each in {'dense': {}, **left}.items()]
    assert report({'net': {'rows': rows}}).splitlines()[-1].split()[:2] == ['net', 'latency']
