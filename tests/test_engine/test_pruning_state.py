"""What a training checkpoint holds beside weights is checked where it is read."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.pruning_state import check_resumable, pruning_state
from mmcpd.errors import SlimError

STATE: dict[str, Any] = {
    'pruner': {
        'keep': {'conv': torch.tensor([True, False])},
        'importance': {'total': torch.zeros(2)},
        'iteration': 3,
        'last': 2,
        'waiting': False,
        'frozen': ['head'],
    },
    'begun': True,
    'dense_metrics': {'accuracy': 90.0},
    'dense_digest': 'ab',
    'best_before': ['best_1.pth'],
    'left': {'macs': 0.7, 'params': 0.8},
    'target': {'macs': 0.5},
    'input_shape': [3, 32, 32],
}
WRONG: tuple[Any, ...] = (
    None,
    7,
    'x',
    [1],
    {1: 2},
    {'a': 'b'},
    torch.ones(2),
    [torch.ones(1)],
    {'conv': torch.ones(2)},
)
PLACES = [(key,) for key in STATE] + [('pruner', key) for key in STATE['pruner']]


def with_value(place: tuple[str, ...], value: Any) -> dict[str, Any]:
    state = copy.deepcopy(STATE)
    table = state
    for key in place[:-1]:
        table = table[key]
    table[place[-1]] = value
    return state


def is_right(place: tuple[str, ...], value: Any) -> bool:
    """Say which of the values above are as good as what the run wrote."""
    name = place[-1]
    if name == 'input_shape':
        return value is None or (isinstance(value, list) and type(value[0]) is int)
    if name in ('iteration', 'last'):
        return type(value) is int
    if name == 'importance':
        return isinstance(value, dict) and all(isinstance(each, torch.Tensor) for each in value.values())
    return (name == 'dense_digest' and value == 'x') or (name == 'dense_metrics' and isinstance(value, dict))


def test_a_state_as_it_is_written_is_taken(tmp_path: Path) -> None:
    torch.save({'state_dict': {}, 'mmcpd': STATE}, tmp_path / 'epoch_1.pth')
    found = read_checkpoint(tmp_path / 'epoch_1.pth')['mmcpd']
    assert found['pruner']['keep']['conv'].tolist() == [True, False]


@pytest.mark.parametrize('place', PLACES, ids='.'.join)
@pytest.mark.parametrize('number', range(len(WRONG)))
def test_an_entry_of_another_type_is_named(place: tuple[str, ...], number: int, tmp_path: Path) -> None:
    state = with_value(place, WRONG[number])
    if is_right(place, WRONG[number]):
        assert pruning_state({'mmcpd': state}, 'a.pth') is state
        return
    torch.save({'state_dict': {}, 'mmcpd': state}, tmp_path / 'a.pth')
    with pytest.raises(SlimError, match=r'a\.pth holds no pruning state of this mmcpd: its \w+ is missing') as caught:
        read_checkpoint(tmp_path / 'a.pth')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('place', PLACES, ids='.'.join)
def test_an_entry_that_is_missing_is_named(place: tuple[str, ...]) -> None:
    state = copy.deepcopy(STATE)
    del (state if len(place) == 1 else state['pruner'])[place[-1]]
    if place == ('input_shape',):  # noise of any size will do
        assert pruning_state({'mmcpd': state}, 'a.pth') is state
    else:
        with pytest.raises(SlimError, match='is missing or damaged'):
            pruning_state({'mmcpd': state}, 'a.pth')


@pytest.mark.parametrize('content', ({'state_dict': 7}, {'state_dict': {1: 2}}, {'state_dict': {}, 'meta': [1]}))
def test_tables_that_are_none_are_one_line(content: dict[str, Any], tmp_path: Path) -> None:
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(SlimError, match='is no table of names'):
        read_checkpoint(tmp_path / 'a.pth')


def test_what_cannot_be_resumed_says_what_is_missing() -> None:
    whole: dict[str, Any] = {
        'meta': {'epoch': 1, 'iter': 4},
        'message_hub': {'log_scalars': {}, 'runtime_info': {}, 'resumed_keys': {}},
        'optimizer': {},
    }
    check_resumable(whole, 'a.pth')
    for part, name in (('meta', 'iter'), ('message_hub', 'runtime_info')):
        broken = copy.deepcopy(whole)
        broken[part][name] = 'x'
        with pytest.raises(SlimError, match=f'cannot be resumed: its {name} is missing or damaged'):
            check_resumable(broken, 'a.pth')
    with pytest.raises(SlimError, match='its optimizer is missing'):
        check_resumable({**whole, 'optimizer': 7}, 'a.pth')
