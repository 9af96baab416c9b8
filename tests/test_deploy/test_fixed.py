"""What an ONNX file must fix: the batch size of a model that computes with it, the numbers that a forward draws."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.deploy import DeployError, check_parity, deploy, export_onnx
from mmcpd.deploy.drawn import Fixed
from mmcpd.deploy.onnx import drawing_nodes
from mmcpd.random_state import random_state

BATCHES = [torch.rand(n, 4, generator=torch.Generator().manual_seed(n)) for n in (1, 3, 4)]
OPSETS = pytest.mark.parametrize('opset', [17, 18])


class Queries(nn.Module):
    """Expand learned queries to the batch by a Python number, as heads with kernels do."""

    def __init__(self):
        super().__init__()
        self.queries, self.fc = nn.Parameter(torch.rand(2, 4)), nn.Linear(4, 3)

    def forward(self, x):
        kernels = self.queries[None].expand(int(x.shape[0]), 2, 4)
        return self.fc(torch.bmm(kernels, x[:, :, None].expand(int(x.shape[0]), 4, 4)))


class Noisy(nn.Module):
    """Draw by a function and in place; its numbers are as many as samples where `each`."""

    def __init__(self, each):
        super().__init__()
        self.fc, self.each = nn.Linear(4, 3), each

    def forward(self, x):
        bases = torch.rand(x.shape[0] if self.each else 1, 4, 4) + torch.empty(4, 4).normal_()
        return self.fc(torch.bmm(x[:, None], bases.expand(x.shape[0], 4, 4)))


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return F.dropout(self.fc(x), 0.5, training=True)


@OPSETS
def test_a_model_that_fixes_its_batch_is_exported_so_and_the_report_says_it(opset, tmp_path):
    class Baked(nn.Module):
        def forward(self, x):
            return x * int(x.shape[0]) if opset == 17 else x.reshape(-1, 2).view(int(len(x.reshape(-1, 2)) / 2), 4)

    made = deploy({'open': nn.Linear(4, 3), 'baked': Baked()}, BATCHES, tmp_path, opset=opset, runs=0)
    assert [entry.batch for entry in made.models] == [None, 1]
    assert [size for size, _ in made.models[1].parity.batches] == [1, 1, 1]
    assert 'baked: the batch size is fixed to 1, since the model computes with it as a number' in str(made)
    assert 'open:' not in str(made)
    assert [m['batch'] for m in json.loads((tmp_path / 'latency.json').read_text())['models']] == [None, 1]


@OPSETS
def test_queries_that_are_expanded_to_the_batch_are_exported_one_way_or_the_other(opset, tmp_path):
    made = deploy({'queries': Queries()}, BATCHES, tmp_path, opset=opset, runs=0)
    assert made.models[0].parity.ok
    assert made.models[0].batch in (None, 1)


@OPSETS
@pytest.mark.parametrize('each', [False, True])
def test_random_numbers_are_constants_of_the_file(opset, each, tmp_path):
    model = Noisy(each)
    before = random_state()
    made = deploy({'noisy': model}, BATCHES, tmp_path, opset=opset, runs=0)
    assert made.models[0].batch == (1 if each else None)
    assert drawing_nodes(tmp_path / 'noisy.onnx') == []
    after = random_state()
    assert torch.equal(before[2], after[2]) and before[0] == after[0] == random.getstate()
    assert np.array_equal(before[1][1], after[1][1])
    with torch.no_grad():
        assert not torch.equal(model(BATCHES[1]), model(BATCHES[1]))  # it draws: without a seed no two runs agree


def test_numbers_that_cannot_be_fixed_are_an_error_that_names_them(tmp_path):
    with pytest.raises(DeployError, match=r'draws random numbers itself .*: turn them off') as error:
        deploy({'dropping': Dropping()}, BATCHES, tmp_path, runs=0)
    assert 'With the batch size fixed to 1' in str(error.value)
    assert not list(tmp_path.iterdir())


def test_another_draw_is_found_out(tmp_path):
    model = Noisy(False)
    path = export_onnx(model, BATCHES[1], tmp_path / 'noisy.onnx')
    assert check_parity(path, model, BATCHES).ok
    first = Fixed(model, None, (BATCHES[0],))
    first.drawn_0 = first.drawn_0 + 1
    assert not check_parity(path, first, BATCHES).ok
