"""Shares that remain by pattern: floors that every choice of units respects, together with `round_to`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune import Pruner, Schedule, check_reachable, check_remain, reachable, select, shares
from mmcpd.prune.remain import least_units
from mmcpd.slim.compare import compare


class Stages(nn.Module):
    """Two stages of three widths, one of them padded in the forward and one called by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.ModuleList([nn.Conv2d(3, 10, 3), nn.Conv2d(10, 100, 3)])
        self.late = nn.Conv2d(100, 25, 1)
        self.fc = nn.Linear(25, 2)

    def forward(self, x: Tensor) -> Tensor:
        for each in self.early:
            x = each(nn.functional.pad(x, (1, 1, 1, 1))).relu()
        x = nn.functional.conv2d(x, self.late.weight, self.late.bias)
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def combed():
    torch.manual_seed(0)
    model, x = Stages().double().eval(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    return model, comb(model, x), x


def kept(keep) -> dict[str, int]:
    return {name: int(each.sum()) for name, each in keep.items()}


def lowest_first(coupling, group: str) -> dict[str, Tensor]:
    """Return scores of which all of one group's are the lowest."""
    return {g.name: torch.rand(g.units) + (0 if g.name == group else 10) for g in coupling.groups}


def test_the_highest_of_the_patterns_holds_and_is_rounded_up(combed):
    _, coupling, _ = combed
    assert least_units(coupling, {'early.*': 0.3, '*.1': 0.5}) == {'early.0': 3, 'early.1': 50, 'late': 0}
    assert least_units(coupling, {'late': 0.28}) == {'early.0': 0, 'early.1': 0, 'late': 7}  # 0.28 * 25 > 7 in floats
    assert least_units(coupling, {'late': 0.29})['late'] == 8


@pytest.mark.parametrize('round_to', [1, 8])
def test_a_choice_leaves_the_share_and_stays_on_multiples(combed, round_to):
    model, coupling, _ = combed
    scores = lowest_first(coupling, 'early.1')
    free = select(scores, coupling, coupling.keep(), {'macs': 0.3}, round_to=round_to)
    assert kept(free)['early.1'] < 75  # else this shows nothing
    keep = select(scores, coupling, coupling.keep(), {'macs': 0.3}, round_to=round_to, remain={'early.1': 0.75})
    assert kept(keep)['early.1'] in (range(75, 79) if round_to == 1 else [80])
    assert shares(coupling, keep)['macs'] <= 0.3
    assert compare(model, coupling, keep) < 1e-12


def test_all_of_a_group_remain(combed):
    _, coupling, _ = combed
    keep = select(lowest_first(coupling, 'late'), coupling, coupling.keep(), {'macs': 0.5}, remain={'late': 1})
    assert kept(keep)['late'] == 25


def test_what_can_be_reached_takes_it_into_account(combed):
    _, coupling, _ = combed
    free, bound = reachable(coupling), reachable(coupling, remain={'*': 0.9})
    assert free['macs'] < 0.1 and 0.7 < bound['macs'] < 1
    check_reachable(coupling, Schedule({'macs': 0.5}))
    with pytest.raises(PruneError, match=r"macs cannot go down to 0\.5000.*remain=\{'\*': 0\.9\}"):
        check_reachable(coupling, Schedule({'macs': 0.5}), remain={'*': 0.9})
    with pytest.raises(PruneError, match='only to'):
        select(lowest_first(coupling, 'late'), coupling, coupling.keep(), {'macs': 0.5}, remain={'*': 0.9})


def test_a_pattern_that_fits_nothing_is_refused(combed):
    model, coupling, _ = combed
    with pytest.raises(ValueError, match=r"remain pattern 'early\.2' fits no group: near are early"):
        check_reachable(coupling, Schedule({'macs': 0.5}), remain={'early.2': 0.5})
    with pytest.raises(ValueError, match='fits no group'):
        Pruner(model, coupling, torch.optim.SGD(model.parameters()), Schedule({'macs': 0.5}, 0, 4), remain={'x': 0.5})


@pytest.mark.parametrize(
    'remain', [5, None, ['a'], {1: 0.5}, {'': 0.5}, {'a': 0}, {'a': 1.5}, {'a': '0.5'}, {'a': True}, {'a': None},
               {'a': float('nan')}],
    ids=str,
)  # fmt: skip
def test_a_wrong_share_is_one_sentence(remain):
    with pytest.raises(ValueError, match=r'^remain[^\n]{20,200}$'):
        check_remain(remain)


@pytest.mark.parametrize('remain', [{}, {'early.1': 0.6}])
def test_a_pruner_keeps_it_at_every_event(combed, remain):
    model, coupling, x = combed
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    schedule = Schedule({'macs': 0.35}, 0, 8, 2)
    by_rows = {'type': 'magnitude', 'roles': ['out']}
    pruner = Pruner(model, coupling, optimizer, schedule, remain=remain, importance=by_rows, normalize='macs')
    with torch.no_grad():
        model.early[1].weight.mul_(1e-3)  # its units go first
    least = 100
    for _ in range(8):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()
        least = min(least, kept(pruner.keep)['early.1'])
    assert pruner.left()['macs'] <= 0.35
    assert least < 60 if not remain else least == 64
    assert compare(model, coupling, pruner.keep) < 1e-12
