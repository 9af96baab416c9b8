"""Use any checkpoint with a config: a slim one, a training one with its keep inside, or bare weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.build import HOOKS_OF_OURS, ConfigLike, as_config, build_dense, whole_forward
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.examples import example_inputs
from mmcpd.engine.report import costs
from mmcpd.engine.slim_file import PathLike, is_slim, readable, save_slim
from mmcpd.engine.slim_model import build_slim, build_trained, check_fit
from mmcpd.engine.wrappers import student_config, student_weights, trained_config, type_name
from mmcpd.errors import SlimError
from mmcpd.random_state import seeded
from mmcpd.slim import mask_, slim, structure
from mmcpd.slim.compare import compare, evaluating
from mmcpd.slim.weights import is_extra_state, weights

STATE = 'mmcpd'  # where the pruning state is in a training checkpoint
TOLERANCE = 1e-3  # of the largest output, in float32


# -- weights into a model ----------------------------------------------------------------------------------------------
def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Read any checkpoint as MMEngine does: training checkpoints hold more than weights.

    Raises:
        SlimError: The file is missing, truncated, or no checkpoint.
    """
    with readable(path):
        content = CheckpointLoader.load_checkpoint(os.fspath(path), map_location='cpu', logger='silent')
    if not isinstance(content, dict):
        raise SlimError(f'{path} is not a checkpoint: it holds a {type(content).__name__}')
    return content if 'state_dict' in content else {'state_dict': content}


def fill(model: nn.Module, state_dict: Mapping[str, Any], where: PathLike) -> list[str]:
    """Load a state dict strictly, in place; `where` names its origin in errors.

    Returns:
        The names of the weights that it leaves as they were: a hook of the model keeps them out of its state dict.

    Raises:
        SlimError: A tensor is missing, left over, or of another shape; the message names the first.
    """
    own = model.state_dict()
    # Weights from before torch 0.4.1 have no counters; only a norm without momentum reads them.
    counters = {name: value for name, value in own.items() if name.endswith('num_batches_tracked')}
    state_dict = {**counters, **state_dict}
    check_fit(own, state_dict, where, type(model).__name__)
    tensors = {name: value for name, value in weights(model).items() if not is_extra_state(name)}
    before = {name: value._version for name, value in tensors.items()}
    model.load_state_dict(state_dict, strict=True)
    return [name for name, value in tensors.items() if value._version == before[name] and value.numel()]


def load_dense(cfg: ConfigLike, path: PathLike) -> nn.Module:
    """Build the model that a config trains with a checkpoint's weights, loaded strictly, in eval mode.

    It is slim where the config's model is `slimmed`. What the model makes in its first forward is made. What hooks keep
    out of its checkpoints (LoRA's trunk) is what the config loads.

    Raises:
        SlimError: The checkpoint is unreadable or of another model, or nothing has the weights that it leaves out.
    """
    cfg, content = as_config(cfg), read_checkpoint(path)
    shape = content.get(STATE, {}).get('input_shape')
    values = student_weights(content)

    def load(seed: int, init: bool) -> tuple[nn.Module, list[str]]:
        with seeded(seed):
            model = build_trained(cfg)
            if init:
                cast(Any, model).init_weights()
            paths, unknown = dict(model.named_modules()), values.keys() - model.state_dict().keys()
            if unknown and all(name.rpartition('.')[0] in paths for name in unknown):
                with evaluating(model):
                    whole_forward(model, example_inputs(cfg, shape))
        return model, fill(model, values, path)

    model, left = load(0, False)
    if left and hasattr(model, 'init_weights'):
        model, left = load(0, True)
    others = weights(load(1, True)[0]) if left else {}
    if drawn := [name for name in left if not torch.equal(weights(model)[name], others[name])]:
        raise SlimError(
            f'{path} leaves out {drawn[0]}, as {type(model).__name__} writes its checkpoints, and the config loads it '
            'from nowhere: name the file that has it in init_cfg, or use the slim.pth that training wrote'
        )
    return model.eval()


def load_slim(config: ConfigLike, checkpoint: PathLike, *, device: str | torch.device = 'cpu') -> nn.Module:
    """Build the slim model of a config and its checkpoint: the original class, really smaller, in eval mode.

    Args:
        config: The config that was pruned, or its path; its model may be bare, inside a distiller, or a `slimmed` one
            that was pruned further: the dense model's config is enough.
        checkpoint: A `slim.pth`.
        device: Where the model goes.

    Raises:
        SlimError: The checkpoint is unreadable, not a slim one, or of another model.

    Example:
        >>> model = load_slim('configs/cpd/resnet50_prune.py', 'slim.pth')  # doctest: +SKIP
        >>> model(torch.rand(1, 3, 32, 32), mode='tensor').shape            # doctest: +SKIP
        torch.Size([1, 10])
    """
    return build_slim(config, checkpoint).to(device).eval()


def load_any(cfg: ConfigLike, path: PathLike) -> nn.Module:
    """Build the model that a checkpoint is of, slim or dense, with its weights, in eval mode.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.
    """
    return load_slim(cfg, path) if is_slim(path) else load_dense(cfg, path)


