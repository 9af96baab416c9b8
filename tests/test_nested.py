"""Tensors are found in the same order in every process."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mmcpd.nested import map_tensors, named_tensors_in

SCRIPT = """
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from mmcpd.nested import named_tensors_in

sample = DetDataSample(metainfo=dict(scale=1))
for name in ('gt_instances', 'ignored_instances', 'pred_instances', 'proposals'):
    setattr(sample, name, InstanceData(bboxes=torch.zeros(1, 4), labels=torch.zeros(1), scores=torch.zeros(1)))
print(*named_tensors_in([sample.to('cpu')]))
"""


def test_attributes_are_in_alphabetical_order_and_the_rest_as_it_stands():
    left, right = (
        SimpleNamespace(b=torch.ones(1), a=[torch.ones(2)]),
        SimpleNamespace(a=[torch.ones(2)], b=torch.ones(1)),
    )
    assert list(named_tensors_in(left)) == list(named_tensors_in(right)) == ['a.0', 'b']
    assert list(named_tensors_in({'y': torch.ones(1), 'x': (left,)})) == ['y', 'x.0.a.0', 'x.0.b']
    changed = map_tensors(left, torch.neg)
    assert changed.b == -1 and left.b == 1


class Noted(int):
    """A number that remembers something, as the sizes do which combing follows."""


def test_what_a_number_or_a_text_remembers_is_not_looked_into():
    number = Noted(3)
    number.origin = {'table': torch.ones(1)}
    values = {'size': [number], 'scale': torch.ones(2)}
    assert list(named_tensors_in(values)) == ['scale']
    assert map_tensors(values, torch.neg)['size'][0] is number and number.origin['table'] == 1


def test_samples_of_a_detector_have_one_order_in_every_process():
    pytest.importorskip('mmdet')
    runs = [
        subprocess.run(
            [sys.executable, '-c', SCRIPT], env={**os.environ, 'PYTHONHASHSEED': seed}, capture_output=True, text=True
        )
        for seed in ('1', '2', '3')
    ]
    assert all(run.returncode == 0 for run in runs), runs[0].stderr
    assert len({run.stdout.splitlines()[-1] for run in runs}) == 1
