"""Build slim models from configs: a dense one that loads nothing, cut to a slim.pth, whose weights nothing replaces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mmcpd.engine.build import ConfigLike, as_config
from mmcpd.engine.reader import PathLike
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import student_config, trained_config, type_name
from mmcpd.errors import SlimError, first_line
from mmcpd.registry import MODELS
from mmcpd.slim import restructure_
from mmcpd.slim.check_structure import KEYS, check_structure
from mmcpd.slim.weights import all_tensors, is_extra_state, set_weights_, weights


def build_trained(config: ConfigLike) -> nn.Module:
    """Build the bare model that a config trains, on the CPU: slim where its model is `slimmed`.

    Example:
        >>> type(build_trained('configs/cpd/resnet50_prune.py')).__name__
        'ImageClassifier'
    """
    cfg = as_config(config)
    return _build(cfg, trained_config(cfg))


def build_fresh(config: ConfigLike) -> nn.Module:
    """Build the dense model of a config, which a slim.pth is written for and cut from; it loads nothing.

    Example:
        >>> type(build_fresh('configs/cpd/resnet50_prune.py')).__name__
        'ImageClassifier'
    """
    cfg = as_config(config)
    return _build(cfg, without_pretrained(student_config(cfg)))


def build_slim(config: ConfigLike, checkpoint: PathLike) -> nn.Module:
    """Build the slim model of a dense config, or of one of a `slimmed` model, whose own structure is not looked at.

    Raises:
        SlimError: The checkpoint is unreadable, not a slim one, or of another model.
    """
    content = read_slim(checkpoint)
    return cut_to_(build_fresh(config), content, checkpoint)


def _build(cfg: Config, model: ConfigDict) -> nn.Module:
    """Build a model in the scope of its config; SyncBN becomes plain, as the Runner makes it on one process."""
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        return revert_sync_batchnorm(MODELS.build(model))


@MODELS.register_module()
def slimmed(
    model: Mapping[str, Any], structure: PathLike, data_preprocessor: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build a slim model of the dense one's class, for a config: to test, fine-tune, prune further and deploy.

    Args:
        model: The config of the dense model, or of a `slimmed` one that was pruned further. No weights that it names
            (`init_cfg`, `pretrained`) are loaded.
        structure: A `slim.pth`; no `init_weights` touches its weights, and `load_from` wins over them.
        data_preprocessor: Given by the Runner, used where `model` has none.

    Raises:
        SlimError: The checkpoint is unreadable, not a slim one, or of another model.

    Example:
        >>> model = dict(type='mmcpd.slimmed', model=dict(type='ImageClassifier'), structure='slim.pth')
    """
    given = {} if data_preprocessor is None else {'data_preprocessor': data_preprocessor}
    dense = without_pretrained(student_config(Config({'model': dict(model), **given})))
    small = cut_to_(MODELS.build(dense), read_slim(structure), structure)
    module: Any
    for module in small.modules():
        if hasattr(module, 'init_weights'):
            module.init_weights = _keep_weights
            module.init_cfg = None
    return small


def _keep_weights(*_: object, **__: object) -> None:
    """Take the place of `init_weights`, which MMEngine calls when training starts."""


def without_pretrained(config: Any) -> Any:
    """Return a model's config without the weights that it would load, at any depth.

    Example:
        >>> without_pretrained({'pretrained': 'a.pth', 'backbone': {'init_cfg': {'type': 'Pretrained'}, 'depth': 18}})
        {'pretrained': None, 'backbone': {'init_cfg': [], 'depth': 18}}
    """
    if isinstance(config, list | tuple):
        return type(config)(map(without_pretrained, config))
    if not isinstance(config, dict):
        return config
    kept = type(config)()
    for name, value in config.items():
        if name == 'init_cfg' and value:
            several = value if isinstance(value, list | tuple) else [value]
            kept[name] = [each for each in several if type_name(each) not in ('Pretrained', 'PretrainedInit')]
        elif name == 'pretrained':
            kept[name] = False if isinstance(value, bool) else None
        else:
            kept[name] = without_pretrained(value)
    return kept


# -- weights into a model ----------------------------------------------------------------------------------------------
def cut_to_(model: nn.Module, content: Mapping[str, Any], where: PathLike) -> nn.Module:
    """Cut a dense model, in place, to a slim checkpoint's structure, and fill it; `where` names the file in errors.

    Raises:
        SlimError: The checkpoint holds no structure, or is of another model.
    """
    if set(content['structure']) != set(KEYS):
        raise SlimError(f'{where} holds no structure of a slim model')
    kind, given = type(model).__name__, {**content['state_dict'], **content['buffers']}
    try:
        check_structure(model, content['structure'])
        for name, shape in content['structure']['tensors'].items():  # before memory is taken for it
            if name not in given or list(given[name].shape) != shape:
                raise SlimError(f'{name} is {tuple(shape)} in its structure, and not so among its tensors')
        restructure_(model, content['structure'])
    except SlimError as error:
        raise SlimError(f'{where} does not fit {kind}: {error}') from error
    check_fit(weights(model), content['state_dict'], where, kind)
    unsaved = {name: tensor for name, tensor in all_tensors(model).items() if name in content['buffers']}
    check_fit(unsaved, content['buffers'], where, kind)
    for name, tensor in all_tensors(model).items():
        if name in given and not torch.can_cast(given[name].dtype, tensor.dtype):
            raise SlimError(f'{where} is of another model: {name} is {given[name].dtype} there, not {tensor.dtype}')
    try:
        set_weights_(model, given)
    except Exception as error:  # a model's own set_extra_state raises what it likes
        raise SlimError(f'{where} cannot be loaded into {kind}: {first_line(error)}') from error
    return model


def check_fit(own: Mapping[str, Any], given: Mapping[str, Any], where: PathLike, kind: str) -> None:
    """Compare the names and shapes of a model's weights with those that are given.

    Raises:
        SlimError: A tensor is missing, left over, or of another shape; the message names the first.
    """
    for name, tensor in own.items():
        if name not in given:
            raise SlimError(
                f'{where} is of another model: it lacks {name}, which {kind} has; name the config that it was '
                'trained with'
            )
        if is_extra_state(name) or is_lazy(tensor):
            continue
        if not isinstance(given[name], Tensor):
            raise SlimError(f'{where} is of another model: {name} is a {type(given[name]).__name__}, and no tensor')
        if given[name].shape != tensor.shape:
            raise SlimError(
                f'{where} is of another model: {name} is {tuple(given[name].shape)} there and '
                f'{tuple(tensor.shape)} in {kind}'
            )
    for name in given:
        if name not in own:
            raise SlimError(
                f'{where} is of another model: it has {name}, which {kind} has not; name a config whose model has '
                'it, or take it out of the file'
            )
