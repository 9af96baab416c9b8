"""What a model is combed with, and what its forwards leave on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .nested import map_tensors, tensors_in
from .random_state import seeded


@dataclass(frozen=True, eq=False)
class Example:
    """What a model was combed with: `forward(model, *inputs)`, whose cost counts, and passes `also` run in training."""

    inputs: tuple[object, ...]
    forward: Callable[..., object]
    also: tuple[Callable[..., object], ...] = ()

    def run(self, model: torch.nn.Module, *inputs: object) -> object:
        """Run a model on the example, or on other inputs; what it draws at random is the same each time."""
        return self._run(self.forward, model, inputs)

    def run_also(self, model: torch.nn.Module) -> list[object]:
        """Return the outputs of the further passes."""
        return [self._run(each, model, ()) for each in self.also]

    def run_all(self, model: torch.nn.Module) -> list[object]:
        """Return the outputs of all passes, each from the same random numbers."""
        return [self.run(model), *self.run_also(model)]

    def _run(self, each: Callable[..., object], model: torch.nn.Module, inputs: tuple[object, ...]) -> object:
        with seeded(0):
            return each(model, *own(inputs or self.inputs))


def own(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """Return arguments with copies of their tensors: a forward may write into what it is given, as `x *= 255` does.

    Example:
        >>> given = (images, {'mask': images > 0})
        >>> own(given)[1]['mask'] is given[1]['mask'], bool((own(given)[0] == images).all())
        (False, True)
    """
    return tuple(map(_own, inputs))


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple):
        return type(value)(map(_own, value))
    return {name: _own(each) for name, each in value.items()} if type(value) is dict else value


def arguments(inputs: object) -> tuple[object, ...]:
    """Return the arguments of a forward: a tuple is all of them, anything else is the only one.

    Tensors that were made under `torch.inference_mode` are copied: autograd takes none.
    """
    found = inputs if isinstance(inputs, tuple) else (inputs,)
    if not any(tensor.is_inference() for tensor in tensors_in(found)):
        return found
    with torch.inference_mode(False):
        return tuple(map_tensors(found, Tensor.clone))


def count_pictures(inputs: object) -> int:
    """Return how many pictures a batch holds."""
    return next((len(tensor) for tensor in tensors_in(inputs) if tensor.dim()), 1)


def check_filled(inputs: object, number: int) -> None:
    """Refuse a batch without a picture; `number` counts batches from 0.

    Raises:
        ValueError: with the number.
    """
    if not count_pictures(inputs):
        raise ValueError(f'batch {number} (from 0) is empty: leave it out')


@dataclass(frozen=True)
class Cache:
    """An attribute that a forward keeps a tensor on, or the size that it is for; the next forward makes it anew."""

    module: str  # its path
    name: str
    missing: bool  # whether there was no such attribute before
    before: object  # what stood there
