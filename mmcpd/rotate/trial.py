"""The safety net: a rotated model computes what it computed, or the heads at fault are found and left alone.

It is tried in float64, once with the model's own weights and once with random ones, for behind a branch that is still
almost zero no mistake would show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SlimError
from ..example import Example
from ..nested import map_tensors, tensors_in
from ..slim.compare import difference, evaluating
from ..slim.copying import discarding, restored
from ..slim.trial import in_double, is_finite, randomised
from .heads import Head, rotated
from .report import HeadKind

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 5e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Fault:
    """The heads of one attention that differ once they are rotated, and how."""

    attention: str
    kind: HeadKind
    reason: str


def faults_of(model: nn.Module, example: Example, heads: Sequence[Head]) -> list[Fault]:
    """Return the attentions that may not be rotated, found by bisection; the model is not touched."""
    faults: list[Fault] = []
    twin, tried = in_double(model, example)
    with discarding(model) as copies:
        for randomise in (False, True):
            copies.append(twin := randomised(twin) if randomise else twin)
            out = _run(twin, tried)
            if not is_finite(out):
                break
            while left := [h for h in heads if (h.attention, h.kind) not in {(f.attention, f.kind) for f in faults}]:
                found = _bisect(twin, tried, out, left)
                if not found:
                    break
                faults += found
    return faults


def _bisect(model: nn.Module, example: Example, out: object, heads: Sequence[Head]) -> list[Fault]:
    gap = _gap(model, example, out, heads)
    if gap <= min((TOLERANCE.get(t.dtype, 0.0) for t in tensors_in(out) if t.is_floating_point()), default=0.0):
        return []
    reason = f'rotated, the outputs would differ by {gap:.0e}'
    parts = list(dict.fromkeys((head.attention, head.kind) for head in heads))
    first = set(parts[: len(parts) // 2])
    halves = [[h for h in heads if ((h.attention, h.kind) in first) is side] for side in (True, False)]
    found = [] if len(parts) == 1 else [fault for half in halves for fault in _bisect(model, example, out, half)]
    return found or [Fault(*part, reason) for part in parts]


@torch.no_grad()
def _gap(model: nn.Module, example: Example, out: object, heads: Sequence[Head]) -> float:
    """Return how far the outputs are from `out` with these heads rotated; the model is put back."""
    tensors = dict(model.named_parameters())
    values = rotated(tensors, heads)
    before = {name: tensors[name].detach().clone() for name in values}
    write_(tensors, values)
    try:
        return difference(out, _run(model, example))
    except SlimError:  # other shapes: a forward that chooses by value
        return float('inf')
    finally:
        write_(tensors, before)


@torch.no_grad()
def write_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters of the same names, in their type."""
    for name, value in values.items():
        tensors[name].copy_(value)


def _run(model: nn.Module, example: Example) -> object:
    with restored(model), evaluating(model):
        return map_tensors(example.run(model), torch.clone)  # it may be a buffer, which is put back
