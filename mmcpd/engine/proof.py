"""See that a model that was read from a file computes what the one in memory does, on real pictures."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from mmcpd.engine.examples import example_inputs
from mmcpd.engine.passes import DEPLOYED, TESTING, TRAINING, Pass, runs
from mmcpd.engine.samples import Samples, made_up
from mmcpd.engine.switched import switch_
from mmcpd.errors import ProofError, SlimError, first_line
from mmcpd.modes import InDouble
from mmcpd.nested import map_tensors, named_tensors_in
from mmcpd.random_state import seeded
from mmcpd.slim.compare import difference, evaluating
from mmcpd.slim.copying import copied, restored
from mmcpd.slim.trial import FAILURES, double, doubled

TOLERANCE = {'float32': 1e-3, 'float64': 1e-9}  # of the largest value of each output
NAMES = {DEPLOYED: "mode 'tensor'", TESTING: 'test_step', TRAINING: 'loss'}


def proof_batches(source: Runner | Config, model: nn.Module) -> list[Any]:
    """Return the first sample of the validation data and of the training data, each a batch as its loader gives it.

    Where no data are on this machine: noise of the size that the model is combed with, and a made-up sample.
    """
    if not isinstance(source, Config):  # a Runner, or one of its kind
        loaders = [source.train_dataloader, *([] if source.val_loop is None else [source.val_dataloader])]
        return [Samples.of_loader(loader).batch() for loader in reversed(loaders)]
    found = [Samples.of_config(source, name) for name in ('test_dataloader', 'train_dataloader')]
    batches = [samples.batch() for samples in found if samples is not None]
    return batches or [Preprocessed(made_up(model, example_inputs(source, model)))]


class Preprocessed:
    """A batch that has gone through the preprocessor."""

    def __init__(self, data: Any) -> None:
        self.data = data


def prove(model: nn.Module, fresh: nn.Module, batches: Sequence[Any], settings: Mapping[str, Any]) -> None:
    """Compare what testing gives out, and where samples have labels the losses, with those of a fresh model.

    Both run in eval mode, on the device of `model`, and start from the same random numbers. What differs in float32 is
    compared once more in float64, and losses that differ with the `settings` that were switched while `model` trained
    (see `switched`): where these are why, a warning names them.

    Raises:
        ProofError: what differs, and by how much, or what the fresh model raises where the other one runs.
    """
    device = next(model.parameters()).device
    fresh = fresh.to(device)
    for batch in batches:
        data = _preprocessed(model, batch)
        passes = [each for each in (TESTING, TRAINING) if runs(model, data, each) is None] or [DEPLOYED]
        for each in passes:
            fault = _compared(model, fresh, batch, each)
            if fault is not None and each is TRAINING and settings:
                alike = copied(fresh)  # predictions are compared without
                switch_(alike, settings)
                if (fault := _compared(model, alike, batch, each)) is None:
                    _warn(list(settings))
            if fault is not None:
                raise ProofError(
                    f'{NAMES[each]} of a model that was built anew from the config and filled from the file {fault}, '
                    'so nothing was written'
                )


def _warn(names: Sequence[str]) -> None:
    named = ', '.join(names[:3]) + ' and more' * (len(names) > 3)
    print_log(
        f'while the model trained, something else changed {named}: a model that is built from the config and the slim '
        'file predicts the same, and begins to train with what the config says',
        'current',
        logging.WARNING,
    )


def _preprocessed(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Preprocessed):
        return batch.data
    with seeded(0):
        return cast(Any, model).data_preprocessor(copy.deepcopy(batch), False)


def _compared(model: nn.Module, fresh: nn.Module, batch: Any, each: Pass) -> str | None:
    """Return how the second model differs from the first by more than rounding, or None where it does not."""
    fault = _fault(model, fresh, _preprocessed(model, batch), _preprocessed(fresh, batch), each, 'float32')
    return fault and _in_double(model, fresh, batch, each, fault)


def _fault(
    model: nn.Module, fresh: nn.Module, ours: Any, theirs: Any, each: Callable[..., object], kind: str
) -> str | None:
    """Return how the second model differs from the first, or None where it does not."""
    with restored(model), restored(fresh), evaluating(model), evaluating(fresh):
        with seeded(0):
            expected = named_tensors_in(each(model, ours))
        try:
            with seeded(0):
                found = named_tensors_in(each(fresh, theirs))
        except FAILURES as error:
            return f'fails: {first_line(error)}'
    if expected.keys() != found.keys():
        return f'gives out other things: {", ".join(sorted(expected.keys() ^ found.keys())[:3])}'
    gaps = {}
    for name, value in expected.items():
        try:
            gaps[name] = difference(value, found[name])
        except SlimError as error:
            return f'differs in {name}: {error}'
    worst = max(gaps, key=lambda name: gaps[name], default='')
    if not gaps or gaps[worst] <= TOLERANCE[kind]:
        return None
    return f'differs in {worst} by {gaps[worst]:.1e} of the largest value'


def _in_double(model: nn.Module, fresh: nn.Module, batch: Any, each: Pass, fault: str) -> str | None:
    """Compare copies in float64, where rounding decides nothing; where they do not run in it the fault stands."""
    left, right = doubled(model), doubled(fresh)
    ours, theirs = (
        map_tensors(_preprocessed(net, batch), lambda t: double(t) if t.is_floating_point() else t)
        for net in (model, fresh)
    )
    wide = InDouble(each)
    return _fault(left, right, ours, theirs, wide, 'float64') if runs(left, ours, wide) is None else fault
