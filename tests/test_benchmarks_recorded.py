"""The training of the accuracy tables on a GPU: a recorded step trains as a plain one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip('torch_pruning')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

from benchmarks import accuracy_train
from benchmarks.accuracy_train import Learning, train
from tests.helpers import randomise_
from tests.test_benchmarks_accuracy import task  # noqa: F401 - a fixture


class Replacing:
    """Put a new parameter in the place of one in the middle of a training, as the peer does."""

    def __init__(self, of, model, optimizer, iterations):
        self.task, self.model, self.left = of, model, iterations // 2

    def step(self, optimizer):
        self.left -= 1
        if self.left:
            return optimizer
        self.model.outer.weight = nn.Parameter(self.model.outer.weight.detach().clone())
        return self.task.optimizer(self.model, optimizer.param_groups[0]['lr'])

    def finish(self):
        return self.model


def far(one, other):
    return max(float((a - b).detach().abs().max()) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize('replacing', [False, True])
@pytest.mark.parametrize('learning', [Learning(), Learning(0, 4), Learning(1, 4)])
def test_a_recorded_step_trains_as_a_plain_one(task, learning, replacing, monkeypatch):  # noqa: F811
    there = replace(task, data=task.data.to('cuda'))
    seen = []

    def trained(step_of=accuracy_train.Recorded):
        monkeypatch.setattr(accuracy_train, 'Recorded', step_of)
        options = there, 8, 0.05, 0, learning, partial(Replacing, there) if replacing else None
        return train(there.dense(), randomise_(task.dense()).float().to('cuda').eval(), *options)

    def stale(model, step):
        return lambda *batch: step(*(seen[:2] if seen.extend(batch) is None else ()))

    recorded, plain = trained(), trained(lambda model, step: step)
    assert all(torch.isfinite(p).all() for p in plain.parameters())
    assert far(recorded, plain) < 0.1 * far(trained(stale), plain)