# -- training checkpoints ----------------------------------------------------------------------------------------------
def check_start(cfg: Config, path: PathLike) -> None:
    """See that training may start from a checkpoint: MMEngine passes over what does not fit, up to everything.

    A new head on known features is a good start, so half of the model's weights must fit.

    Raises:
        SlimError: The checkpoint is unreadable, slim for a dense model, or of another model.
    """
    weights = student_weights(read_checkpoint(path))
    if type_name(trained_config(cfg)) == 'slimmed':
        return  # built from a slim.pth, whose weights fitted strictly
    if is_slim(path):
        raise SlimError(
            f"{path} is a slim checkpoint and the config's model is dense; to train it further write "
            f"model = dict(type='mmcpd.slimmed', model=..., structure='{path}')"
        )
    own = build_dense(cfg).state_dict()
    misfits = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if len(misfits) > len(own) / 2:
        there = tuple(weights[misfits[0]].shape) if misfits[0] in weights else 'missing'
        raise SlimError(
            f'{path} is of another model: {len(misfits)} of {len(own)} tensors do not fit, the first is {misfits[0]}, '
            f'{there} there and {tuple(own[misfits[0]].shape)} here'
        )


def cut_checked(model: nn.Module, coupling: Coupling, keep: Keep) -> nn.Module:
    """Cut a bare model that is masked by `keep`, compare the two, and return the slim one.

    Raises:
        SlimError: the two models do not compute the same.
    """
    small = slim(model, coupling, keep)
    off = compare(model, coupling, keep, small)
    if off > TOLERANCE:
        raise SlimError(
            f'the slim model is off the masked one by {off:.1e} of the largest output, so nothing is written: '
            'the forward does something that combing does not see. `mmcpd comb` lists the groups; name those of '
            'the module at fault in ignore=[...] of PruneHook and prune again'
        )
    return small


def save_checked(model: nn.Module, coupling: Coupling, keep: Keep, path: Path, meta: Mapping[str, Any]) -> None:
    """Cut a bare model that is masked by `keep`, and write the slim one to `path`.

    Raises:
        SlimError: as `cut_checked`; then nothing is written.
    """
    small = cut_checked(model, coupling, keep)
    save_slim(path, small, structure(model, small), meta)


def slim_checkpoint(cfg: Config, path: PathLike, out: PathLike) -> dict[str, Any]:
    """Cut a slim.pth from a training checkpoint that has its keep inside, and return its `meta`.

    The model is combed with an input of the shape that training combed it with.

    Raises:
        SlimError: The checkpoint is unreadable, of another model, or nothing was pruned in it yet.
    """
    checkpoint = read_checkpoint(path)
    if removed_units(checkpoint) == 0:
        reason = 'no unit is removed in it yet' if STATE in checkpoint else 'it holds no pruning state'
        raise SlimError(f'{path} cannot be slimmed: {reason}. Give a checkpoint from after pruning began')
    model, state = load_dense(cfg, path), checkpoint[STATE]
    keep, shape = state['pruner']['keep'], state['input_shape']
    coupling = comb_by_config(model, cfg, input_shape=shape)
    try:
        mask_(model, coupling, keep)
    except ValueError as error:
        raise SlimError(f'{path} does not fit what combing finds in {cfg.filename}: {error}') from error
    written = checkpoint.get('meta', {})
    meta = {key: written[key] for key in ('cfg', 'epoch', 'iter', 'dataset_meta') if key in written}
    meta |= {'input_shape': shape, 'dense': costs(coupling, coupling.keep()), 'slim': costs(coupling, keep)}
    save_checked(model, coupling, keep, Path(out), meta)
    return meta


def loadable(cfg: Config, path: PathLike, folder: Path) -> PathLike:
    """Return the path of a checkpoint that `load_any` reads as it was: a pruned training checkpoint is slimmed first.

    Its weights alone do not say over which units a norm computes. The slim one goes into `folder`, which must stay
    until the model is built.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.
    """
    if is_slim(path) or removed_units(read_checkpoint(path)) == 0:
        return path
    slim_checkpoint(cfg, path, folder / 'slim.pth')
    return folder / 'slim.pth'


def use_checkpoint(cfg: Config, path: PathLike, folder: Path) -> None:
    """Make a config test a checkpoint, in place: its model becomes the bare student, dense or slim.

    A pruned training checkpoint is slimmed first, as in `loadable`. The hooks that prune are dropped from the config.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.
    """
    path = loadable(cfg, path, folder)
    load_any(cfg, path)  # to check that it fits, before a Runner is built
    file = os.fspath(path)
    if is_slim(path):
        cfg.model, cfg.load_from = {'type': 'mmcpd.slimmed', 'model': student_config(cfg), 'structure': file}, None
    else:
        cfg.model, cfg.load_from = trained_config(cfg), file
    cfg.resume = False
    hooks = cfg.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if hook and type_name(hook) in HOOKS_OF_OURS]:
        hooks.pop(name)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or () if type_name(hook) not in HOOKS_OF_OURS]


def removed_units(checkpoint: Mapping[str, Any]) -> int:
    """Return how many units the keep inside a training checkpoint removes; 0 where it has none."""
    keep = checkpoint[STATE]['pruner']['keep'] if STATE in checkpoint else {}
    return sum(int((~units).sum()) for units in keep.values())
