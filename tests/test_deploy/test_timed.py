"""Layers are timed once, each at a few widths, remembered by machine, and say what a slim file will take."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.comb import comb
from mmcpd.cost import StepTable, WidthGrid
from mmcpd.deploy import Promise, Times, promise_of, timed, times_of, with_latency, with_times
from mmcpd.deploy.layer_graphs import layer_graph
from mmcpd.deploy.layer_times import time_layers
from mmcpd.deploy.layers import Layer, LayerKind, layers_of
from mmcpd.deploy.times import Machine, cache_folder, remember, remembered
from mmcpd.prune import select, shares
from mmcpd.slim import slim

IMAGES = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
MACHINE = Machine('a cpu', 4, '1.0', 1)


class Unusual(nn.Module):
    """It pads in its own forward, calls F.linear, shares a layer, attends as a function, and convolves back."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2)
        self.depth = nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32)
        self.shared = nn.Conv2d(32, 32, 1)
        self.grouped = nn.Conv2d(32, 48, 1, groups=4)
        self.back = nn.ConvTranspose2d(48, 24, 2, stride=2)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.weight = nn.Parameter(torch.randn(10, 24))

    def forward(self, x):
        x = self.depth(self.stem(F.pad(x, (1, 1, 1, 1))).relu()).relu()
        x = self.back(self.grouped(self.shared(self.shared(x).relu()).relu()).relu())
        x = x.flatten(2).transpose(1, 2)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return F.linear(x.mean(1), self.weight)


@pytest.fixture(scope='module')
def combed():
    torch.manual_seed(0)
    model = Unusual().eval()
    return model, comb(model, IMAGES)


