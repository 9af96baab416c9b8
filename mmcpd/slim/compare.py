"""Run a model as it was combed, and compare a masked model with the slimmed one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..coupling import Coupling, Keep
from ..errors import SlimError
from ..modes import modes_kept
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


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dictionaries and plain objects, data classes among them.

    A plain object has attributes, and is no module and cannot be called: OpenMMLab's data samples.
    """
    return list(named_tensors_in(value).values())


def named_tensors_in(value: Any) -> dict[str, Tensor]:
    """Return all tensors that `tensors_in` returns, each under the path to it.

    Example:
        >>> list(named_tensors_in({'loss': torch.ones(1), 'boxes': [torch.ones(4)]}))
        ['loss', 'boxes.0']
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def visit(part: Any, path: str) -> None:
        if isinstance(part, Tensor):
            found[path] = part
        elif id(part) not in seen and (children := _children(part)) is not None:
            seen.add(id(part))
            for name, child in children:
                visit(child, f'{path}.{name}' if path else str(name))

    visit(value, '')
    return found


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return a copy of what `tensors_in` looks into, with each tensor changed.

    Example:
        >>> map_tensors({'x': [torch.ones(1), 2]}, torch.neg)
        {'x': [tensor([-1.]), 2]}
    """
    if isinstance(value, Tensor):
        return change(value)
    if _children(value) is None:
        return value
    if isinstance(value, (list, tuple)):
        items = [map_tensors(each, change) for each in value]
        return type(value)(*items) if hasattr(value, '_fields') else type(value)(items)
    twin = copy.copy(value)
    parts = twin if isinstance(twin, dict) else vars(twin)
    parts.update({name: map_tensors(each, change) for name, each in parts.items()})
    return twin


def _children(value: Any) -> Iterable[tuple[Any, Any]] | None:
    """Return what a container or a plain object holds, by name; None of anything else."""
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    opaque = callable(value) or isinstance(value, nn.Module | ModuleType)
    return None if opaque or not hasattr(value, '__dict__') else vars(value).items()


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
