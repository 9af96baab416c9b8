"""Latency as the target of a run: its times travel in the checkpoint, and what it promised is compared in the end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail
from torch import nn

import mmcpd.deploy
from mmcpd.cli.comb_page import comb_page
from mmcpd.comb import comb
from mmcpd.deploy import DeployError, Promise, layer_times, timed
from mmcpd.engine.hooks import PruneHook
from mmcpd.engine.latency import LatencyTarget, picture_exported
from mmcpd.engine.preview import Scored, preview
from mmcpd.engine.pruning_state import pruning_state
from mmcpd.errors import PruneError, SlimError
from tests.test_engine.tiny_runs import hook_of

NO_LOSS = {'distil': False, 'prune.threads': 1}
TARGET = {'_delete_': True, 'latency': 0.6}


class Clock:
    """Times in steps of eight channels; `speed` makes all later ones longer, but not all alike."""

    def __init__(self):
        self.timed, self.speed = 0, 1.0

    def __call__(self, layer, widths, threads):
        self.timed += 1
        longer = self.speed if layer.sizes[0] > 16 else 1.0
        return {each: longer * float(np.prod([-(-width // 8) * 8 for width in each])) for each in widths}


@pytest.fixture
def clock(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(layer_times, 'profiled', clock)
    monkeypatch.setattr(timed, '_dense', lambda *_: 1e4)
    monkeypatch.setattr(
        mmcpd.deploy, 'promise_of', lambda dense, slim, x, target, predicted, **_: Promise(target, predicted, 0.62,
                                                                                          10.0, 6.2, 200, 1)
    )  # fmt: skip
    return clock


def test_a_run_reaches_its_latency_and_a_resumed_one_keeps_its_times(runner_of, clock, tmp_path, monkeypatch):
    runner = runner_of('whole', **{'prune.target': TARGET, **NO_LOSS})
    runner.train()
    hook = hook_of(runner)
    assert hook.normalize == 'latency'
    left = hook.pruner.left()
    assert left['latency'] <= 0.6 < left['units']
    log = next((tmp_path / 'whole').glob('*/*.log')).read_text()
    assert '60.0% of the latency of the dense model remain' in log and 'latency: 10000.00 ms dense on' in log
    assert 'promised 60.0% of the dense model, predicted' in log and 'measured 62.0%' in log
    written = json.loads((tmp_path / 'whole' / 'latency_target.json').read_text())
    assert written['predicted'] == left['latency'] and written['measured'] == 0.62
    times = hook.latency.state()

    checkpoint = tmp_path / 'whole' / 'epoch_2.pth'
    number, clock.speed = clock.timed, 9.0
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'elsewhere'))  # another machine, which is slower
    again = runner_of('again', **{'prune.target': TARGET, **NO_LOSS, 'resume': True, 'load_from': str(checkpoint)})
    again.train()
    assert hook_of(again).latency.state() == times and clock.timed == number
    keep = hook.pruner.keep
    assert hook_of(again).pruner.coupling.cost(keep).latency == hook.pruner.coupling.cost(keep).latency
    assert hook_of(again).pruner.left()['latency'] <= 0.6

    state = torch.load(checkpoint, weights_only=False)  # the control: without its times the run measures anew
    del state['mmcpd']['latency']
    torch.save(state, tmp_path / 'without.pth')
    other = runner_of('other', **{'prune.target': TARGET, **NO_LOSS, 'resume': True,
                                  'load_from': str(tmp_path / 'without.pth')})  # fmt: skip
    other.train()
    assert clock.timed > number and hook_of(other).latency.state() != times


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match='threads belongs to a target of latency'):
        PruneHook(threads=2)
    with pytest.raises(ValueError, match='threads counts threads of ONNX Runtime, at least 1: got 0'):
        PruneHook(target={'latency': 0.5}, threads=0)
    assert PruneHook(target={'latency': 0.5}, at_once=True).normalize == 'latency'
    assert PruneHook(target={'latency': 0.5}, normalize='macs').normalize == 'macs'
    assert PruneHook(at_once=True).normalize == 'macs' and PruneHook().normalize == 'memory'


@pytest.mark.parametrize('state', [7, {'machine': {}}])
def test_damaged_times_in_a_checkpoint_are_refused(state):
    with pytest.raises(SlimError, match='latency in the pruning state of the checkpoint is damaged'):
        LatencyTarget({'latency': 0.5}).resume(state)
    LatencyTarget({'macs': 0.5}).resume(state)  # the control: nobody needs them


def test_a_pruning_state_whose_latency_is_no_table_is_refused():
    pruner = {'keep': {}, 'importance': {}, 'iteration': 1, 'last': 0, 'waiting': False, 'frozen': []}
    state = {'pruner': pruner, 'begun': True, 'dense_metrics': {}, 'dense_digest': '', 'best_before': [], 'left': {},
             'target': {}}  # fmt: skip
    for fine in ({}, {'latency': None}, {'latency': {}}):
        assert pruning_state({'mmcpd': {**state, **fine}}, 'a.pth') is not None
    with pytest.raises(SlimError, match=r'a\.pth .* its latency is missing or damaged'):
        pruning_state({'mmcpd': {**state, 'latency': 7}}, 'a.pth')


class Mapped(nn.Module):
    """It takes pictures by name, and with a second input."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 4, 1)

    def forward(self, inputs, scale=None):
        return self.last(self.first(inputs).relu()) * scale


