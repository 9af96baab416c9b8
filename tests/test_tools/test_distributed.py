"""Two processes without a GPU train, prune and write one slim model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmcpd.engine.slim_file import read_slim

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes_on_a_cpu_prune_as_one(pruning, tmp_path):
    environment = {**os.environ, 'PYTHON': sys.executable, 'PORT': '29611', 'OMP_NUM_THREADS': '1'}
    command = [str(ROOT / 'tools' / 'dist_train.sh'), str(pruning), '2', '--work-dir', 'w']
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    slim = read_slim(tmp_path / 'w' / 'slim.pth')
    assert slim['meta']['slim']['macs'] <= 0.5 * slim['meta']['dense']['macs']
    last = torch.load(tmp_path / 'w' / 'epoch_4.pth', weights_only=False)
    removed = sum(int((~units).sum()) for units in last['mmcpd']['pruner']['keep'].values())
    assert removed == slim['meta']['dense']['units'] - slim['meta']['slim']['units']
    assert re.search(r'Epoch\(train\) +\[4\]\[2/2\]', result.stdout + result.stderr)  # 64 pictures, 16 to each


def test_dist_train_without_arguments_says_how():
    result = subprocess.run([str(ROOT / 'tools' / 'dist_train.sh')], capture_output=True, text=True)
    assert result.returncode == 2
    assert 'tools/dist_train.sh CONFIG PROCESSES' in result.stderr
