"""Use any checkpoint with a config: a slim one, a training one with its keep inside, or bare weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmcpd.engine.build import ConfigLike, as_config, build_dense
from mmcpd.engine.examples import example_data
from mmcpd.engine.passes import DEPLOYED, TESTING, TRAINING, runs
from mmcpd.engine.pruning_state import STATE, check_resumable, pruning_state
from mmcpd.engine.reader import PathLike, readable
from mmcpd.engine.slim_file import is_slim
from mmcpd.engine.slim_model import build_slim, build_trained, check_fit
from mmcpd.engine.stage import refuse_pruned
from mmcpd.engine.wrappers import student_weights, trained_config, type_name
from mmcpd.errors import SlimError
from mmcpd.prune.finite import broken_tensor
from mmcpd.random_state import seeded
from mmcpd.slim.weights import is_extra_state, weights

TOLERANCE = 1e-3  # of the largest output, in float32


# -- weights into a model ----------------------------------------------------------------------------------------------
def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Read any checkpoint as MMEngine does: training checkpoints hold more than weights.

    Raises:
        SlimError: The file is missing, truncated, no checkpoint, or it would have to run code.
    """
    with readable(path):
        content = CheckpointLoader.load_checkpoint(os.fspath(path), map_location='cpu', logger='silent')
    if not isinstance(content, dict):
        raise SlimError(f'{path} is not a checkpoint: it holds a {type(content).__name__}')
    content = content if 'state_dict' in content else {'state_dict': content}
    for name in ('state_dict', 'meta'):
        entries = content.setdefault(name, {})
        if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
            raise SlimError(f'{path} is not a checkpoint: its {name} is no table of names')
    pruning_state(content, path)
    return content


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
        SlimError: The checkpoint is unreadable or of another model, its weights are not finite, or nothing has those
            that it leaves out.
    """
    cfg, content = as_config(cfg), read_checkpoint(path)
    if type_name(trained_config(cfg)) != 'slimmed' and is_slim(path):
        raise SlimError(f"{path} is a slim checkpoint and the config's model is dense: give the dense one")
    shape = content.get(STATE, {}).get('input_shape')
    values = student_weights(content)

    def load(seed: int, init: bool) -> tuple[nn.Module, list[str]]:
        with seeded(seed):
            model = build_trained(cfg)
            if init:
                cast(Any, model).init_weights()
            paths, unknown = dict(model.named_modules()), values.keys() - model.state_dict().keys()
            if unknown and all(name.rpartition('.')[0] in paths for name in unknown):
                data = example_data(model, cfg, given=shape)
                for each in (DEPLOYED, TESTING, TRAINING):
                    runs(model, data, each)
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
    if broken := broken_tensor(model):
        raise SlimError(
            f'{path}: {broken} holds a number that is not finite; use a checkpoint from before the run diverged'
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
        SlimError: The checkpoint is unreadable, pruned, slim for a dense model, or of another model.
    """
    checkpoint = read_checkpoint(path)
    if cfg.get('resume'):
        check_resumable(checkpoint, path)
    elif STATE in checkpoint:
        refuse_pruned(path, checkpoint[STATE])
    weights = student_weights(checkpoint)
    if type_name(trained_config(cfg)) == 'slimmed':
        return  # built from a slim.pth, whose weights fitted strictly
    if is_slim(path):
        raise SlimError(
            f"{path} is a slim checkpoint and the config's model is dense; to train it further write "
            f"model = dict(type='mmcpd.slimmed', model=..., structure='{path}')"
        )
    own = build_dense(cfg).state_dict()
    shapes = {name: value.shape for name, value in weights.items() if isinstance(value, torch.Tensor)}
    misfits = [n for n, value in own.items() if isinstance(value, torch.Tensor) and shapes.get(n) != value.shape]
    if len(misfits) > len(own) / 2:
        there = tuple(shapes[misfits[0]]) if misfits[0] in shapes else 'missing'
        raise SlimError(
            f'{path} is of another model: {len(misfits)} of {len(own)} tensors do not fit, the first is {misfits[0]}, '
            f'{there} there and {tuple(own[misfits[0]].shape)} here'
        )


def removed_units(checkpoint: Mapping[str, Any]) -> int:
    """Return how many units the keep inside a training checkpoint removes; 0 where it has none."""
    keep = checkpoint[STATE]['pruner']['keep'] if STATE in checkpoint else {}
    return sum(int((~units).sum()) for units in keep.values())