def test_a_model_that_does_not_run_on_pictures_alone_is_refused_in_one_line():
    data = {'inputs': torch.randn(1, 3, 8, 8), 'scale': torch.ones(1)}
    model = Mapped().eval()
    coupling = comb(model, (data,), forward=lambda net, given: net(**given))
    with pytest.raises(PruneError, match=r"latency cannot be a target: Mapped does not run in mode 'tensor'") as error:
        picture_exported(model, coupling)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kind', [DeployError, OSError, Fail])  # the exporter's, the disk's, ONNX Runtime's
def test_a_file_that_cannot_be_measured_in_the_end_is_said(clock, monkeypatch, kind):
    def fail(*_, **__):
        raise kind('torch cannot export it')

    monkeypatch.setattr(mmcpd.deploy, 'promise_of', fail)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    coupling = comb(model, torch.randn(1, 3, 8, 8))
    said = []
    from mmcpd.engine.latency import say_promise

    assert say_promise(model, model, coupling, 0.6, 0.5, 1, said.append) is None
    assert said == ['the latency could not be compared with its promise of 60.0%: torch cannot export it']


def test_a_preview_says_what_latency_is_predicted(clock):
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 1), nn.ReLU(), nn.Conv2d(48, 4, 1)).eval()
    coupling = comb(model, torch.randn(1, 3, 8, 8))
    target = LatencyTarget({'latency': 0.7}, 1)
    said = []
    known = target.give(model, coupling, said.append)
    scored = Scored({g.name: torch.arange(float(g.units)) for g in known.groups}, 'magnitude', 'made up')
    floors = {'min_units': 1, 'round_to': 8}
    found = preview(known, scored, {'latency': 0.7}, floors)
    assert f'predicted latency: {found.left["latency"]:.1%} of the dense model' in str(found)
    assert 0.4 < found.left['latency'] <= 0.7 and 'layers take' in said[0]
    assert all(width.kept % 8 == 0 or width.kept == 4 for width in found.layers)
    share = f'<b>{found.left["latency"]:.1%}</b> latency remains (predicted)'
    assert share in comb_page('toy', known, found, None, '')
    plain = preview(coupling, scored, {'macs': 0.7}, floors)
    assert 'latency remains' not in comb_page('toy', coupling, plain, None, '')
    assert 'latency' not in str(plain) and LatencyTarget({'macs': 0.5}).give(model, coupling, said.append) is coupling
