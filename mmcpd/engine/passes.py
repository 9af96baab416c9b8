"""What a model of OpenMMLab runs: the pass that is deployed, what testing runs, what training runs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

from mmcpd.coupling import Example
from mmcpd.engine.proposals import fixed_proposals
from mmcpd.errors import first_line
from mmcpd.modes import modes_kept
from mmcpd.nested import tensors_in
from mmcpd.slim.compare import evaluating
from mmcpd.slim.trial import FAILURES

DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@dataclass(frozen=True)
class Pass:
    """Run a model in one of MMEngine's modes on a preprocessed batch: `Pass('predict')(model, data)`.

    `data` is what `data_preprocessor` returns, a dict or a sequence of the forward's arguments, or a tensor that is the
    first of them. Its samples are left as they are. In mode 'loss' the model runs as in training, its side branches
    too, but without dropout and with the norms' own statistics, so that it always computes the same.

    Example:
        >>> Pass('tensor')(nn.Identity(), torch.ones(1))    # a module without modes is called as it is
        tensor([1.])
    """

    mode: str

    def __call__(self, model: nn.Module, data: Any) -> Any:
        if self.mode != 'loss':
            with SameType():
                return call(model, data, self.mode)
        with as_trained(model), WithoutDropout():
            return call(model, data, self.mode)


DEPLOYED, TESTING, TRAINING = Pass('tensor'), Pass('predict'), Pass('loss')


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


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, but for what would draw random numbers or update statistics."""
    with modes_kept(model):
        model.train()
        for module in model.modules():
            fixed = isinstance(module, _NormBase | nn.MultiheadAttention) or 'drop' in type(module).__name__.lower()
            module.training = module.training and not fixed
        yield


class WithoutDropout(TorchFunctionMode):
    """Let the functions that drop activations return them as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in DROPOUTS and args else func(*args, **(kwargs or {}))


class SameType(TorchFunctionMode):
    """Let `grid_sample` take places of another type than its picture: mmdet's masks are float32 in a float64 model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.grid_sample and len(args) > 1:
            args = (args[0], args[1].type_as(args[0]), *args[2:])
        return func(*args, **(kwargs or {}))


def runs(model: nn.Module, data: Any, each: Pass) -> str | None:
    """Return why a pass cannot be run, or None where it can and gives out numbers."""
    try:
        with evaluating(model):
            found = any(t.is_floating_point() for t in tensors_in(each(model, data)))
    except FAILURES as error:
        return f'{type(error).__name__}: {first_line(error)}'
    return None if found else 'it returns no numbers'


def deployed_pass(model: nn.Module, data: Any) -> Pass:
    """Return the pass that is exported and whose cost counts: mode 'tensor', or 'predict' where a model has no other.

    Raises:
        ValueError: the model runs in neither.
    """
    why = {each.mode: runs(model, data, each) for each in (DEPLOYED, TESTING)}
    for each in (DEPLOYED, TESTING):
        if why[each.mode] is None:
            return each
    raise ValueError(
        f"{type(model).__name__} runs on an example neither in mode 'tensor' ({why['tensor']}) nor in mode 'predict' "
        f'({why["predict"]}): see that its forward takes what its data_preprocessor returns'
    )


def never_ran(model: nn.Module, example: Example) -> list[str]:
    """Return the paths of the modules with parameters of their own that none of the passes called."""
    called: set[str] = set()
    owners = {path: module for path, module in model.named_modules() if module._parameters}
    handles = [
        module.register_forward_pre_hook(lambda _m, _i, path=path: called.add(path)) for path, module in owners.items()
    ]
    try:
        with evaluating(model):
            example.run_all(model)
    finally:
        for handle in handles:
            handle.remove()
    return [path for path in owners if path not in called]
