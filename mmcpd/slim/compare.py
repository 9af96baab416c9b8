"""Run a model as it was combed, and compare a masked model with the slimmed one."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..coupling import Coupling, Keep
from ..errors import SlimError
from ..modes import modes_kept
from ..nested import tensors_in
from .mask import kept_rows, mask_, named_tensors
from .slimming import slim


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients or the fused encoder, and put everything back afterwards."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        with modes_kept(model), torch.inference_mode(False), torch.no_grad():
            model.eval()
            torch.backends.mha.set_fastpath_enabled(False)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


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
        return difference(coupling.example.run_all(masked), coupling.example.run_all(small))
