"""What a model of OpenMMLab runs: the pass that is deployed, what testing runs, what training runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mmcpd.engine.proposals import fixed_proposals
from mmcpd.errors import first_line
from mmcpd.modes import as_trained
from mmcpd.nested import tensors_in
from mmcpd.slim.compare import evaluating
from mmcpd.slim.copying import restored
from mmcpd.slim.trial import FAILURES


@dataclass(frozen=True)
class Pass:
    """Run a model in one of MMEngine's modes on a preprocessed batch: `Pass('predict')(model, data)`.

    `data` is what `data_preprocessor` returns, a dict or a sequence of the forward's arguments, or a tensor that is the
    first of them. Its samples are left as they are. In mode 'loss' the model runs as in training, its side branches
    too, but without dropout and with the norms' own statistics, so that it always computes the same. With `one_view` it
    is given the first picture of several that show the same, as self-supervised methods train on.

    Example:
        >>> Pass('tensor')(nn.Identity(), torch.ones(1))    # a module without modes is called as it is
        tensor([1.])
    """

    mode: str
    one_view: bool = False

    def __call__(self, model: nn.Module, data: Any) -> Any:
        if self.one_view:
            data = {**data, 'inputs': data['inputs'][0]}
        with as_trained(model) if self.mode == 'loss' else nullcontext():
            return call(model, data, self.mode)


DEPLOYED, TESTING, TRAINING = Pass('tensor'), Pass('predict'), Pass('loss')
ONE_VIEW = Pass('tensor', one_view=True)


def call(model: nn.Module, data: Any, mode: str) -> Any:
    """Call a model as MMEngine does, with copies of the samples, which it may write into.

    In mode 'tensor' the second stage of a detector takes fixed boxes, and the first stage's maps follow its outputs.
    """
    if mode == 'tensor':
        with fixed_proposals(model) as maps:
            out = _called(model, data, mode)
        return (out, maps) if maps else out
    return _called(model, data, mode)


def _called(model: nn.Module, data: Any, mode: str) -> Any:
    options = {'mode': mode} if hasattr(model, 'data_preprocessor') else {}
    if isinstance(data, Tensor):
        return model(data, **options)
    if isinstance(data, dict):
        return model(**{name: _own(value) for name, value in data.items()}, **options)
    return model(*map(_own, data), **options)


def _own(value: Any) -> Any:
    """Copy what is no tensor: data samples, which keep predictions."""
    samples = isinstance(value, list) and not any(isinstance(each, Tensor) for each in value)
    return copy.deepcopy(value) if samples else value


def runs(model: nn.Module, data: Any, each: Callable[[nn.Module, Any], Any]) -> str | None:
    """Return why a pass cannot be run, or None where it can and gives out numbers; the model stays as it was."""
    try:
        with restored(model), evaluating(model):
            found = any(t.is_floating_point() for t in tensors_in(each(model, data)))
    except FAILURES as error:
        return f'{type(error).__name__}: {first_line(error)}'
    return None if found else 'it returns no numbers'


def deployed_pass(model: nn.Module, data: Any) -> Pass:
    """Return the pass that is exported and whose cost counts: mode 'tensor', or 'predict' where a model has no other.

    A model that trains on several views of a picture is deployed on one.

    Raises:
        ValueError: the model runs in neither.
    """
    why = {each.mode: runs(model, data, each) for each in (DEPLOYED, TESTING)}
    for each in (DEPLOYED, TESTING):
        if why[each.mode] is None:
            return each
    views = data.get('inputs') if isinstance(data, dict) else None
    if isinstance(views, list | tuple) and views and runs(model, data, ONE_VIEW) is None:
        return ONE_VIEW
    raise ValueError(
        f"{type(model).__name__} runs on an example neither in mode 'tensor' ({why['tensor']}) nor in mode 'predict' "
        f'({why["predict"]}): see that its forward takes what its data_preprocessor returns'
    )
