"""The safety net: what is masked can be slimmed, on models that nobody has seen.

Combing ends with a trial: remove units at random, mask one copy, slim another, run both on the example input and
compare; once with about half of the units gone and once with a few, since some mistakes show in one of them alone. The
weights are random: behind a branch that is still almost zero no mistake would show. Where the copies differ, or where
slimming or running fails, the groups at fault are found by bisection.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..comb.build import default_forward
from ..comb.errors import CombError, SlimError
from ..comb.groups import Comb, Keep
from ..comb.trace import evaluating, tensors_in
from .masks import mask_, named_tensors
from .replace import replacement
from .slim import slim

NOISE = 1_000_003  # random numbers for all weights; a prime, so that rows repeat none
KEEPS = ((0.5, 0), (0.8, 1))  # what a trial leaves, and the seed of the choice
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
_FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    AssertionError,
    AttributeError,
    ZeroDivisionError,
    KeyError,
)


def random_keep(comb: Comb, ratio: float, seed: int, among: set[str] | None = None, awkward: bool = False) -> Keep:
    """Return a keep in which units stay at random, always one at least.

    Args:
        comb: what combing found.
        ratio: the share of each group that stays.
        seed: of the choice.
        among: the groups that lose units; all by default.
        awkward: make the number that stays odd, each group's share differ by up to 0.2, and groups of the same size
            keep different numbers as long as there are any, so that no two widths agree and nothing divides by chance;
            from three units on more than one stays, for over one channel every statistic is right.
    """
    taken: Counter[tuple[int, int]] = Counter()
    generator = torch.Generator().manual_seed(seed)
    keep = comb.keep()
    for group in comb.groups:
        order = torch.randperm(group.units, generator=generator)
        share = ratio + (0.4 * float(torch.rand((), generator=generator)) - 0.2 if awkward else 0.0)
        count = round(share * group.units)
        if awkward:
            wanted = share * group.units
            odd = range(3, group.units, 2) or [max(1, group.units - 1)]
            count = min(odd, key=lambda n: (taken[group.units, n], abs(n - wanted)))
            taken[group.units, count] += 1
        count = max(1, count)
        if among is None or group.name in among:
            keep[group.name][order[count:]] = False
    return keep


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
            scale = float(a.abs().max())
            gap = float((a - b).abs().max())
            worst = max(worst, gap / scale if scale > 0 else gap)
            if gap != gap:
                return float('inf')
    return worst


@torch.no_grad()
def _masked_copy(model: nn.Module, comb: Comb, keep: Keep) -> nn.Module:
    """Copy a model for masking; tensors that are not masked are shared."""
    touched = {m.tensor for g in comb.groups if not bool(keep[g.name].all()) for m in g.members}
    memo: dict[int, Any] = {id(t): t for n, t in named_tensors(model).items() if n not in touched}
    twin = copy.deepcopy(model, memo)
    mask_(twin, comb, keep)
    return twin


def compare(model: nn.Module, comb: Comb, keep: Keep, small: nn.Module | None = None) -> float:
    """Return how far the slimmed model is from the masked one on the example inputs (see `difference`).

    Raises:
        ValueError: if the comb was read from JSON and has no example inputs.
    """
    if comb.forward is None:
        raise ValueError('this comb has no example inputs (it was read from JSON); comb the model again')
    masked = _masked_copy(model, comb, keep)
    small = small if small is not None else slim(model, comb, keep)
    with evaluating(masked), evaluating(small):
        return difference(comb.forward(masked, *comb.inputs), comb.forward(small, *comb.inputs))


def _fault(model: nn.Module, comb: Comb, among: list[str]) -> str | None:
    """Return why pruning these groups fails, or None where it does not."""
    try:
        gap = max(compare(model, comb, random_keep(comb, share, seed, set(among), True)) for share, seed in KEEPS)
    except _FAILURES as error:
        text = str(error).strip().splitlines()
        return f'a trial failed: {type(error).__name__}: {text[0][:160] if text else ""}'
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if gap > TOLERANCE.get(dtype, 1e-3):
        return f'a trial failed: the slimmed model differs from the masked one by {gap:.1e}'
    return None


def could_fail(model: nn.Module, comb: Comb) -> bool:
    """Say whether slimming takes more than slicing: then a trial can tell something.

    In a network of convolutions, linear layers and batch norms it does not: nothing there asks how wide a tensor is.
    A forward that was put on an instance may hang on another module than the copy's.
    """
    return bool(
        comb.sizes
        or comb.equal
        or comb.scales
        or comb.norms
        or comb.unsupported
        or any(replacement(module) or 'forward' in vars(module) for module in model.modules())
    )


@torch.no_grad()
def _randomised(model: nn.Module, comb: Comb) -> nn.Module:
    """Return a copy in which every weight matters: unit variance over what is summed, scales and biases about one."""
    twin = copy.deepcopy(model)
    noise = torch.rand(NOISE, generator=torch.Generator().manual_seed(0))
    for name, tensor in named_tensors(twin).items():
        if name in comb.parameters and tensor.is_floating_point() and tensor.numel():
            mine = noise.repeat(-(-tensor.numel() // NOISE))[: tensor.numel()].reshape(tensor.shape)
            tensor.copy_((mine - 0.5) * (12 / tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else mine + 0.5)
    return twin


def _is_finite(model: nn.Module, comb: Comb) -> bool:
    """Say whether the dense model runs on the example input, with a number everywhere in its output."""
    try:
        with evaluating(model):
            out = tensors_in((comb.forward or default_forward)(model, *comb.inputs))
    except _FAILURES:
        return False
    return all(bool(torch.isfinite(t).all()) for t in out if t.is_floating_point())


def _in_double(model: nn.Module, comb: Comb) -> tuple[nn.Module, Comb]:
    """Return both in float64, or as they are where the forward does not run in it."""
    double = copy.deepcopy(model).double()
    inputs = tuple(i.double() if isinstance(i, torch.Tensor) and i.is_floating_point() else i for i in comb.inputs)
    try:
        with evaluating(double):
            (comb.forward or default_forward)(double, *inputs)
    except _FAILURES:
        return model, comb
    return double, replace(comb, inputs=inputs)


def faults_of(model: nn.Module, comb: Comb) -> dict[str, str]:
    """Return the groups that cannot be slimmed, with the reason; found by bisection.

    Raises:
        CombError: if the model's output on the example input is not finite, so that nothing could be compared.
    """
    names = [g.name for g in comb.groups]
    if not names:
        return {}
    twin, tried = _randomised(model, comb), comb
    why = _fault(twin, tried, names)
    if why is None:
        return {}
    if not _is_finite(twin, comb):
        twin = model
    twin, tried = _in_double(twin, comb)  # where a choice (a nearest neighbour) hangs on the last bit of float32
    why = _fault(twin, tried, names)
    if why is None:
        return {}
    if not _is_finite(model, comb):
        raise CombError('the output on the example input is not finite; give an input, or weights, for which it is')
    good: list[str] = []
    faults: dict[str, str] = {}

    def bisect(candidates: list[str], why: str) -> None:
        if len(candidates) == 1:
            faults[candidates[0]] = why
            return
        for half in (candidates[: len(candidates) // 2], candidates[len(candidates) // 2 :]):
            reason = _fault(twin, tried, good + half)
            if reason is None:
                good.extend(half)
            else:
                bisect(half, reason)

    bisect(names, why)
    return faults
