"""Comb the model of a config, as the tools do, or of a Runner, as the hooks do: the same options, the same example."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmcpd.comb import comb
from mmcpd.comb.training import newly_read, unread
from mmcpd.coupling import Coupling
from mmcpd.engine.build import hook_options
from mmcpd.engine.examples import example_data, picture_of
from mmcpd.engine.operators import followed
from mmcpd.engine.passes import TESTING, TRAINING, Pass, deployed_pass, runs
from mmcpd.engine.samples import Samples, has_boxes
from mmcpd.engine.wrappers import bare_model
from mmcpd.example import Example
from mmcpd.names import in_short
from mmcpd.nested import map_tensors
from mmcpd.slim import slim
from mmcpd.slim.trial import disagreement, random_keep

OPTIONS = ('heads', 'ignore', 'strict', 'unused')  # of `comb` that the hooks have too


def comb_by_config(
    model: nn.Module, cfg: Config, *, input_shape: Sequence[int] | None = None, **given: Any
) -> Coupling:
    """Comb a bare model as training by this config would, or with other OPTIONS or input (C, H, W).

    Example:
        >>> comb_by_config(model, Config({}), input_shape=(3, 8, 8), ignore=['conv1']).groups[0].name
        'conv2'
    """
    options = {name: value for name, value in hook_options(cfg).items() if name in OPTIONS}
    data = example_data(model, cfg, Samples.of_config(cfg), input_shape)
    return comb_passes(model, data, **{**options, **given})


def comb_runner(runner: Runner, *, input_shape: Sequence[int] | None, **options: Any) -> Coupling:
    """Comb the bare model of a Runner before it trains; `options` are those of OPTIONS."""
    model = bare_model(runner.model)
    data = example_data(model, runner.cfg, Samples.of_loader(runner.train_dataloader), input_shape)
    return comb_passes(model, data, **options)


def comb_passes(model: nn.Module, data: Any, **options: Any) -> Coupling:
    """Comb a bare model of OpenMMLab: what is deployed, and what testing and training run beyond that.

    Those two are combed as well where they run what the others do not, side heads that only the loss calls, or where a
    slim model cannot run them. Their cost does not count. `data` is a preprocessed batch.

    Raises:
        ValueError: the model does not run on it.
    """
    device = next(model.parameters()).device
    data = map_tensors(data, lambda tensor: tensor.to(device))
    deployed = deployed_pass(model, data)
    others = [each for each in (TESTING, TRAINING) if each != deployed and runs(model, data, each) is None]
    example, also = Example((data,), deployed), []
    with followed():
        left = unread(model, example)
        for each in others:
            if read := newly_read(model, example, each, left):
                also.append(each)
                left -= read
        coupling = comb(model, (data,), forward=deployed, also=also, **options)
        for each in others:
            if each not in also and _fault(model, coupling, each) is not None:
                also.append(each)
                coupling = comb(model, (data,), forward=deployed, also=also, **options)
    if coupling.unused:
        advice = "what may feed them is not pruned either, unless unused='leave'"
        shown = in_short(coupling.unused, 5)
        print_log(f'neither testing nor training ran these, so they stay as they are: {shown}; {advice}', 'current')
    return coupling


def _fault(model: nn.Module, coupling: Coupling, each: Pass) -> str | None:
    """Return why a pass cannot be run on the slimmed model, or None where it can.

    A detector's pass chooses boxes by their scores, and among equal ones by rounding: of it no numbers are compared.
    What it chooses from is compared in mode 'tensor'.
    """
    (data,) = coupling.example.inputs
    if not (isinstance(data, dict) and has_boxes(data)):
        return disagreement(model, coupling, each)
    small = slim(model, coupling, random_keep(coupling, 0.5, 0, awkward=True))
    return runs(small, data, each)


def shape_combed(coupling: Coupling) -> list[int]:
    """Return the shape (C, H, W) of the input that a model was combed with."""
    (data,) = coupling.example.inputs
    return list(picture_of(data).shape[1:])
