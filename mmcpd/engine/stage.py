"""How far the model in a training checkpoint was pruned, in words."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from mmcpd.engine.report import ROWS
from mmcpd.errors import SlimError, TargetError


def stage_of(state: Mapping[str, Any] | None) -> str:
    """Say whether a model is dense, partly pruned or at its target, from the pruning state of its checkpoint.

    Example:
        >>> stage_of({'left': {'macs': 0.71}, 'target': {'macs': 0.5}})
        'partly pruned: 71.0% of the MACs remain, the target is 50.0%'
        >>> stage_of({'left': {'macs': 0.49}, 'target': {'macs': 0.5}})
        'pruned to the target: 49.0% of the MACs remain'
        >>> stage_of({'left': {'macs': 1.0}, 'target': {'macs': 0.5}}), stage_of(None)
        ('dense: no unit is removed yet', 'dense: it holds no pruning state')
    """
    if state is None:
        return 'dense: it holds no pruning state'
    left, target = state['left'], state['target']
    if all(left[quantity] == 1 for quantity in target):
        return 'dense: no unit is removed yet'
    remain = ' and '.join(f'{left[quantity]:.1%} of the {ROWS.get(quantity, (quantity,))[0]}' for quantity in target)
    if at_target(state):
        return f'pruned to the target: {remain} remain'
    goal = ' and '.join(f'{share:.1%}' for share in target.values())
    return f'partly pruned: {remain} remain, the target is {goal}'


def at_target(state: Mapping[str, Any]) -> bool:
    """Tell whether every quantity is down to its target, from the pruning state of a checkpoint.

    Example:
        >>> at_target({'left': {'macs': 0.49, 'params': 0.7}, 'target': {'macs': 0.5}})
        True
    """
    return all(state['left'][quantity] <= share * (1 + 1e-9) for quantity, share in state['target'].items())


def stage_meta(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the `meta` of a slim file holds of a pruning state: what is left, the target, and if it is met.

    Example:
        >>> stage_meta({'left': {'macs': 0.71}, 'target': {'macs': 0.5}})
        {'left': {'macs': 0.71}, 'target': {'macs': 0.5}, 'reached': False}
    """
    return {'left': dict(state['left']), 'target': dict(state['target']), 'reached': at_target(state)}


def check_target(state: Mapping[str, Any], file: str | os.PathLike) -> None:
    """Refuse to call a run done that ended before its target, given the pruning state and the file that it wrote.

    Raises:
        TargetError: with what is left of the model.

    Example:
        >>> check_target({'left': {'macs': 0.71}, 'target': {'macs': 0.5}}, 'slim.pth')
        Traceback (most recent call last):
        mmcpd.errors.TargetError: slim.pth is written, and it is partly pruned: 71.0% of the MACs remain, ...
    """
    if not at_target(state):
        raise TargetError(f'{file} is written, and it is {stage_of(state)}')


def refuse_pruned(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Refuse to start a training from a training checkpoint that was pruned, given its path and pruning state.

    Raises:
        SlimError: with what to do instead.
    """
    if any(not bool(kept.all()) for kept in state['pruner']['keep'].values()):
        raise SlimError(
            f'{path} is a training checkpoint of a run that prunes, {stage_of(state)}: in a dense model its removed '
            'units would train back to life. To go on with that run: --resume (resume=True). To train the pruned '
            "model: cut a slim.pth by `mmcpd slim`, and write model=dict(type='mmcpd.slimmed', model=..., "
            "structure='slim.pth')"
        )
