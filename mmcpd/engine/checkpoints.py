"""Use any checkpoint with a config: a slim one, a training one with its keep inside, or bare weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.build import HOOKS_OF_OURS, ConfigLike, build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.proof import proof_batches, prove
from mmcpd.engine.random_state import seeded
from mmcpd.engine.report import costs
from mmcpd.engine.slim_file import PathLike, is_slim, plain_entries, read_slim, readable, save_slim
from mmcpd.engine.stage import refuse_pruned
from mmcpd.engine.wrappers import student_config, student_weights, type_name
from mmcpd.errors import ProofError, SlimError
from mmcpd.registry import MODELS
from mmcpd.slim import mask_, restructure_, slim, structure
from mmcpd.slim.compare import compare

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


def fill(model: nn.Module, state_dict: Mapping[str, torch.Tensor], where: PathLike) -> None:
    """Load weights strictly, in place; `where` names their origin in errors.

    Raises:
        SlimError: A tensor is missing, left over, or of another shape; the message names the first.
    """
    own = model.state_dict()
    kind = type(model).__name__
    # Weights from before torch 0.4.1 have no counters; only a norm without momentum reads them.
    counters = {name: value for name, value in own.items() if name.endswith('num_batches_tracked')}
    state_dict = {**counters, **state_dict}
    for name, tensor in own.items():
        if name not in state_dict:
            raise SlimError(f'{where} is of another model: it lacks {name}, which {kind} has')
        if state_dict[name].shape != tensor.shape:
            raise SlimError(
                f'{where} is of another model: {name} is {tuple(state_dict[name].shape)} there and '
                f'{tuple(tensor.shape)} in {kind}'
            )
    for name in state_dict:
        if name not in own:
            raise SlimError(f'{where} is of another model: it has {name}, which {kind} has not')
    model.load_state_dict(state_dict, strict=True)


def load_dense(cfg: ConfigLike, path: PathLike) -> nn.Module:
    """Build a config's dense model with a checkpoint's weights, loaded strictly, in eval mode.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.
    """
    weights = student_weights(read_checkpoint(path))
    model = build_dense(cfg)
    fill(model, weights, path)
    return model.eval()


def load_slim(config: ConfigLike, checkpoint: PathLike, *, device: str | torch.device = 'cpu') -> nn.Module:
    """Build the slim model of a config and its checkpoint: the original class, really smaller, in eval mode.

    Args:
        config: The config that was pruned, or its path; its model may be bare or inside a distiller.
        checkpoint: A `slim.pth`.
        device: Where the model goes.

    Raises:
        SlimError: The checkpoint is unreadable, not a slim one, or of another model.

    Example:
        >>> model = load_slim('configs/cpd/resnet50_prune.py', 'slim.pth')  # doctest: +SKIP
        >>> model(torch.rand(1, 3, 32, 32), mode='tensor').shape            # doctest: +SKIP
        torch.Size([1, 10])
    """
    content = read_slim(checkpoint)
    return _cut_to(build_dense(config), content, checkpoint).to(device).eval()


def load_any(cfg: ConfigLike, path: PathLike) -> nn.Module:
    """Build the model that a checkpoint is of, slim or dense, with its weights, in eval mode.

    Raises:
        SlimError: The checkpoint is unreadable or of another model.
    """
    return load_slim(cfg, path) if is_slim(path) else load_dense(cfg, path)


@MODELS.register_module()
def slimmed(
    model: Mapping[str, Any], structure: PathLike, data_preprocessor: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a slim model of the dense one's class, for a config: to test, fine-tune and deploy like any other.

    Args:
        model: The config of the dense model.
        structure: A `slim.pth`; its weights survive `init_weights`, and `load_from` wins over them.
        data_preprocessor: Given by the Runner, used where `model` has none.

    Raises:
        SlimError: The checkpoint is unreadable, not a slim one, or of another model.

    Example:
        >>> model = dict(type='mmcpd.slimmed', model=dict(type='ImageClassifier'), structure='slim.pth')
    """
    config = dict(model)
    if data_preprocessor is not None:
        config.setdefault('data_preprocessor', data_preprocessor)
    content = read_slim(structure)
    small: Any = _cut_to(MODELS.build(config), content, structure)
    # MMEngine initialises a model when training starts; a pretrained init_cfg comes last.
    small.init_cfg = {'type': 'Pretrained', 'checkpoint': os.fspath(structure)}
    return small


