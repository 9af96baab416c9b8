"""The cost of pruning without training is measured stage by stage: in miniature here."""

from __future__ import annotations

import json

from benchmarks import prune_cost


def test_every_stage_is_timed(tmp_path, capsys):
    file = tmp_path / 'cost.json'
    prune_cost.main(['--pictures', '3', '--batch', '2', '--size', '32', '--depth', '18', '--out', str(file)])
    row = json.loads(file.read_text())
    assert list(row['stages']) == ['comb', 'score', 'refit', 'slim']
    assert all(stage['seconds'] > 0 for stage in row['stages'].values())
    assert row['sums'] == 8 and row['layers'] >= 8 and row['peak_gib'] > 0
    assert '3 pictures:' in capsys.readouterr().out
