"""The table, dense beside slim, and the lines about what is frozen."""

from __future__ import annotations

import pytest
from torch import nn

from mmcpd.comb import comb
from mmcpd.engine.plan import _frozen
from mmcpd.engine.report import comparison, costs, numbers
from tests.helpers import sample


def test_the_table_compares_costs_and_metrics():
    dense = {'macs': 4_000_000, 'params': 2_000_000, 'memory': 2**20, 'units': 8, 'metrics': {'top1': 90.0}}
    small = {'macs': 1_000_000, 'params': 500_000, 'memory': 2**19, 'units': 2, 'metrics': {'top1': 89.0, 'new': 1.0}}
    rows = {line.split()[0]: line.split()[1:] for line in comparison(dense, small).splitlines()[2:]}
    assert rows['MACs'] == ['4.00', 'M', '1.00', 'M', '25.0%']
    assert rows['activations'] == ['1.00', 'MiB', '0.50', 'MiB', '50.0%']
    assert rows['units'] == ['8', '2', '25.0%']
    assert rows['top1'] == ['90.00', '89.00', '-1.00']
    assert rows['new'] == ['-', '1.00']


@pytest.mark.parametrize('name', ['coco/bbox_mAP_l', 'segm_mAP', 'coco/AR_s@1000', 'AR@100', 'coco/AP', 'AP_75'])
def test_a_precision_of_no_object_is_none(name):
    assert numbers({name: -1, 'x': 2}) == {'x': 2.0}
    assert numbers({name: 0.0}) == {name: 0.0} and numbers({name: -0.5}) == {name: -0.5}


def test_a_loss_may_be_minus_one():
    assert numbers({'loss': -1.0, 'gAP': -1, 'MAPE': -1}) == {'loss': -1.0, 'gAP': -1.0, 'MAPE': -1.0}


def test_costs_are_plain_numbers_of_a_keep():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1))
    coupling = comb(model, sample((1, 3, 5, 5)).float())
    keep = coupling.keep()
    keep['0'][0] = False
    assert costs(coupling, keep) == {'macs': 25 * (9 + 6), 'params': 12 + 8, 'memory': 4 * 25 * 5, 'units': 3}


def test_at_most_three_lines_say_what_is_frozen(monkeypatch):
    coupling = comb(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)), sample((1, 3, 5, 5)).float())
    for number in (0, 2, 3, 4, 9):
        reasons = [(f'reason {i}', 10 - i) for i in range(number)]
        monkeypatch.setattr(type(coupling), 'merged_reasons', lambda _, found=reasons: found)
        lines = _frozen(coupling)
        assert len(lines) == min(number, 3)
        assert number < 4 or lines == [
            '10 rows: reason 0',
            '9 rows: reason 1',
            f'{number - 2} more reasons: see coupling.txt',
        ]
