"""Use any checkpoint with a config: a slim one, a training one with its keep inside, or bare weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.engine.build import build_dense, student_config, type_name, whole_forward
from mmcpd.engine.finish import costs, finish
from mmcpd.engine.hooks import STATE
from mmcpd.engine.inputs import example_inputs, noise
from mmcpd.engine.options import comb_options
from mmcpd.engine.slimmed import fill, is_slim, load_slim, read_checkpoint
from mmcpd.engine.teachers import student_weights
from mmcpd.errors import SlimError
from mmcpd.slim import mask_

OUR_HOOKS = ('CombHook', 'PruneHook')
PathLike = str | os.PathLike


def load_dense(cfg: Config, path: PathLike) -> nn.Module:
    """Build a config's dense model with a checkpoint's weights, loaded strictly, in eval mode.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.

    Example:
        >>> model = load_dense(cfg, 'work_dirs/resnet50_prune/dense.pth')
    """
    model = build_dense(cfg)
    fill(model, student_weights(read_checkpoint(path)), path)
    return model.eval()


def check_start(cfg: Config, path: PathLike) -> None:
    """See that training may start from a checkpoint: MMEngine passes over what does not fit, up to everything.

    A new head on known features is a good start, so half of the model's weights must fit.

    Raises:
        SlimError: The checkpoint is unreadable, slim for a dense model, or of another model.

    Example:
        >>> check_start(cfg, 'resnet50_8xb32_in1k_20210831-ea4938fc.pth')
    """
    weights = student_weights(read_checkpoint(path))
    if type_name(cfg.model) == 'slimmed':
        return  # built from a slim.pth, or fitted strictly by whoever wrote the structure
    if is_slim(path):
        raise SlimError(
            f"{path} is a slim checkpoint and the config's model is dense; to train it further write "
            f"model = dict(type='slimmed', model=..., structure='{path}')"
        )
    own = build_dense(cfg).state_dict()
    misfits = [name for name, value in own.items() if name not in weights or weights[name].shape != value.shape]
    if len(misfits) > len(own) / 2:
        there = tuple(weights[misfits[0]].shape) if misfits[0] in weights else 'missing'
        raise SlimError(
            f'{path} is of another model: {len(misfits)} of {len(own)} tensors do not fit, the first is {misfits[0]}, '
            f'{there} there and {tuple(own[misfits[0]].shape)} here'
        )


def removed_units(checkpoint: Mapping[str, Any]) -> int:
    """Return how many units the keep inside a training checkpoint removes; 0 where it has none."""
    keep = checkpoint.get(STATE, {}).get('keep', {})
    return sum(int((~units).sum()) for units in keep.values())


def comb_by_config(model: nn.Module, cfg: Config, **given: Any) -> Coupling:
    """Coupling a bare model as training by this config would; options that are given win.

    Example:
        >>> print(comb_by_config(build_dense(cfg), cfg, heads='head'))
    """
    options = {**comb_options(cfg), **given}
    options.pop('save', None)
    shape = options.pop('input_shape', None)
    example = noise(1, shape) if shape else example_inputs(cfg)
    return comb(model, example, forward=whole_forward, **options)


def slim_checkpoint(cfg: Config, path: PathLike, out: PathLike) -> dict[str, Any]:
    """Cut a slim.pth from a training checkpoint that has its keep inside, and return its `meta`.

    Raises:
        SlimError: The checkpoint is unreadable, of another model, or nothing was pruned in it yet.

    Example:
        >>> slim_checkpoint(cfg, 'work_dirs/resnet50_prune/epoch_30.pth', 'slim.pth')['slim']['macs']
    """
    checkpoint = read_checkpoint(path)
    if removed_units(checkpoint) == 0:
        reason = 'no unit is removed in it yet' if STATE in checkpoint else 'it holds no pruning state'
        raise SlimError(f'{path} cannot be slimmed: {reason}. Give a checkpoint from after pruning began')
    model, keep = load_dense(cfg, path), checkpoint[STATE]['keep']
    found = comb_by_config(model, cfg)
    try:
        mask_(model, found, keep)
    except ValueError as error:
        raise SlimError(f'{path} does not fit what combing finds in {cfg.filename}: {error}') from error
    told = checkpoint.get('meta', {})
    meta = {key: told[key] for key in ('cfg', 'epoch', 'iter', 'dataset_meta') if key in told}
    meta |= {'dense': costs(found, found.keep()), 'slim': costs(found, keep)}
    finish(model, found, keep, Path(out), meta)
    return meta


def use_checkpoint(cfg: Config, path: PathLike, folder: Path) -> None:
    """Make a config test a checkpoint, in place: its model becomes the bare student, dense or slim.

    A pruned training checkpoint is slimmed first: its weights alone do not say over which units a norm computes.

    Args:
        cfg: The config; a distiller around its model and the hooks that prune are dropped.
        path: A slim.pth, a training checkpoint, or bare weights; it is read and checked now.
        folder: Where a slim.pth may be put, to stay until the model is built.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.

    Example:
        >>> use_checkpoint(cfg, 'work_dirs/resnet50_prune/slim.pth', Path('/tmp'))
        >>> Runner.from_cfg(cfg).test()
    """
    student = student_config(cfg)
    if not is_slim(path):
        if removed_units(read_checkpoint(path)) > 0:
            slim_checkpoint(cfg, path, folder / 'slim.pth')
            path = folder / 'slim.pth'
        else:
            load_dense(cfg, path)
    if is_slim(path):
        load_slim(cfg, path)
        cfg.model = {'type': 'slimmed', 'model': student, 'structure': os.fspath(path)}
        cfg.load_from = None
    else:
        cfg.model, cfg.load_from = student, os.fspath(path)
    cfg.resume = False
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or () if type_name(hook) not in OUR_HOOKS]
