"""Comb the model of a config, as the tools do, or of a Runner, as the hooks do: the same options, the same input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from mmengine.config import Config
from mmengine.runner import Runner
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.engine.build import hook_options, whole_forward
from mmcpd.engine.examples import input_shape as shape_of
from mmcpd.engine.examples import noise
from mmcpd.engine.wrappers import bare_model

OPTIONS = ('heads', 'ignore', 'strict')  # of `comb` that the hooks have too


def comb_by_config(
    model: nn.Module, cfg: Config, *, input_shape: Sequence[int] | None = None, **given: Any
) -> Coupling:
    """Comb a bare model as training by this config would, or with other `heads`, `ignore`, `strict` or input (C, H, W).

    Example:
        >>> comb_by_config(model, Config({}), input_shape=(3, 8, 8), ignore=['conv1']).groups[0].name
        'conv2'
    """
    options = {name: value for name, value in hook_options(cfg).items() if name in OPTIONS}
    return _comb(model, shape_of(cfg, input_shape), **{**options, **given})


def comb_runner(runner: Runner, *, input_shape: Sequence[int] | None, **options: Any) -> Coupling:
    """Comb the bare model of a Runner before it trains; `options` are `heads`, `ignore` and `strict`."""
    shape = shape_of(runner.cfg, input_shape, runner.train_dataloader.dataset)
    return _comb(bare_model(runner.model), shape, **options)


def _comb(model: nn.Module, shape: Sequence[int], **options: Any) -> Coupling:
    example = noise(1, shape).to(next(model.parameters()).device)
    return comb(model, example, forward=whole_forward, **options)


def shape_combed(coupling: Coupling) -> list[int]:
    """Return the shape (C, H, W) of the input that a model was combed with."""
    (inputs,) = coupling.example.inputs
    return list(cast(Tensor, inputs).shape[1:])
