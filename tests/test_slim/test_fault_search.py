"""The search after a failed trial finds what bisection of all groups finds, in fewer trials."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pytest
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.slim import trial
from mmcpd.slim.fault_search import Fault, search
from mmcpd.slim.trial import trial_of
from tests.helpers import Net, randomise_, sample

COUNT = 40
SETS = [(0,), (17,), (39,), (3, 30), (20, 21), (5, 18, 37), (0, 1, 2)]


def chain(wrong: Callable[[Tensor], Tensor], bad: Collection[int]) -> nn.Module:
    """Return forty residual blocks without a coupling between them but by their trunk, some of which are wrong."""

    def run(m: nn.Module, x: Tensor) -> Tensor:
        x = m.stem(x)
        for number, (norm, up, down) in enumerate(zip(m.norms, m.ups, m.downs, strict=True)):
            y = up(norm(x)).tanh()
            x = x + down(wrong(y) if number in bad else y)
        return m.fc(x)

    numbers = range(COUNT - 1)
    return randomise_(
        Net(
            run,
            stem=nn.Linear(3, 7),
            norms=nn.ModuleList(nn.LayerNorm(7) for _ in numbers),
            ups=nn.ModuleList(nn.Linear(7, 9 + n % 3) for n in numbers),
            downs=nn.ModuleList(nn.Linear(9 + n % 3, 7) for n in numbers),
            fc=nn.Linear(7, 2),
        )
    )


def too_small(x: Tensor) -> Tensor:
    """Divide by the width where combing does not see it."""
    return x * (1.0 / x.shape[-1])


def of_one_width(x: Tensor) -> Tensor:
    """Raise at any other width than those of the dense model."""
    if x.stride(0) not in (9, 10, 11):
        raise ValueError('a width that is fixed')
    return x


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the trials that are held from now on, by the numbers of their groups."""
    seen: list[int] = []
    plain = trial._Trial.fault

    def fault(self: trial._Trial, among: Collection[str], watched: bool = False) -> Fault | None:
        seen.append(len(among))
        return plain(self, among, watched)

    monkeypatch.setattr(trial._Trial, 'fault', fault)
    return seen


def bisected(names: list[str], fault_of: Callable[[Collection[str], bool], Fault | None]) -> dict[str, str]:
    """Search without suspects: all groups are halved again and again."""

    def blind(groups: Collection[str], watched: bool) -> Fault | None:
        fault = fault_of(groups, False)
        return fault and Fault(fault.reason)

    return search(names, blind)


@pytest.mark.parametrize('wrong', [too_small, of_one_width])
@pytest.mark.parametrize('bad', [(17,), (3, 30), (5, 18, 37)], ids=str)
def test_faults_of_a_deep_net_are_found_in_few_trials(
    bad: tuple[int, ...], wrong: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = chain(wrong, bad)
    found = comb(model, sample((4, 3)), trial=False)
    assert len(found.groups) == COUNT
    trials = counted(monkeypatch)
    faults = trial_of(model, found).faults
    assert set(faults) == {f'ups.{number}' for number in bad}
    assert len(trials) <= 2 + 6 * len(bad), trials
    searched = len(trials)
    trials.clear()
    held = trial._Trial(model, found, True, True, False)
    assert set(bisected([group.name for group in found.groups], held.fault)) == set(faults)
    assert searched < 0.75 * len(trials), 'bisection takes as few'


class Scaled(nn.Module):
    """One line divides by the roots of two widths, if it is one that does."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.up, self.other, self.wrong = nn.Linear(7, 9), nn.Linear(7, 11), wrong
        self.down, self.back = nn.Linear(9, 7), nn.Linear(11, 7)

    def narrow(self, x: Tensor) -> Tensor:
        return x / x.shape[-1] ** 0.5 if self.wrong else x

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.narrow(self.up(x))) + self.back(self.narrow(self.other(x)))


@pytest.mark.parametrize('bad', [(0,), (7, 12)], ids=str)
def test_sizes_that_cannot_follow_are_looked_for_in_their_own_module(
    bad: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = nn.Sequential(*(Scaled(number in bad) for number in range(20)))
    model = randomise_(nn.Sequential(nn.Linear(3, 7), blocks, nn.Linear(7, 2)))
    trials = counted(monkeypatch)
    found = comb(model, sample((4, 3)))
    free = {f'1.{n}.{side}' for n in range(20) if n not in bad for side in ('up', 'other')}
    assert {group.name for group in found.groups} == {'0', *free}
    assert len(trials) <= 2 + 6 * len(bad), trials


@pytest.mark.parametrize('bad', SETS, ids=str)
@pytest.mark.parametrize('misled', [False, True])
def test_suspects_never_change_what_is_found(bad: tuple[int, ...], misled: bool) -> None:
    """Also where the suspects are others than those at fault: then all that is left is halved in the end."""

    def fault_of(groups: Collection[str], watched: bool) -> Fault | None:
        wrong = sorted(int(name) for name in groups if int(name) in bad)
        near = {str(wrong[0] + step) for step in ((1, 2) if misled else (0, 1))} if wrong else set()
        return Fault('wrong', frozenset(near if watched else ())) if wrong else None

    names = [str(number) for number in range(COUNT)]
    assert search(names, fault_of) == {str(number): 'wrong' for number in bad}


def test_a_fault_of_two_groups_leaves_one_of_them() -> None:
    def fault_of(groups: Collection[str], watched: bool) -> Fault | None:
        return Fault('both', frozenset(('7',) if watched else ())) if {'3', '7'} <= set(groups) else None

    assert search([str(number) for number in range(COUNT)], fault_of) == {'7': 'both'}
