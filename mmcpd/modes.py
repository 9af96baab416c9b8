"""Run a model in training mode so that it always computes the same, or in float64; put its modules' modes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

NARROW = (torch.float32, torch.float16, torch.bfloat16)
NARROWING = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let a block change which modules train, and put each back into its own mode afterwards.

    Example:
        >>> with modes_kept(model):
        ...     _ = model.train(not model.training)
        ...     inside = model.training
        >>> inside != model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def as_trained(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model into training mode, but for what would draw random numbers or update statistics.

    Example:
        >>> with as_trained(nn.Sequential(nn.Linear(2, 2), nn.Dropout())) as trained:
        ...     print(trained[0].training, trained[1].training)
        True False
    """
    with modes_kept(model), _WithoutDropout():
        before = model.training
        model.train()
        for module in model.modules():
            fixed = isinstance(module, _NormBase | nn.MultiheadAttention) or 'drop' in type(module).__name__.lower()
            module.training = module.training and not fixed
        try:
            yield model
        finally:
            model.train(before)  # modules may hold tensors for one mode, which their own `train` makes


class _WithoutDropout(TorchFunctionMode):
    """Let the functions that drop activations return them as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in DROPOUTS and args else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class InDouble:
    """Run a forward so that it computes in float64 throughout, whatever narrower type is written into it.

    `x.float()`, `dtype=torch.float32` and the default type of new tensors name float64 inside, and `grid_sample` takes
    places of another type than its picture. The model and its inputs are in float64 before.

    Example:
        >>> InDouble(lambda model, x: model(x.float() + torch.zeros(2)))(nn.Linear(2, 2).double(), torch.ones(2)).dtype
        torch.float64
    """

    forward: Callable[..., object]

    def __call__(self, model: nn.Module, *inputs: object) -> object:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _Widened():
                return self.forward(model, *inputs)
        finally:
            torch.set_default_dtype(before)


class _Widened(TorchFunctionMode):
    """Let functions of torch take float64 for every narrower floating type that they are given by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NARROWING:
            return args[0].double()
        if func is F.grid_sample and len(args) > 1:
            args = (args[0], args[1].type_as(args[0]), *args[2:])
        if any(value in NARROW for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)):
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