def _cut_to(model: nn.Module, content: Mapping[str, Any], where: PathLike) -> nn.Module:
    """Cut a dense model, in place, to a slim checkpoint's structure, and fill it; `where` names the file in errors."""
    if not content['structure'].keys() >= {'tensors', 'attributes', 'replaced'}:
        raise SlimError(f'{where} holds no structure of a slim model')
    try:
        model = restructure_(model, content['structure'])
    except SlimError as error:
        raise SlimError(f'{where} does not fit {type(model).__name__}: {error}') from error
    fill(model, content['state_dict'], where)
    return model


# -- training checkpoints ----------------------------------------------------------------------------------------------
def check_start(cfg: Config, path: PathLike) -> None:
    """See that training may start from a checkpoint: MMEngine passes over what does not fit, up to everything.

    A new head on known features is a good start, so half of the model's weights must fit.

    Raises:
        SlimError: The checkpoint is unreadable, pruned, slim for a dense model, or of another model.
    """
    checkpoint = read_checkpoint(path)
    if STATE in checkpoint and not cfg.get('resume'):
        refuse_pruned(path, checkpoint[STATE])
    weights = student_weights(checkpoint)
    if type_name(cfg.model) == 'slimmed':
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


@dataclass(frozen=True)
class Proof:
    """What a slim file is proved by: a fresh dense model, and batches as loaders give them."""

    build: Callable[[], nn.Module]
    batches: Sequence[Any]

    @classmethod
    def of_config(cls, cfg: Config, model: nn.Module) -> Proof:
        return cls(lambda: build_dense(cfg), proof_batches(cfg, model))


def save_checked(
    model: nn.Module, coupling: Coupling, keep: Keep, path: Path, meta: Mapping[str, Any], proof: Proof
) -> None:
    """Cut a bare model that is masked by `keep`, and write the slim one to `path`, proved.

    Raises:
        SlimError: as `cut_checked` and `save_proved`; then nothing is written.
    """
    small = cut_checked(model, coupling, keep)
    save_proved(path, small, structure(model, small), meta, proof, model)


def save_proved(
    path: Path, small: nn.Module, plan: Mapping[str, Any], meta: Mapping[str, Any], proof: Proof, model: nn.Module
) -> None:
    """Write a slim model to `path` once the file, read into a fresh model, computes what `model` computes.

    Raises:
        ProofError: it does not, or cannot be read so; then nothing is written.
    """
    unproved = path.with_name(f'{path.name}.unproved')
    try:
        save_slim(unproved, small, plan, meta)
        with seeded(0):
            fresh = proof.build()
        try:
            fresh = _cut_to(fresh, read_slim(unproved), path.name)
        except SlimError as error:
            raise ProofError(
                f'a model that is built anew from the config cannot be filled from {path.name} ({error}), so nothing '
                'was written: does the config build the model that was trained?'
            ) from error
        prove(model, fresh, proof.batches)
        os.replace(unproved, path)
    finally:
        unproved.unlink(missing_ok=True)


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
    if 'dataset_meta' in meta:
        meta['dataset_meta'] = plain_entries(meta['dataset_meta'], 'metainfo')
    meta |= {'input_shape': shape, 'dense': costs(coupling, coupling.keep()), 'slim': costs(coupling, keep)}
    save_checked(model, coupling, keep, Path(out), meta, Proof.of_config(cfg, model))
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
    student, weights = student_config(cfg), os.fspath(path)
    if is_slim(path):
        cfg.model, cfg.load_from = {'type': 'mmcpd.slimmed', 'model': student, 'structure': weights}, None
    else:
        cfg.model, cfg.load_from = student, weights
    cfg.resume = False
    hooks = cfg.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if hook and type_name(hook) in HOOKS_OF_OURS]:
        hooks.pop(name)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or () if type_name(hook) not in HOOKS_OF_OURS]


def removed_units(checkpoint: Mapping[str, Any]) -> int:
    """Return how many units the keep inside a training checkpoint removes; 0 where it has none."""
    keep = checkpoint[STATE]['pruner']['keep'] if STATE in checkpoint else {}
    return sum(int((~units).sum()) for units in keep.values())
