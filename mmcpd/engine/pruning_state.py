"""The pruning state inside a training checkpoint: that it is one, before anything of it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from mmcpd.engine.reader import PathLike
from mmcpd.engine.slim_content import is_shape
from mmcpd.errors import SlimError

STATE = 'mmcpd'  # where it is in a checkpoint
FIELDS = {
    'pruner': dict, 'begun': bool, 'dense_metrics': dict, 'dense_digest': str, 'best_before': list, 'left': dict,
    'target': dict,
}  # fmt: skip
OF_PRUNER = {'keep': dict, 'importance': dict, 'iteration': int, 'last': int, 'waiting': bool, 'frozen': list}


def pruning_state(checkpoint: Mapping[str, Any], where: PathLike) -> dict[str, Any] | None:
    """Return the pruning state of a training checkpoint, or None where it has none; `where` names it in errors.

    Raises:
        SlimError: What is there is none: the checkpoint is damaged, or something else's.

    Example:
        >>> pruning_state({'state_dict': {}}, 'epoch_1.pth') is None
        True
        >>> pruning_state({'mmcpd': {'pruner': 7}}, 'epoch_1.pth')
        Traceback (most recent call last):
        mmcpd.errors.SlimError: epoch_1.pth holds no pruning state of this mmcpd: its pruner is missing or damaged
    """
    if STATE not in checkpoint:
        return None
    if fault := _fault(checkpoint[STATE]):
        raise SlimError(f'{where} holds no pruning state of this mmcpd: its {fault} is missing or damaged')
    return cast(dict[str, Any], checkpoint[STATE])


def _fault(state: Any) -> str:
    """Return the name of the first entry that is missing or of another type, or nothing."""
    if not isinstance(state, dict):
        return STATE
    for table, fields in ((state, FIELDS), (state.get('pruner'), OF_PRUNER)):
        for name, kind in fields.items():
            if not isinstance(table, dict) or not isinstance(table.get(name), kind):
                return name
    pruner = state['pruner']
    for name, units in pruner['keep'].items():
        if type(name) is not str or type(units) is not Tensor or units.dtype != torch.bool or units.dim() != 1:
            return 'keep'
    if not all(isinstance(value, Tensor) for value in pruner['importance'].values()):
        return 'importance'
    shares = [*state['target'].items(), *((name, state['left'].get(name)) for name in state['target'])]
    if any(type(name) is not str or not isinstance(share, int | float) for name, share in shares):
        return 'left'
    if state.get('input_shape') is not None and not is_shape(state['input_shape']):
        return 'input_shape'
    if not isinstance(state.get('latency'), dict | None):
        return 'latency'
    for name, texts in (('best_before', state['best_before']), ('frozen', pruner['frozen'])):
        if not all(type(text) is str for text in texts):
            return name
    return ''


def check_resumable(checkpoint: Mapping[str, Any], path: PathLike) -> None:
    """See that a checkpoint has what MMEngine resumes from.

    Raises:
        SlimError: An entry is missing or damaged.
    """
    meta, hub = checkpoint['meta'], checkpoint.get('message_hub')
    places = [(meta, 'epoch', int), (meta, 'iter', int), (hub, 'log_scalars', dict), (hub, 'runtime_info', dict)]
    places += [(checkpoint, 'optimizer', dict)] if 'optimizer' in checkpoint else []
    for table, name, kind in [*places, (hub, 'resumed_keys', dict)]:
        if not isinstance(table, dict) or not isinstance(table.get(name), kind):
            raise SlimError(f'{path} cannot be resumed: its {name} is missing or damaged; to start from it, load_from')
