"""Run a model in training mode so that it always computes the same, or in float64; put its modules' modes back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import _lru_cache_wrapper
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .nested import map_tensors, tensors_in

WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
NARROWING = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
_PRODUCTS = ('matmul', 'bmm', 'mm', 'mv', 'addmm', 'baddbmm')
OF_ONE_TYPE = {  # torch does not promote their tensors
    *(F.grid_sample, F.linear, F.bilinear, F.conv1d, F.conv2d, F.conv3d, torch.cdist, torch.einsum, torch.dot),
    *(getattr(space, name) for space in (torch, torch.Tensor) for name in _PRODUCTS),
    *(torch.Tensor.__matmul__, torch.Tensor.__rmatmul__, torch.Tensor.dot),
}
DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
DRAWS: Mapping[Any, tuple[int, str, object]] = {  # where an argument says that a function draws, and what says no
    F.scaled_dot_product_attention: (4, 'dropout_p', 0.0),
    F.multi_head_attention_forward: (10, 'dropout_p', 0.0),
    F.rrelu: (3, 'training', False),
}


class _Once:
    """Take the place of `torch.utils.checkpoint.CheckpointFunction`: run the function, and not again."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def run_once() -> Iterator[None]:
    """Let parts of a model under a reentrant checkpoint run as if they were under none.

    Such a part shows its layers to nobody who asks for gradients by `torch.autograd.grad`: they would be zero.
    """
    with mock.patch.object(checkpoint, 'CheckpointFunction', _Once):
        yield


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
            draws = isinstance(module, nn.RNNBase) and module.dropout > 0  # inside one function of C
            fixed = isinstance(module, _NormBase) or drops(module)
            module.training = module.training and not draws and not fixed
        try:
            yield model
        finally:
            model.train(before)  # modules may hold tensors for one mode, which their own `train` makes


def drops(module: nn.Module) -> bool:
    """Say whether a module drops activations in training, by its name: `DropPath` and the like hold no parameters."""
    return 'drop' in type(module).__name__.lower() and next(module.parameters(), None) is None


class _WithoutDropout(TorchFunctionMode):
    """Let the functions that drop activations return them as they are, and those that draw otherwise not draw."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DROPOUTS:
            return args[0] if args else kwargs['input']
        if func in DRAWS:
            place, name, value = DRAWS[func]
            positional = len(args) > place
            args = (*args[:place], value, *args[place + 1 :]) if positional else args
            kwargs = kwargs if positional else kwargs | {name: value}
        return func(*args, **kwargs)


@dataclass(frozen=True)
class InDouble:
    """Run a forward so that it computes in float64 throughout, whatever narrower type is written into it.

    `x.float()`, `dtype=torch.float32` and the default type of new tensors name float64 inside, and functions that torch
    promotes nothing for (products, `cdist`, `grid_sample`, what is written into a tensor) take narrower operands, which
    a forward finds outside of the model. The model and its inputs are in float64 before.

    Example:
        >>> InDouble(lambda model, x: model(x.float() + torch.zeros(2)))(nn.Linear(2, 2).double(), torch.ones(2)).dtype
        torch.float64
    """

    forward: Callable[..., object]

    def __call__(self, model: nn.Module, *inputs: object) -> object:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _outer_caches_kept(model), _Widened():
                return self.forward(model, *inputs)
        finally:
            torch.set_default_dtype(before)


@contextmanager
def _outer_caches_kept(model: nn.Module) -> Iterator[None]:
    """Take out what a forward stores outside of the model: in `lru_cache`s and dictionaries of its classes' files."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    spaces: list[Mapping[str, Any]] = [vars(kind) for kind in kinds]
    spaces += [vars(sys.modules[name]) for name in {kind.__module__ for kind in kinds} if name in sys.modules]
    values = {id(value): value for space in spaces for value in list(space.values())}.values()
    stores = [(value, dict(value)) for value in values if type(value) is dict]
    caches = [(value, value.cache_info().misses) for value in values if isinstance(value, _lru_cache_wrapper)]
    try:
        yield
    finally:
        for store, before in stores:
            for name in [name for name in store if store[name] is not before.get(name) and tensors_in(store[name])]:
                if name in before:
                    store[name] = before[name]
                else:
                    del store[name]
        for cache, misses in caches:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


class _Widened(TorchFunctionMode):
    """Let functions of torch take float64 for every narrower floating type that they are given by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in NARROWING:
            return args[0].double()
        if func in OF_ONE_TYPE and 'out' not in kwargs:
            args, kwargs = map_tensors((args, kwargs), _widened)
        if func is torch.Tensor.__setitem__ and isinstance(args[2], torch.Tensor) and args[2].is_floating_point():
            args = (*args[:2], args[2].to(args[0].dtype))
        if any(value in WIDE for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)):
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(WIDE.get(tensor.dtype, tensor.dtype))


def _wide(value: Any) -> Any:
    return WIDE.get(value, value) if isinstance(value, torch.dtype) else value
