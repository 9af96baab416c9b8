"""The benchmark of a refit's cost runs in miniature and says what it did."""

from __future__ import annotations

import re

import pytest

pytest.importorskip('mmpretrain')

from benchmarks import refit_cost


def test_it_prints_seconds_and_memory(capsys):
    refit_cost.main(['--pictures', '3', '--batch', '2', '--size', '32', '--depth', '18', '--samples', '4'])
    line = capsys.readouterr().out
    found = re.fullmatch(
        r'3 pictures, (\d+) layers, 8 sums corrected: ([\d.]+) s, ([\d.]+) s of CPU time, ([\d.]+) GiB at most\n', line
    )
    assert found, line
    assert int(found[1]) >= 8 and float(found[3]) > 0 and float(found[4]) > 0