class Clock:
    """Times that are made up: a microsecond for each multiply of weights, in steps of eight; it notes what it times."""

    def __init__(self):
        self.layers = []

    def __call__(self, layer, widths, threads):
        self.layers.append(layer.key)
        stepped = {each: tuple(-(-width // 8) * 8 for width in each) for each in widths}
        return {each: float(np.prod(stepped[each])) / 1000 for each in widths}


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(timed, '_dense', lambda *_: 1000.0)
    return Clock()


def test_every_term_of_the_macs_is_a_layer_whose_widths_are_its_axes(combed):
    model, coupling = combed
    seen = layers_of(model, coupling)
    assert len(seen) == len(coupling.cost_model.macs) == 11
    keep = coupling.keep()
    for group in coupling.groups:
        keep[group.name][: group.units // 2] = False
    live = coupling.live(keep)
    small = {layer.sizes for layer, _ in _ran(slim(model, coupling, keep), coupling)}
    for each in seen:
        *rest, last = each.layer.at(live[list(each.axes)].tolist()).sizes
        assert (*rest, last) in small or (*rest, last // 3) in small  # a slim attention projects one by one
    assert any(each.layer.sizes not in small for each in seen)  # the control
    assert {each.layer.kind for each in seen} == set(LayerKind)


def _ran(model, coupling):
    from mmcpd.deploy.layers import _Seen

    with torch.no_grad(), _Seen() as seen:
        coupling.example.run(model)
    return seen.layers


def test_each_layer_runs_in_onnxruntime_at_its_dense_and_at_narrow_widths(combed):
    model, coupling = combed
    for each in layers_of(model, coupling):
        for widths in (each.layer.widths, tuple(max(1, width // 3) for width in each.layer.widths)):
            file, fed = layer_graph(each.layer.at(widths))
            (out,) = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider']).run(None, dict(fed))
            assert np.isfinite(out).all()


def test_convolution_groups_go_whole_or_all_become_narrower():
    layer = Layer(LayerKind.CONVOLUTION, (64, 8, 1), (0,), groups=8)
    assert (layer.at((32,)).sizes[0], layer.at((32,)).groups) == (32, 4)
    inside = replace(layer, live=(0, 1)).at((32, 4))
    assert (inside.sizes, inside.groups) == ((32, 4, 1), 8)


def test_layers_of_one_shape_are_timed_once_and_found_steps_are_those_of_the_clock(combed, clock):
    model, coupling = combed
    layers = [each.layer for each in layers_of(model, coupling)]
    tables = time_layers(layers, 1, timer=clock)
    assert len(clock.layers) == len(set(clock.layers)) == len(tables) < len(layers)
    wide = Layer(LayerKind.PRODUCT, (1, 64, 128), (1, 2))
    (table,) = time_layers([wide], 1, timer=clock).values()
    assert [grid.step for grid in table.grids] == [8, 8]
    assert table((57, 128)) == table((64, 128)) > table((56, 128))

    def smooth(layer, widths, threads):
        return {each: float(np.prod(each)) for each in widths}

    (table,) = time_layers([wide], 1, timer=smooth).values()
    assert [grid.step for grid in table.grids] == [1, 1] and table((57, 128)) == pytest.approx(57 * 128)


def test_a_time_limit_leaves_the_smaller_layers_untimed_and_says_so(combed, clock, tmp_path):
    model, coupling = combed
    times = times_of(model, coupling, threads=1, folder=tmp_path, time_limit=-1.0, timer=clock)
    largest = max(layers_of(model, coupling), key=lambda each: each.macs)
    assert list(times.tables) == [largest.layer.key]
    assert 'were not timed' in timed.in_words(model, coupling, times)
    whole = times_of(model, coupling, threads=1, folder=tmp_path, timer=clock)
    assert 'not timed' not in timed.in_words(model, coupling, whole) and len(whole.tables) > 1


def test_what_is_in_the_cache_is_not_timed_again(combed, clock, tmp_path):
    model, coupling = combed
    first = times_of(model, coupling, threads=1, folder=tmp_path, timer=clock)
    number = len(clock.layers)
    assert times_of(model, coupling, threads=1, folder=tmp_path, timer=clock) == first
    assert len(clock.layers) == number
    times_of(model, coupling, threads=2, folder=tmp_path, timer=clock)  # the control: other threads, another machine
    assert len(clock.layers) == 2 * number and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('damage', ['', '{}', '[1, 2]', '{"machine": 7}', 'other', 'table', 'dense', 'not a number'])
def test_a_broken_or_foreign_cache_is_measured_anew_and_said(combed, clock, tmp_path, caplog, damage):
    model, coupling = combed
    first = times_of(model, coupling, threads=1, folder=tmp_path, timer=clock)
    (file,) = tmp_path.iterdir()
    plain = json.loads(file.read_text())
    if damage == 'other':
        plain['machine']['cpu'] = 'another cpu'
        damage = json.dumps(plain)
    if damage == 'table':
        next(iter(plain['tables'].values()))['times'] = [1.0]
        damage = json.dumps(plain)
    if damage == 'dense':
        plain['dense'] = dict.fromkeys(plain['dense'], 0.0)
        damage = json.dumps(plain)
    if damage == 'not a number':
        each = next(iter(plain['tables'].values()))
        each['times'] = [float('nan')] * len(each['times'])
        damage = json.dumps(plain)
    number = len(clock.layers)
    with caplog.at_level(logging.WARNING):
        times_of(model, coupling, threads=1, folder=tmp_path, timer=clock)
        assert not caplog.records  # the control
        file.write_text(damage)
        assert times_of(model, coupling, threads=1, folder=tmp_path, timer=clock) == first
    assert len(clock.layers) == 2 * number
    assert 'timed anew' in caplog.text
    assert Times.of_plain(json.loads(file.read_text())).tables == first.tables


def test_two_writers_keep_what_the_other_wrote_and_a_closed_folder_is_said(tmp_path, caplog, monkeypatch):
    tables = {name: StepTable((WidthGrid((4, 8), 4),), (1.0, 2.0)) for name in ('a', 'b')}
    for name, table in tables.items():
        remember(Times(MACHINE, {name: 1.0}, {name: table}), tmp_path)
    assert remembered(MACHINE, tmp_path) == Times(MACHINE, {'a': 1.0, 'b': 1.0}, tables)
    (tmp_path / 'file').touch()
    remember(Times(MACHINE), tmp_path / 'file' / 'below')
    assert 'not remembered' in caplog.text
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    assert cache_folder() == tmp_path / 'mmcpd'


def test_times_of_another_model_are_refused(combed, clock, tmp_path):
    model, coupling = combed
    times = times_of(model, coupling, threads=1, folder=tmp_path, timer=clock)
    assert with_times(model, coupling, times).cost(coupling.keep()).latency == pytest.approx(1000)
    other = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    with pytest.raises(ValueError, match='those of another model'):
        with_times(other, comb(other, IMAGES), times)


def test_real_times_predict_a_slim_file_and_the_promise_is_compared(combed, tmp_path):
    model, coupling = combed
    known = with_latency(model, coupling, threads=1, folder=tmp_path)
    keep = select({g.name: torch.rand(g.units) for g in known.groups}, known, known.keep(), {'latency': 0.8})
    left = shares(known, keep)['latency']
    assert 0.3 < left <= 0.8 < shares(known, known.keep())['latency'] == 1
    promise = promise_of(model, slim(model, known, keep), IMAGES, 0.8, left, threads=1, pairs=5)
    assert promise.target == 0.8 and promise.predicted == left and promise.measured > 0 and promise.pairs == 5


def test_a_promise_says_whether_it_is_kept():
    kept = Promise(0.6, 0.58, 0.61, 10.0, 6.1, 200, 2)
    assert kept.kept and str(kept).endswith('promised 60.0% of the dense model, predicted 58.0%, measured 61.0% '
                                            '(6.10 of 10.00 ms, medians of 200 pairs, 2 threads): kept')  # fmt: skip
    missed = replace(kept, measured=0.7)
    assert not missed.kept and str(missed).endswith('missed by 10.0 points')
