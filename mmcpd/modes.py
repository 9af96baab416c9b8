"""Run a model in training mode so that it always computes the same, or in another type; put its modules' modes back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode

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


class SameTypes(TorchFunctionMode):
    """Let `grid_sample` take places of another type than its picture: mmdet's masks are float32 in a float64 model.

    Example:
        >>> with SameTypes():
        ...     sampled = F.grid_sample(torch.ones(1, 1, 2, 2).double(), torch.zeros(1, 1, 1, 2), align_corners=False)
        >>> sampled.dtype
        torch.float64
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.grid_sample and len(args) > 1:
            args = (args[0], args[1].type_as(args[0]), *args[2:])
        return func(*args, **(kwargs or {}))
