"""At once, too, a group on which no output depends keeps its units and is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.engine.at_once import prune_at_once


class Dead(nn.Module):
    def __init__(self, dead):
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1))
        self.spare = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        if dead:
            nn.init.constant_(self.spare[0].bias, -100.0)

    def forward(self, x):
        return self.used(x) + self.spare(x)


@pytest.mark.parametrize(('dead', 'importance', 'left'), [
    (True, 'gauss_newton', ['spare.0']), (False, 'gauss_newton', []), (True, 'magnitude', []),
])  # fmt: skip
def test_a_dead_group_is_left_alone(dead, importance, left):
    model = Dead(dead).eval()
    coupling = comb(model, torch.rand(1, 3, 8, 8))
    batches = [torch.rand(2, 3, 8, 8)] * 2
    pruned = prune_at_once(model, coupling, batches, {'units': 0.7}, importance=importance, refit=False)
    assert list(pruned.left_alone) == left and bool(pruned.keep['spare.0'].all()) >= bool(left)
    assert ('1 groups keep their units' in str(pruned)) == bool(left) and pruned.left['units'] <= 0.7
    if not left and importance == 'gauss_newton':
        assert not bool(pruned.keep['spare.0'].all())
