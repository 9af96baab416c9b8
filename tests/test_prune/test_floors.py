"""Groups under a norm keep two units: of one value a norm makes nothing, and torch refuses it in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.prune import Pruner, Schedule, reachable, select
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep

EXACT = 1e-12


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Conv2d(3, width, 3), between, nn.Conv2d(width, 6, 1)
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.b(self.between(self.a(x))).relu().mean((2, 3)))


class ByHand(nn.Module):
    """A norm over channels as it is written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()


class Last(nn.Module):
    """A layer norm, or one without the mean, over the last dimension."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Gate(nn.Module):
    """A softmax over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.softmax(1)


NORMS: dict[str, Callable[[], nn.Module]] = {
    'group norm': lambda: nn.GroupNorm(1, 8),
    'two norm groups': lambda: nn.GroupNorm(2, 8),
    'layer norm': lambda: Last(nn.LayerNorm(8)),
    'rms norm': lambda: Last(nn.RMSNorm(8)),
    'by hand': ByHand,
    'softmax': Gate,
}
FREE: dict[str, Callable[[], nn.Module]] = {
    'batch norm': lambda: nn.BatchNorm2d(8),
    'instance norm': lambda: nn.InstanceNorm2d(8),
    'nothing': nn.ReLU,
}


def combed(between: Callable[[], nn.Module]) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Between(between()).double().eval(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    return model, comb(model, x), x


@pytest.mark.parametrize('name', NORMS)
def test_a_group_under_a_statistic_keeps_two_units(name: str) -> None:
    model, coupling, _ = combed(NORMS[name])
    assert coupling.floors == {'a': 2, 'b': 1}
    lowest = select(
        {g.name: torch.rand(g.units) for g in coupling.groups}, coupling, coupling.keep(),
        {'units': reachable(coupling)['units']},
    )  # fmt: skip
    assert {n: int(kept.sum()) for n, kept in lowest.items()} == {'a': 2, 'b': 1}
    small = slim(model, coupling, lowest)
    assert compare(model, coupling, lowest, small) < EXACT
    small.train()(torch.randn(1, 3, 3, 3, dtype=torch.float64)).sum().backward()  # one value per norm would raise


@pytest.mark.parametrize('name', FREE)
def test_other_groups_may_keep_one(name: str) -> None:
    _, coupling, _ = combed(FREE[name])
    assert coupling.floors == {'a': 1, 'b': 1}
    assert reachable(coupling)['units'] == 2 / 14


def test_without_the_floor_a_norm_gives_the_same_whatever_comes_in_and_torch_raises() -> None:
    x = torch.randn(4, 1)
    assert F.layer_norm(x, (1,)).abs().max() == 0
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        F.group_norm(torch.randn(1, 1, 1, 1), 1)


@pytest.mark.parametrize('use', [slim, mask_])
def test_a_keep_below_the_floor_is_refused_in_one_line(use: Any) -> None:
    model, coupling, _ = combed(NORMS['two norm groups'])
    keep = coupling.keep()
    keep['a'][1:] = False
    why = 'which between takes a statistic over, and of one value a norm makes nothing'
    message = rf"keep\['a'\] leaves 1 of 4 units, {why}: keep at least 2"
    with pytest.raises(ValueError, match=message):
        use(model, coupling, keep)
    keep['a'][1] = True
    use(model, coupling, keep)


def test_large_groups_keep_a_multiple_and_small_ones_all() -> None:
    torch.manual_seed(0)
    large = comb(Between(nn.GroupNorm(1, 64), 64).eval(), torch.randn(1, 3, 3, 3))
    rounded = {'min_units': 1, 'round_to': 8}
    assert reachable(large, **rounded)['units'] == (8 + 1) / 70
    assert reachable(large, min_units=3, round_to=1)['units'] == (3 + 3) / 70
    pair = comb(Between(nn.GroupNorm(1, 2), 2).eval(), torch.randn(1, 3, 3, 3))
    assert pair.floors['a'] == 2 and reachable(pair)['units'] == (2 + 1) / 8
    assert all(int(random_keep(pair, ratio, 0, awkward=True)['a'].sum()) == 2 for ratio in (0.1, 0.5, 0.9))


def test_a_run_down_to_the_floor_does_not_fail_in_the_middle() -> None:
    torch.manual_seed(0)
    model = Between(nn.GroupNorm(2, 8))
    images, labels = torch.randn(1, 3, 3, 3), torch.tensor([0])
    coupling = comb(model, images)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    lowest = reachable(coupling)['units']
    schedule = Schedule(target={'units': lowest}, begin=1, end=9, interval=1).resolve(12)
    pruner = Pruner(model, coupling, optimizer, schedule)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        pruner.step()
    assert {n: int(kept.sum()) for n, kept in pruner.keep.items()} == {'a': 2, 'b': 1}
    assert compare(model, coupling, pruner.keep) < 1e-5
