"""Write slim files, each proved before it is called saved; and cut them from training checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from torch import nn

from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.build import HOOKS_OF_OURS
from mmcpd.engine.checkpoint_hook import WHOLE
from mmcpd.engine.checkpoints import load_any, load_dense, read_checkpoint, removed_units
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.proof import proof_batches, prove
from mmcpd.engine.pruning_state import STATE
from mmcpd.engine.reader import PathLike
from mmcpd.engine.report import costs
from mmcpd.engine.slim_file import is_slim, plain_entries, read_slim, save_slim
from mmcpd.engine.slim_model import build_fresh, cut_to_
from mmcpd.engine.stage import stage_meta
from mmcpd.engine.switched import switched
from mmcpd.engine.wrappers import bare_model, student_config, trained_config, type_name
from mmcpd.errors import NotFiniteError, ProofError, SlimError
from mmcpd.files import unfinished_name
from mmcpd.prune.finite import CURES, broken_tensor
from mmcpd.random_state import seeded
from mmcpd.slim import mask_, slim, structure
from mmcpd.slim.compare import compare
from mmcpd.slim.copying import copied
from mmcpd.slim.trial import in_double, random_keep

TOLERANCE = 1e-3  # of the largest output, in float32
TOLERANCE_IN_DOUBLE = 1e-6  # where float32 says more than that: what rounding does there is 1e-9 of it in float64
UNSLIMMED = 'unslimmed.pth'  # the last training checkpoint, where there is no slim file


def cut_checked(model: nn.Module, coupling: Coupling, keep: Keep) -> nn.Module:
    """Cut a bare model that is masked by `keep`, compare the two, and return the slim one.

    Where they differ in float32 they are compared in float64 too: some models make much of rounding.

    Raises:
        SlimError: the two models do not compute the same, or the weights are not finite.
    """
    refuse_not_finite(model)
    small = slim(model, coupling, keep)
    off = compare(model, coupling, keep, small)
    tolerance = TOLERANCE
    if TOLERANCE < off < inf:
        twin, example = in_double(model, coupling.example)
        off, tolerance = compare(twin, replace(coupling, example=example), keep), TOLERANCE_IN_DOUBLE
    if off > tolerance:
        raise SlimError(
            f'the slim model is off the masked one by {off:.1e} of the largest output, so nothing is written: '
            'the forward does something that combing does not see. `mmcpd comb` lists the groups; name those of '
            'the module at fault in ignore=[...] of PruneHook and prune again'
        )
    return small


def refuse_not_finite(model: nn.Module, since: int | None = None) -> None:
    """Refuse to slim weights that are not finite; `since` is the first iteration whose losses were not, where known.

    Raises:
        NotFiniteError: with the tensor, and what to do.

    Example:
        >>> _ = model.fc.bias.data.fill_(torch.nan)
        >>> refuse_not_finite(model, since=120)
        Traceback (most recent call last):
        mmcpd.errors.NotFiniteError: fc.bias is not finite since iteration 120, so nothing is written: go on from ...
    """
    name = broken_tensor(model)
    if name is not None:
        when = 'is not finite' if since is None else f'is not finite since iteration {since}'
        raise NotFiniteError(f'{name} {when}, so nothing is written: go on from an earlier checkpoint, and {CURES}')


@dataclass(frozen=True)
class Proof:
    """What a slim file is proved by: what builds a fresh dense model, and batches as loaders give them."""

    build: Callable[[], nn.Module]
    batches: Sequence[Any]

    @classmethod
    def of_config(cls, cfg: Config, model: nn.Module) -> Proof:
        return cls(lambda: build_fresh(cfg), proof_batches(cfg, model))

    @classmethod
    def of_runner(cls, runner: Runner, untrained: nn.Module | None = None) -> Proof:
        """Prove by a runner's config and data, or by a copy of a model that no config describes."""
        build = partial(build_fresh, runner.cfg) if untrained is None else partial(copied, untrained)
        return cls(build, proof_batches(runner, bare_model(runner.model)))


