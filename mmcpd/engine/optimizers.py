"""Which optimizer's steps a hook that prunes may follow, and which ways of training it cannot."""

from __future__ import annotations

from collections.abc import Mapping

from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmcpd.coupling import Coupling
from mmcpd.names import in_short

WHOLE = ('SingleDeviceStrategy', 'DDPStrategy')  # of MMEngine's FlexibleRunner: each process has the whole weights


def refuse_shards(runner: Runner) -> None:
    """Refuse a way of training in which no process sees whole weights and gradients.

    Raises:
        ValueError: with the cure.
    """
    strategy = getattr(runner, 'strategy', None)  # of a FlexibleRunner
    name = '' if strategy is None or type(strategy).__name__ in WHOLE else type(strategy).__name__
    if any(isinstance(module, FullyShardedDataParallel) for module in runner.model.modules()):
        name = name or 'FullyShardedDataParallel'
    if name:
        raise ValueError(
            f"{name} cuts weights, gradients or the optimizer's state into shards, or steps in an engine of its own, "
            'and PruneHook reads and masks them whole: train with DDP (Runner, --launcher pytorch), or on one device'
        )


def optimizer_of(optim_wrapper: object, model: nn.Module, coupling: Coupling) -> OptimWrapper:
    """Return the wrapper of the one optimizer that trains the parameters of all groups.

    Raises:
        ValueError: several optimizers hold them, or none does.
    """
    if isinstance(optim_wrapper, OptimWrapperDict):
        return _holder(dict(optim_wrapper.items()), model, coupling)
    if not isinstance(optim_wrapper, OptimWrapper):
        raise ValueError(f'PruneHook follows the steps of an OptimWrapper: got {type(optim_wrapper).__name__}')
    return optim_wrapper


def _holder(wrappers: Mapping[str, OptimWrapper], model: nn.Module, coupling: Coupling) -> OptimWrapper:
    grouped = {member.tensor for group in coupling.groups for member in group.members}
    parameters = {name: each for name, each in model.named_parameters() if name in grouped and each.requires_grad}
    held: dict[str, list[str]] = {}
    for key, wrapper in wrappers.items():
        owned = {id(parameter) for group in wrapper.optimizer.param_groups for parameter in group['params']}
        names = [name for name, parameter in parameters.items() if id(parameter) in owned]
        held |= {key: names} if names else {}
    if len(held) == 1:
        return wrappers[next(iter(held))]
    found = '; '.join(f"'{key}' trains {in_short(names, 2)}" for key, names in held.items())
    raise ValueError(
        f'PruneHook follows the steps of one optimizer, and the groups are trained by {len(held) or "none"} of '
        f'{", ".join(wrappers)}{": " if found else ""}{found}. Let one optimizer train all of them: '
        'paramwise_cfg=dict(custom_keys=...) gives parts of a model learning rates of their own'
    )
