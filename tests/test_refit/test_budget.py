"""The Gram matrices of all layers share one budget: the largest give way first."""

from __future__ import annotations

import pytest
import torch

from mmcpd.layer_calls import LayerKind, ParameterRows
from mmcpd.refit import refit
from mmcpd.refit.layer import Form, within
from tests.test_refit.nets import IMAGES, Block, combed


def form(name, columns, taps=1):
    kept = torch.ones(1, columns, dtype=torch.bool)
    kind = LayerKind.CONVOLUTION if taps > 1 else LayerKind.LINEAR
    return Form(name, ParameterRows(name, 0, 1), kind, kept, kept, taps, False)


CONV, SMALL, LINEAR = form('conv', 4, 9), form('small', 2, 9), form('linear', 6)  # 10,368, 2,592 and 288 bytes


@pytest.mark.parametrize(
    ('limit', 'expected'),
    [
        (13248, {'conv': 10368, 'small': 2592, 'linear': 288}),
        (13247, {'conv': 128, 'small': 2592, 'linear': 288}),
        (3007, {'conv': 128, 'small': 32, 'linear': 288}),
        (447, {'conv': 128, 'small': 32}),
        (159, {'small': 32}),
        (31, {}),
    ],
)
def test_the_largest_give_way_first(limit, expected):
    found = within(limit, [CONV, SMALL, LINEAR])
    assert {rows.tensor: form.gram_bytes for rows, form in found.items()} == expected


def test_what_cannot_fit_alone_costs_the_others_nothing():
    assert {rows.tensor: form.alike for rows, form in within(11000, [CONV, form('fc', 100)]).items()} == {'conv': False}


def test_the_report_tells_the_budget():
    model, coupling, keep = combed(Block)
    whole = refit(model, coupling, keep, [IMAGES]).report
    assert f'{whole.gram_bytes / 2**20:,.1f} MiB' in str(whole).splitlines()[0]
    assert not any(layer.alike for layer in whole.refitted) and not whole.skipped
    report = refit(model, coupling, keep, [IMAGES], gram_limit=whole.gram_bytes - 1).report
    alike = {layer.tensor: layer.alike for layer in report.refitted}
    assert sum(alike.values()) == 1 and not alike['conv2.weight'] and 'yes' in str(report)
    assert report.gram_bytes < whole.gram_bytes
    report = refit(model, coupling, keep, [IMAGES], gram_limit=8).report
    assert {layer.tensor for layer in report.skipped} >= {'conv1.weight', 'fc.weight'}
    assert 'does not fit: raise gram_limit=8' in str(report) and report.gram_bytes <= 8
