"""Floors by pattern in training: while units go one by one, and all at once."""

from __future__ import annotations

import pytest

from mmcpd.engine.slim_file import read_slim
from tests.test_engine.tiny_runs import hook_of

EVERY = {'begin': 0.25, 'end': 0.75, 'interval': 2}
AT_ONCE = {'at_once': True, 'begin': 0.25, 'pictures': 32}
LATE = 'backbone.layer4.*'


@pytest.mark.parametrize('way', [EVERY, AT_ONCE], ids=['one by one', 'at once'])
def test_a_run_leaves_the_share_of_what_fits(runner_of, tmp_path, way):
    counts = {}
    for share in (None, 0.9):
        remain = {} if share is None else {'remain': {LATE: share}}
        prune = {'_delete_': True, 'type': 'mmcpd.PruneHook', 'target': {'params': 0.7, 'macs': 0.9}, **way, **remain}
        runner = runner_of(f'run_{share}', **{'default_hooks.prune': prune})
        runner.train()
        keep = hook_of(runner).pruner.keep
        counts[share] = {name: kept.sum().item() / len(kept) for name, kept in keep.items() if 'layer4' in name}
        left = read_slim(tmp_path / f'run_{share}' / 'slim.pth')['meta']['left']
    assert counts[None] and min(counts[None].values()) < 0.9 <= min(counts[0.9].values())
    assert left['macs'] <= 0.9
