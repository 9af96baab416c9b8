"""Measure a model by its config's own metrics, without a Runner: nothing is written anywhere."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import EVALUATOR, DefaultScope
from mmengine.runner import Runner
from torch import nn

from mmcpd.slim.compare import evaluating

SPLITS = ('val', 'test')  # the first that the config has


def has_metrics(cfg: Config) -> bool:
    """Say whether a config has data and a metric to validate on.

    Example:
        >>> has_metrics(Config({'val_dataloader': None}))
        False
    """
    return _split(cfg) is not None


@torch.no_grad()
def evaluate(model: nn.Module, cfg: Config, *, progress: Callable[[int, int], None] | None = None) -> dict[str, float]:
    """Return the metrics of a model on the config's validation data, or its test data where it has no others.

    The model stays on its device and in its modes.

    Raises:
        ValueError: the config has neither.
    """
    split = _split(cfg)
    if split is None:
        raise ValueError(f'{cfg.filename} has neither val_dataloader and val_evaluator nor those of test')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')), evaluating(model):
        loader = Runner.build_dataloader(copy.deepcopy(cfg[f'{split}_dataloader']))
        evaluator = _evaluator(copy.deepcopy(cfg[f'{split}_evaluator']))
        evaluator.dataset_meta = getattr(loader.dataset, 'metainfo', None)
        for number, data in enumerate(loader, 1):
            steps: Any = model
            evaluator.process(data_samples=steps.test_step(data), data_batch=data)
            if progress is not None:
                progress(number, len(loader))
        found = evaluator.evaluate(len(loader.dataset))
    return numbers(found)


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers: others report names, tables or nothing as well.

    Example:
        >>> numbers({'top1': np.float32(50), 'worst_class': 'c3', 'per_class': [1.0, 2.0], 'recall': None})
        {'top1': 50.0}
    """
    kinds = (int, float, np.number, np.ndarray, torch.Tensor)
    return {name: float(value) for name, value in metrics.items() if isinstance(value, kinds) and np.size(value) == 1}


def _split(cfg: Config) -> str | None:
    parts = ('dataloader', 'evaluator')
    return next((split for split in SPLITS if all(cfg.get(f'{split}_{part}') for part in parts)), None)


def _evaluator(config: Any) -> Evaluator:
    """Build the evaluator of a config, which is one metric, a list of them, or an evaluator's own dict."""
    if isinstance(config, dict) and 'metrics' in config:
        return EVALUATOR.build({'type': 'Evaluator', **config})
    return Evaluator(config)
