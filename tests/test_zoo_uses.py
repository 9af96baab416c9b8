"""The zoo's further uses on a small family: each is exact, each notices a wrong model, and the verdict says which."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec

import pytest
import torch
from torch import nn

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')
pytest.importorskip('torchvision')

from benchmarks import zoo, zoo_uses
from benchmarks.zoo_checks import MARK, described, slimmed, sweep_ours
from benchmarks.zoo_family import Deployed, Family, build
from benchmarks.zoo_report import COLUMNS, line, summary, uses_fault
from benchmarks.zoo_uses import NotRun
from mmcpd.comb import comb
from mmcpd.slim import restructure_
from mmcpd.slim.trial import in_double, random_keep

pytestmark = pytest.mark.slow  # all uses in one test take half a minute, and most tests want all


class Net(nn.Module):
    """A picture classifier with a head that only training runs, and a size that its forward asks for."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.norm, self.fc, self.side = nn.BatchNorm2d(12), nn.Linear(12, 5), nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm(self.mix(self.stem(x).relu())).relu()
        x = x.reshape(x.shape[0], 12, -1).mean(2)
        return (self.fc(x), self.side(x)) if self.training else self.fc(x)


class Fixed(Net):
    """The same, for pictures of one size only."""

    def forward(self, x):
        if x.shape[-2:] != (32, 32):
            raise ValueError('made for 32 x 32 pixels')
        return super().forward(x)


@dataclass(frozen=True)
class Tiny(Family):
    kind: type[nn.Module] = Net

    def net(self):
        return Deployed(self.kind(), mode=None)


def made(kind=Net):
    family = Tiny('tests', 'tiny', 'written out', (32, 32), kind=kind)
    model, inputs = build(family)
    found = comb(model, inputs)
    double, example = in_double(model, found.example)
    return family, slimmed(double, replace(found, example=example), random_keep(found, 0.7, 0))


@pytest.fixture(scope='module')
def case():
    return made()


@pytest.fixture
def wrong(case):
    """What a mistake in slimming would make: the slim model is the one whose keep is shifted."""
    family, done = case
    return family, replace(done, small=done.turned)


@pytest.fixture
def uses(monkeypatch, capsys):
    """Run all uses; what a fresh process does runs in this one."""

    def reopened(family, files):
        capsys.readouterr()
        zoo_uses.reopen(family, files)
        lines = [json.loads(line.removeprefix(MARK)) for line in capsys.readouterr().out.splitlines()]
        return {how: result for line in lines for how, result in line.items() if how in zoo_uses.SAVED}

    monkeypatch.setattr(zoo_uses, 'reopened', reopened)
    return lambda family, done: zoo_uses.sweep_uses(family, done, 0)


def test_each_use_is_exact(uses, case):
    row = uses(*case)
    assert set(row) == set(zoo_uses.USES)
    assert uses_fault(row, 1e-9) is None, row
    assert row['training']['combed_again'], 'its side head runs in training only'
    assert not any('not_run' in use for use in row.values()), row


def test_each_use_notices_a_wrong_slim_model(uses, wrong):
    row = uses(*wrong)
    assert row['batch']['gap'] > 1e-4
    assert row['size']['gap'] > 1e-4
    assert uses_fault(row, 1e-9) == f'WRONG: batch: masked and slimmed differ by {row["batch"]["gap"]:.1e}'


def test_a_fresh_process_is_compared_with_what_was_saved(uses, case, monkeypatch):
    monkeypatch.setattr(zoo_uses, 'rebuilt', lambda family, saved: restructure_(family.net().double(), saved['plan']))
    row = uses(*case)
    assert row['reload']['gap'] > 1e-4, 'the values were not loaded'
    assert uses_fault(row, 1e-9).startswith('WRONG: reload')


def test_gradients_that_differ_are_a_fault(uses, case):
    row = uses(*case)
    assert row['training']['gradient_control'] > 1e-3
    row['training']['gradient_gap'] = 1e-3
    assert uses_fault(row, 1e-9) == 'WRONG: training: gradients differ by 1.0e-03'


def test_a_control_that_agrees_and_a_use_that_is_missing_are_faults(uses, case):
    row = uses(*case)
    assert 'control of keep' in uses_fault(row | {'keep': {'gap': 0.0, 'control': 0.0}}, 1e-9)
    assert uses_fault(row | {'pickle': {'error': 'pickle: it broke'}}, 1e-9) == 'pickle: it broke'
    assert uses_fault({}, 1e-9) == 'batch: not tried'


def test_where_the_dense_model_does_not_run_the_row_says_why(uses):
    row = uses(*made(Fixed))
    assert row['size']['not_run'] == 'ValueError: made for 32 x 32 pixels'
    assert uses_fault(row, 1e-9) is None


def test_what_the_dense_model_cannot_do_is_no_fault_of_slimming(case, tmp_path):
    family, done = case
    done.model.hook = lambda: None
    try:
        with pytest.raises(NotRun, match='the dense model neither'):
            zoo_uses.write(family, done, 'pickle', tmp_path / 'slim.pt')
    finally:
        del done.model.hook


def test_units_are_counted_beside_parameters():
    model, inputs = build(Tiny('tests', 'tiny', 'written out', (32, 32)))
    whole, part = described(comb(model, inputs)), described(comb(model, inputs, ignore='net.stem'))
    assert (whole['channels'], whole['attention']) == (1.0, None)
    assert part['channels'] == 12 / 20
    heads = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert described(comb(heads, torch.randn(1, 4, 8)))['attention'] == 1.0


def test_a_family_in_its_own_process_reports_what_it_told_before_it_died():
    row = zoo.run_child(next(f for f in zoo.FAMILIES if f.key == 'torchvision/mnasnet0_5'), 0.1, 12, 0, {})
    assert row['died'] == 'start: no end within 0 s'
    assert row['verdict'] == row['died']


@pytest.mark.skipif(find_spec('mmdet') is None, reason='mmdet is not installed')
def test_every_row_has_a_name_of_its_own_and_every_folder_is_known():
    keys = [family.key for family in zoo.FAMILIES]
    assert len(keys) == len(set(keys))
    assert not set(keys) & set(zoo.OUT)
    assert zoo.unlisted() == []


def test_the_table_says_what_each_use_showed(uses, case, tmp_path):
    family, done = case
    model, inputs = build(family)
    ours, _ = sweep_ours(model, inputs, 0)
    row = {'family': family.key, 'ours': ours, 'uses': uses(family, done), 'verdict': 'pass'}
    cells = line(row).split(' | ')
    assert len(cells) == len(COLUMNS)
    assert cells[COLUMNS.index('prunable units')] == '100.0%'
    assert cells[COLUMNS.index('verdict')] == 'pass'
    assert summary({'tiny': row})['exact: reload'] == '1 of 1'
    wrong = row | {'uses': row['uses'] | {'reload': {'gap': 1.0, 'control': 1.0}}}
    assert summary({'tiny': wrong})['exact: reload'] == '0 of 1'
    missing = row | {'uses': row['uses'] | {'reload': {'not_run': 'why'}}}
    assert summary({'tiny': missing})['exact: reload'] == '0 of 0'
