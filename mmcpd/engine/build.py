"""Build the bare dense model that a config is about, and run all of it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmcpd.engine.wrappers import student_config, type_name

HOOKS_OF_OURS = ('PruneHook', 'CombHook')
ConfigLike: TypeAlias = Config | str | os.PathLike


def as_config(config: ConfigLike) -> Config:
    """Return a config, read from a file if a path is given."""
    return config if isinstance(config, Config) else Config.fromfile(os.fspath(config))


def build_dense(config: ConfigLike) -> nn.Module:
    """Build the bare, unpruned model of a config, weights as its constructor leaves them, on the CPU.

    SyncBN layers become plain ones, as the Runner makes them on one process.

    Example:
        >>> type(build_dense('configs/cpd/resnet50_prune.py')).__name__
        'ImageClassifier'
    """
    cfg = as_config(config)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        return revert_sync_batchnorm(MODELS.build(student_config(cfg)))


def datasets(config: Mapping[str, Any] | None) -> Iterator[ConfigDict]:
    """Yield the config of every data set under a data loader's, inside wrappers and concatenations too."""
    if config is None:
        return
    for key in ('dataset', 'datasets'):
        inner = config.get(key)
        for part in inner if isinstance(inner, list | tuple) else [inner] if inner else []:
            if 'dataset' in part or 'datasets' in part:
                yield from datasets(part)
            else:
                yield part


def hook_options(cfg: Config) -> dict[str, Any]:
    """Return the options that a config gives to its PruneHook, or to its CombHook where it does not prune.

    Example:
        >>> hook_options(Config({'default_hooks': {'prune': {'type': 'mmcpd.PruneHook', 'heads': 'head'}}}))['heads']
        'head'
    """
    ours = _hooks_of_ours(cfg)
    return next((ours[name] for name in HOOKS_OF_OURS if name in ours), {})


def prunes(cfg: Config) -> bool:
    """Say whether a config has a PruneHook.

    Example:
        >>> prunes(Config({'custom_hooks': [{'type': 'mmcpd.CombHook'}]}))
        False
    """
    return 'PruneHook' in _hooks_of_ours(cfg)


def _hooks_of_ours(cfg: Config) -> dict[str, dict[str, Any]]:
    hooks = [*(cfg.get('default_hooks') or {}).values(), *(cfg.get('custom_hooks') or ())]
    return {type_name(hook): dict(hook) for hook in hooks if hook and type_name(hook) in HOOKS_OF_OURS}
