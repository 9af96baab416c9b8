"""Run a model as it was combed, and compare a masked model with the slimmed one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..coupling import Coupling, Keep
from ..errors import SlimError
from .mask import kept_rows, mask_, named_tensors
from .slimming import slim


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients or the fused encoder, and put everything back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes:
            module.training = training


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dictionaries and data classes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for f in fields(value) for t in tensors_in(getattr(value, f.name))]
    return []


def difference(left: Any, right: Any) -> float:
    """Return the largest difference between two outputs, relative to the largest value of each tensor of `left`.

    Of integers and booleans it is the share of elements that differ.

    Raises:
        SlimError: if they do not have the same shapes.
    """
    worst = 0.0
    ours, theirs = tensors_in(left), tensors_in(right)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise SlimError(f'output shapes {[tuple(t.shape) for t in theirs]}, expected {[tuple(t.shape) for t in ours]}')
    for a, b in zip(ours, theirs, strict=True):
        if a.numel() and not (a.is_floating_point() or a.is_complex()):
            worst = max(worst, float((a != b).float().mean()))  # labels, masks: the share that differs
        elif a.numel():
            scale, gap = float(a.abs().max()), float((a - b).abs().max())
            worst = max(worst, gap / scale if scale > 0 else gap)
            if gap != gap:
                return float('inf')
    return worst


def compare(model: nn.Module, coupling: Coupling, keep: Keep, small: nn.Module | None = None) -> float:
    """Return how far the slimmed model is from the masked one on the example inputs (see `difference`).

    Example:
        >>> compare(model, coupling, coupling.keep()) < 1e-6
        True
    """
    masked_names = kept_rows(coupling, keep)
    shared: dict[int, Any] = {id(t): t for name, t in named_tensors(model).items() if name not in masked_names}
    masked = copy.deepcopy(model, shared)
    mask_(masked, coupling, keep)
    small = small if small is not None else slim(model, coupling, keep)
    with evaluating(masked), evaluating(small):
        return difference(coupling.example.run(masked), coupling.example.run(small))
