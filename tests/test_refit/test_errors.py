"""The errors that a refit reports are those of its layers, worked out anew from what they read and should put out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.layer_calls import LayerCalls, LayerKind
from mmcpd.refit import refit
from mmcpd.slim.compare import evaluating
from mmcpd.slim.mask import kept_rows
from tests.helpers import masked
from tests.test_refit.nets import IMAGES, combed


class Chain(nn.Module):
    """Each kind of layer behind one that lost columns, so that none can be mended wholly."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)
        self.depth, self.grouped = nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.Conv2d(8, 8, 3, groups=2, padding=1)
        self.shared, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 6, 2, 2)
        self.line, self.kv, self.fc = nn.Conv1d(6, 6, 3), nn.Linear(6, 10), nn.Linear(5, 4)

    def forward(self, x):
        x = F.conv2d(F.pad(x, (1, 1, 1, 1)), self.stem.weight, self.stem.bias).tanh()
        x = self.grouped(self.depth(self.mix(x).tanh()).tanh()).tanh()
        x = self.shared(self.shared(x).tanh()).tanh()
        x = self.line(self.up(x).tanh().flatten(2)).tanh().mT
        (k, v), (k_bias, v_bias) = self.kv.weight.chunk(2), self.kv.bias.chunk(2)
        return self.fc(F.linear(x, k, k_bias).tanh() + F.linear(x, v, v_bias).tanh())


def calls_of(model, old=None):
    """Return all calls of layers in one forward, and what they put out.

    With `old`, only the last of several calls of a layer has its new weight, as when it is refitted.
    """
    found = []

    def note(call):
        early = old is not None and call.rows.tensor == 'shared.weight' and call.number == 0
        out = call.run(weight=part(old, call.rows), bias=part(old, call.bias_rows)) if early else call.run()
        found.append((call, out))
        return out

    with evaluating(model), LayerCalls(model, note):
        model(IMAGES)
    return found


def name_of(call, model):
    whole = call.rows.stop - call.rows.start == len(model.get_parameter(call.rows.tensor))
    return call.rows.tensor if whole else f'{call.rows.tensor}[{call.rows.start}:{call.rows.stop}]'


def flat(call, output):
    """Return an output as (positions, channels)."""
    return output.flatten(0, -2) if call.kind is LayerKind.LINEAR else output.movedim(1, -1).flatten(0, -2)


def part(model, rows):
    return model.get_parameter(rows.tensor).detach()[rows.start : rows.stop]


def kept_outputs(call, kept):
    dim = int(call.kind is LayerKind.TRANSPOSED)
    channels = kept.get(call.rows.tensor, {}).get(dim)
    if channels is None:
        return slice(None)
    return channels if dim else channels[call.rows.start : call.rows.stop]


LAYERS = {
    'mix.weight': 'a convolution', 'depth.weight': 'depthwise', 'grouped.weight': 'grouped',
    'shared.weight': 'called twice', 'up.weight': 'transposed', 'line.weight': 'in one dimension',
    'kv.weight[0:5]': 'a part of a weight', 'kv.weight[5:10]': 'another part', 'fc.weight': 'linear',
}  # fmt: skip


@pytest.mark.parametrize('name', LAYERS)
def test_errors_are_those_of_the_old_and_the_new_weight(name):
    """Inputs are those of the refitted model in which this layer still has its old weight."""
    model, coupling, keep = combed(Chain)
    done = refit(model, coupling, keep, [IMAGES], ridge=1e-6, samples=10**6)
    (layer,) = (layer for layer in done.report.refitted if layer.tensor == name)
    dense = [flat(call, out) for call, out in calls_of(model) if name_of(call, model) == name]
    old, old_model = masked(model, coupling, keep), copy.deepcopy(done.model)
    rows = next(call.rows for call, _ in calls_of(model) if name_of(call, model) == name)
    bias_rows = next(call.bias_rows for call, _ in calls_of(model) if name_of(call, model) == name)
    with torch.no_grad():
        for place in (rows, bias_rows):
            part(old_model, place).copy_(part(old, place))
    calls = [call for call, _ in calls_of(old_model, old) if name_of(call, model) == name]
    assert len(calls) == len(dense) == (2 if name == 'shared.weight' else 1)
    kept = kept_outputs(calls[0], kept_rows(coupling, keep))
    wanted = torch.cat(dense)[:, kept]

    def error(share):
        """Return the error with this share of the change."""
        weight, bias = (part(old, at) + share * (part(done.model, at) - part(old, at)) for at in (rows, bias_rows))
        found = torch.cat([flat(call, call.run(weight=weight, bias=bias)) for call in calls])[:, kept]
        return float((found - wanted).square().mean(0).sum() / wanted.var(0, correction=0).sum())

    assert layer.before == pytest.approx(error(0), rel=1e-6)
    assert layer.after == pytest.approx(error(1), rel=1e-4, abs=1e-9)
    assert error(1) < 0.99 * error(0)
    assert error(1) < min(error(0.8), error(1.2)), 'the new weight is the best one on the way to it, and beyond'


def test_all_kinds_are_there():
    model, coupling, keep = combed(Chain)
    report = refit(model, coupling, keep, [IMAGES]).report
    assert {layer.tensor for layer in report.refitted} == {*LAYERS, 'stem.weight'}