def save_checked(
    model: nn.Module, coupling: Coupling, keep: Keep, path: Path, meta: Mapping[str, Any], proof: Proof
) -> None:
    """Cut a bare model that is masked by `keep`, and write the slim one to `path`, proved.

    Raises:
        SlimError: as `cut_checked` and `save_proved`; then nothing is written.
    """
    save_proved(path, cut_checked(model, coupling, keep), meta, proof, model)


def save_proved(path: Path, small: nn.Module, meta: Mapping[str, Any], proof: Proof, model: nn.Module) -> None:
    """Write a slim model to `path` once the file, read into a fresh model, computes what `model` computes.

    Raises:
        ProofError: it does not, or cannot be read so; then nothing is written.
    """
    unproved = unfinished_name(path, '.unproved')  # two runs may write into one folder
    with seeded(0):
        fresh = proof.build()
    settings = switched(fresh, model)
    try:
        save_slim(unproved, small, structure(fresh, small), meta)
        try:
            fresh = cut_to_(fresh, read_slim(unproved), path.name)
        except SlimError as error:
            raise ProofError(
                f'a model that is built anew from the config cannot be filled from {path.name} ({error}), so nothing '
                'was written: does the config build the model that was trained?'
            ) from error
        prove(model, fresh, proof.batches, settings)
        os.replace(unproved, path)
    finally:
        unproved.unlink(missing_ok=True)


@contextmanager
def nothing_trained() -> Iterator[None]:
    """Turn a ProofError, which says that trained weights are there, into a SlimError where there are none."""
    try:
        yield
    except ProofError as error:
        raise SlimError(str(error)) from error


def keep_unslimmed(runner: Runner, error: Exception) -> None:
    """Write a training checkpoint where no slim file could be written, and log how to go on.

    Weights that are not finite are no use to anyone.
    """
    if isinstance(error, NotFiniteError):
        runner.logger.error(f'there is no slim.pth: {error}')
        return
    runner.save_checkpoint(runner.work_dir, UNSLIMMED, save_optimizer=False, backend_args={'backend': WHOLE})
    runner.logger.exception(
        f'there is no slim.pth: {error}. The pruned weights are in {UNSLIMMED}: once the cause is mended, `mmcpd slim '
        f'CONFIG {Path(runner.work_dir) / UNSLIMMED}` goes on from there'
    )


def rehearse(model: nn.Module, coupling: Coupling, proof: Proof) -> None:
    """See that a slim file of this model could be read again, with half of the units gone; the model is left alone.

    Raises:
        SlimError: what would not fit.
    """
    keep, masked = random_keep(coupling, 0.5, 0), copied(model, caches=coupling.caches)
    mask_(masked, coupling, keep)
    with TemporaryDirectory() as folder, nothing_trained():
        save_checked(masked, coupling, keep, Path(folder) / 'slim.pth', {}, proof)


# -- training checkpoints ----------------------------------------------------------------------------------------------
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
    meta |= stage_meta(state)
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
    file = os.fspath(path)
    if is_slim(path):
        cfg.model, cfg.load_from = {'type': 'mmcpd.slimmed', 'model': student_config(cfg), 'structure': file}, None
    else:
        cfg.model, cfg.load_from = trained_config(cfg), file
    drop_pruning(cfg)


def drop_pruning(cfg: Config) -> None:
    """Let a config test what is given, in place: nothing is resumed, and the hooks that prune are dropped."""
    cfg.resume = False
    hooks = cfg.get('default_hooks') or {}
    for name in [name for name, hook in hooks.items() if hook and type_name(hook) in HOOKS_OF_OURS]:
        hooks.pop(name)
    cfg.custom_hooks = [hook for hook in cfg.get('custom_hooks') or () if type_name(hook) not in HOOKS_OF_OURS]
