"""Write and read `slim.pth`: weights and a JSON structure that make a dense config's model a slim one."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from mmcpd.engine.build import ConfigLike, build_dense
from mmcpd.errors import SlimError
from mmcpd.slim import restructure_
from mmcpd.version import __version__

# What unpickling may raise on bytes that are no checkpoint, or half of one.
GARBAGE = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError)

PathLike = str | os.PathLike


def save_slim(path: PathLike, model: nn.Module, structure: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Write a slim model's checkpoint, whole or not at all.

    Args:
        path: The file to write; its folder is made.
        model: The slim model.
        structure: What `mmcpd.prune.structure` returned for the dense model and it.
        meta: What a reader should know: plain values only. MMEngine's own readers look for `dataset_meta`.

    Raises:
        ValueError: `meta` or `structure` holds something that is not plain; reading it could run code.

    Example:
        >>> small = slim(model, c, keep)
        >>> save_slim('slim.pth', small, structure(model, small), {'cfg': cfg.pretty_text})
    """
    path = Path(path)
    content = {
        'state_dict': {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()},
        'structure': json.dumps(_plain(structure, 'structure')),
        'meta': {'mmcpd_version': __version__, **_plain(meta, 'meta')},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(path, content)


def save_whole(path: Path, content: dict[str, Any]) -> None:
    """Write a file of `torch.save` whole or not at all: beside `path`, then renamed."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_slim(path: PathLike) -> dict[str, Any]:
    """Read a slim checkpoint without running any code from it: `state_dict`, `structure` (parsed), `meta`.

    Raises:
        SlimError: The file is missing, truncated, or not a slim checkpoint.

    Example:
        >>> read_slim('work_dirs/resnet50_prune/slim.pth')['meta']['slim']['macs']
    """
    with _readable(path):
        content = torch.load(path, map_location='cpu', weights_only=True)
    if not isinstance(content, dict) or not {'state_dict', 'structure'} <= content.keys():
        raise SlimError(
            f'{path} is not a slim checkpoint: it has no structure. Cut one from a training checkpoint by '
            'tools/slim.py, or give the slim.pth that training wrote'
        )
    try:
        structure = json.loads(content['structure'])
    except (TypeError, ValueError) as error:
        raise SlimError(f'{path} is not a slim checkpoint: its structure is not JSON ({error})') from error
    return {'state_dict': content['state_dict'], 'structure': structure, 'meta': content.get('meta', {})}


def is_slim(path: PathLike) -> bool:
    """Say whether a file is a slim checkpoint; whatever cannot be read is not."""
    try:
        read_slim(path)
    except SlimError:
        return False
    return True


def read_checkpoint(path: PathLike) -> dict[str, Any]:
    """Read any checkpoint as MMEngine does: training checkpoints hold more than weights.

    Raises:
        SlimError: The file is missing, truncated, or no checkpoint.

    Example:
        >>> read_checkpoint('work_dirs/resnet50_prune/epoch_1.pth')['state_dict'].keys()
    """
    with _readable(path):
        content = CheckpointLoader.load_checkpoint(os.fspath(path), map_location='cpu', logger='silent')
    if not isinstance(content, dict):
        raise SlimError(f'{path} is not a checkpoint: it holds a {type(content).__name__}')
    return content if 'state_dict' in content else {'state_dict': content}


def load_slim(config: ConfigLike, checkpoint: PathLike, device: str | torch.device = 'cpu') -> nn.Module:
    """Build the slim model of a config and its checkpoint: the original class, really smaller, in eval mode.

    Args:
        config: The config that was pruned, or its path; its model may be bare or inside a distiller.
        checkpoint: A `slim.pth`.
        device: Where the model goes.

    Raises:
        SlimError: The checkpoint is unreadable, not a slim one, or of another model.

    Example:
        >>> model = load_slim('configs/cpd/resnet50_prune.py', 'work_dirs/resnet50_prune/slim.pth')
        >>> model(torch.rand(1, 3, 32, 32), mode='tensor').shape
        torch.Size([1, 10])
    """
    content = read_slim(checkpoint)
    model = cut_to(build_dense(config), content['structure'], checkpoint)
    fill(model, content['state_dict'], checkpoint)
    return model.to(device).eval()


@MODELS.register_module()
def slimmed(
    model: Mapping[str, Any],
    structure: PathLike | Mapping[str, Any],
    data_preprocessor: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a model of its own class at its slim size, for a config: test, fine-tune and deploy as ever.

    Args:
        model: The config of the dense model.
        structure: A `slim.pth`, whose weights are loaded too and survive `init_weights`; or a structure,
            as a dict or as a JSON file, where the weights come from `load_from`.
        data_preprocessor: Given by the Runner, used where `model` has none.

    Raises:
        SlimError: The structure is unreadable or of another model.

    Example:
        >>> model = dict(type='slimmed', model=dict(type='ImageClassifier', ...), structure='slim.pth')
    """
    config = dict(model)
    if data_preprocessor is not None:
        config.setdefault('data_preprocessor', data_preprocessor)
    dense = MODELS.build(config)
    if isinstance(structure, Mapping):
        return cut_to(dense, structure, 'structure')
    if Path(structure).suffix == '.json':
        return cut_to(dense, _read_json(structure), structure)
    content = read_slim(structure)
    small: Any = cut_to(dense, content['structure'], structure)
    fill(small, content['state_dict'], structure)
    # MMEngine initialises a model when training starts; a pretrained init_cfg comes last.
    small.init_cfg = {'type': 'Pretrained', 'checkpoint': os.fspath(structure)}
    return small


def cut_to(model: nn.Module, structure: Mapping[str, Any], where: PathLike) -> nn.Module:
    """Cut a dense model to a structure, in place; `where` names the structure's origin in errors.

    Raises:
        SlimError: The structure is of another model, or is none.
    """
    if not structure.keys() >= {'tensors', 'attributes', 'replaced'}:
        raise SlimError(f'{where} holds no structure of a slim model')
    try:
        return restructure_(model, structure)
    except SlimError as error:
        raise SlimError(f'{where} does not fit {type(model).__name__}: {error}') from error


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


@contextmanager
def _readable(path: PathLike) -> Iterator[None]:
    """Turn what torch raises on a bad file into a SlimError that names the file."""
    if '://' not in str(path) and not Path(path).is_file():
        raise SlimError(f'{path}: there is no such checkpoint')
    try:
        yield
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            raise SlimError(f'{path} is not a slim checkpoint: it holds more than weights') from error
        raise SlimError(f'{path} is truncated or not a checkpoint') from error
    except GARBAGE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise SlimError(f'{path} is truncated or not a checkpoint: {reason}') from error


def _read_json(path: PathLike) -> dict[str, Any]:
    try:
        return json.loads(Path(path).read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise SlimError(f'{path} is not a readable JSON structure: {error}') from error


def _plain(value: Any, where: str) -> Any:
    """Return the value as dicts, lists, strings and numbers, of exactly those types."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f'{where}.{key}') for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f'{where}[{number}]') for number, item in enumerate(value)]
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):  # scalars of numpy and torch
        return _plain(value.item(), where)
    raise ValueError(f'{where} of a slim checkpoint must be plain values, not {type(value).__name__}')
