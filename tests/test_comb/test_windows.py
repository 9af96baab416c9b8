"""Windows cost combing no time: what is tied once is not tied again in every window."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.comb.observe import observe
from mmcpd.comb.trace import Cursor, Policy, Run
from mmcpd.comb.unused import Ran
from mmcpd.example import Example
from tests.helpers import Net, check_equal, randomise_


def a_run(count: int) -> Run:
    run = Run(Policy(), Cursor({}), Ran(nn.Module()))
    run.new_axis(count, zero=True)
    return run


def equations(run: Run) -> int:
    """Return how many atoms are said to be another one."""
    return sum(map(len, run.record.table._left))


def components(run: Run) -> set[frozenset[int]]:
    found, _ = run.record.table.solve()
    return {frozenset(np.flatnonzero(found == number).tolist()) for number in found}


@pytest.mark.parametrize('seed', range(4))
def test_a_tie_is_what_equations_column_by_column_are(seed: int) -> None:
    atoms = np.random.default_rng(seed).integers(-1, 30, (4, 3))
    tied, by_column = a_run(30), a_run(30)
    tied.tie(atoms)
    for row in atoms:
        known = row[row >= 0]
        by_column.record.table.equate(known[:1].repeat(len(known)), known, '')
    assert components(tied) == components(by_column)
    assert not tied.record.table.reasons


def test_what_is_said_in_every_window_is_noted_once() -> None:
    heads = np.arange(12).reshape(3, 4).T  # 4 dimensions of 3 heads
    run = a_run(12)
    run.tie(np.tile(heads, 500))
    assert equations(run) == 8
    assert components(run) == {frozenset((d, d + 4, d + 8)) for d in range(4)}
    run.tie(np.tile(np.arange(4)[:, None], 500))  # the same channels at every position
    assert equations(run) == 8


class Windows(Net):
    """Attention over windows of 4 tokens, behind padding to a multiple of them, as at an input size that fits none."""

    def __init__(self) -> None:
        layers = {'stem': nn.Linear(3, 6), 'qkv': nn.Linear(6, 24), 'out': nn.Linear(8, 6), 'fc': nn.Linear(6, 2)}
        super().__init__(Windows.run, **layers)
        self.heads, self.width = 2, 4

    def run(self, x: Tensor) -> Tensor:
        count = x.shape[1]
        x = F.pad(self.stem(x), (0, 0, 0, -count % 4))
        q, k, v = self.qkv(x).reshape(-1, 4, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        x = ((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(1, -1, self.heads * self.width)
        return self.fc(self.out(x)[:, :count].mean(1))


def test_more_windows_are_no_more_equations() -> None:
    model, found = randomise_(Windows()), []
    for count in (9, 201):
        x = torch.randn(1, count, 3, dtype=torch.float64)
        found.append(observe(model, Example((x,), lambda model, x: model(x)), Policy()))
        coupling = comb(model, x)
        assert {group.name: group.units for group in coupling.groups} == {'stem': 6, 'qkv': 4, 'out': 6}
        check_equal(model, coupling)
    few, many = (sum(map(len, record.table._left)) for record in found)
    assert few == many
