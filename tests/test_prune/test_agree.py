"""Processes that would prune apart stop at the first event, and say which of them differ."""

from __future__ import annotations

import json

import pytest
import torch

from mmcpd.errors import PruneError
from mmcpd.prune.agree import coupling_hash, keep_hash
from tests.helpers import on_two_processes
from tests.test_prune.test_pruner import backward, built


def test_a_hash_sees_each_unit_and_each_row():
    first, second = built()[2], built()[2]
    assert coupling_hash(first.coupling) == coupling_hash(second.coupling)
    assert coupling_hash(first.coupling) != coupling_hash(built(ignore=['3'])[2].coupling)
    assert keep_hash(first.keep) == keep_hash(second.keep)
    second.keep['3'][5] = False
    assert keep_hash(first.keep) != keep_hash(second.keep)


def apart(rank, folder):
    """Train on two processes of which the second differs in some way; write what happens."""
    said = {}
    for how in ('same', 'keep', 'coupling', 'iteration', 'choose'):
        model, optimizer, pruner = built(begin=0, ignore=['3'] if how == 'coupling' and rank else ())
        if rank and how == 'keep':
            pruner.keep['0'][3] = False
        if rank and how == 'iteration':
            pruner.iteration = 2
        try:
            if how == 'choose':
                keep = pruner.coupling.keep()
                keep['3'][rank] = False
                pruner.choose(keep)
            for iteration in range(4):
                optimizer.zero_grad()
                backward(model, iteration)
                optimizer.step()
                pruner.step()
            said[how] = f'ended at {pruner.iteration}'
        except PruneError as error:
            said[how] = str(error)
    (folder / f'{rank}.json').write_text(json.dumps(said))


def test_processes_that_differ_stop_at_the_next_event(tmp_path):
    on_two_processes(apart, tmp_path)
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first['same'] == second['same'] == 'ended at 4'
    assert first['keep'] == second['keep']
    assert first['keep'].startswith('processes 1 keep other units than process 0 at iteration 2: all of them must run')
    assert first['coupling'].startswith('processes 1 combed other groups than process 0 at iteration 2')
    assert first['choose'] == second['choose'] and first['choose'].startswith('processes 1 keep other units')


def test_one_process_compares_nothing(monkeypatch):
    _, _, pruner = built()
    monkeypatch.setattr(torch.distributed, 'all_gather', lambda *_: pytest.fail('nobody to compare with'))
    pruner._agreement.check(pruner.keep, 3)
