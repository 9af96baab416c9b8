"""The safety net: what is masked can be slimmed, on models that were never tried.

Combing ends with a trial: remove units at random, mask one copy, slim another, run both on the example input and
compare; once with about half of the units gone and once with a few, since some mistakes show in only one of them. The
weights are random: behind a branch that is still almost zero no mistake would show. Where the copies differ, or where
slimming or running fails, the groups at fault are found by bisection.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..coupling import Coupling, Example, Keep
from ..errors import CombError, SlimError, first_line
from ..nested import map_tensors, tensors_in
from ..random_state import draws
from .compare import compare, evaluating
from .mask import named_tensors

NOISE = 1_000_003  # random numbers for all weights; a prime, so that rows repeat none
KEEPS = ((0.5, 0), (0.8, 1))  # what a trial leaves, and the seed of the choice
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
# What a forward may raise.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError, ZeroDivisionError,
            KeyError, NotImplementedError)  # fmt: skip


def random_keep(
    coupling: Coupling, ratio: float, seed: int, *, among: set[str] | None = None, awkward: bool = False
) -> Keep:
    """Return a keep in which a share `ratio` of each group in `among` (all by default) stays at random, one at least.

    `awkward` makes the number of kept units odd, each group's share differ by up to 0.2, and groups of one size keep
    different numbers as long as there are any, so that no two widths agree and nothing divides by chance; groups of
    three units or more keep more than one, for over one channel every statistic is right.
    """
    taken: Counter[tuple[int, int]] = Counter()
    generator = torch.Generator().manual_seed(seed)
    keep = coupling.keep()
    for group in coupling.groups:
        order = torch.randperm(group.units, generator=generator)
        share = ratio + (0.4 * float(torch.rand((), generator=generator)) - 0.2 if awkward else 0.0)
        count = max(1, round(share * group.units))
        if awkward:
            odd = range(3, group.units, 2) or [max(1, group.units - 1)]
            count = min(odd, key=lambda n: (taken[group.units, n], abs(n - share * group.units)))
            taken[group.units, count] += 1
        if among is None or group.name in among:
            keep[group.name][order[count:]] = False
    return keep


def _fault(model: nn.Module, coupling: Coupling, among: list[str]) -> str | None:
    """Return why pruning these groups fails, or None where it does not."""
    try:
        gap = max(
            compare(model, coupling, random_keep(coupling, share, seed, among=set(among), awkward=True))
            for share, seed in KEEPS
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except FAILURES as error:
        text = first_line(error)
        return f'a trial failed: {text if isinstance(error, SlimError) else f"{type(error).__name__}: {text}"}'
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if gap > TOLERANCE.get(dtype, 1e-3):
        why = f'a trial failed: the slimmed model differs from the masked one by {gap:.1e}'
        with evaluating(model):
            drawn = draws(lambda: coupling.example.forward(model, *coupling.example.inputs))
        return f'{why}; the forward draws random numbers, whose count must not depend on a width' if drawn else why
    return None


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Return a copy in which every weight matters: unit variance over what is summed, scales and biases about one.

    Example:
        >>> twin = randomised(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
        >>> bool((twin[0].weight == twin[1].weight).any()), bool((twin[0].bias >= 0.5).all())
        (False, True)
    """
    twin = copy.deepcopy(model)
    noise = torch.rand(NOISE, generator=torch.Generator().manual_seed(0))
    begin = 0
    for parameter in twin.parameters():
        if parameter.is_floating_point() and parameter.numel():
            end = begin + parameter.numel()
            values = noise.expand(-(-end // NOISE), -1).reshape(-1)[begin:end].reshape(parameter.shape)
            spread = (12 / parameter[0].numel()) ** 0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_((values - 0.5) * spread if parameter.dim() > 1 else values + 0.5)
            begin = end % NOISE
    return twin


def is_finite(out: object) -> bool:
    """Say whether an output has a number everywhere."""
    return all(bool(torch.isfinite(t).all()) for t in tensors_in(out) if t.is_floating_point())


def _runs(model: nn.Module, example: Example) -> bool:
    """Say whether a model runs on the example, with a number everywhere in its output."""
    try:
        with evaluating(model):
            return is_finite(example.run_all(model))
    except FAILURES:
        return False


def double(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, on the CPU where its device has none."""
    return tensor.double() if tensor.device.type != 'mps' else tensor.cpu().double()


def in_double(model: nn.Module, example: Example) -> tuple[nn.Module, Example]:
    """Return copies in float64, on the CPU where the device has none, or as they are where they do not run in it."""
    on_cpu = any(tensor.device.type == 'mps' for tensor in named_tensors(model).values())

    def wide(value: Tensor) -> Tensor:
        value = value.cpu() if on_cpu else value
        return value.double() if value.is_floating_point() else value.clone()

    try:
        twin, tried = copy.deepcopy(model), replace(example, inputs=map_tensors(example.inputs, wide))
        twin = (twin.cpu() if on_cpu else twin).double()
        if _runs(twin, tried):
            return twin, tried
    except FAILURES:
        pass
    return copy.deepcopy(model), example


def disagreement(model: nn.Module, coupling: Coupling, forward: Callable[..., object]) -> str | None:
    """Return why another forward than the one that was combed cannot be run on the slimmed model, or None if it can.

    Example:
        >>> disagreement(model, coupling, lambda model, images: model(images).relu()) is None
        True
    """
    names = [group.name for group in coupling.groups]
    tried = replace(coupling, example=Example(coupling.example.inputs, forward))
    why = _fault(randomised(model), tried, names) if names else None
    if why is None:
        return None
    twin, example = in_double(randomised(model), tried.example)
    return _fault(twin, replace(tried, example=example), names)


def faults_of(model: nn.Module, coupling: Coupling) -> dict[str, str]:
    """Return the groups that cannot be slimmed, with the reason; found by bisection.

    Raises:
        CombError: if the model's output on the example input is not finite, so that nothing could be compared.
    """
    names = [g.name for g in coupling.groups]
    if not names:
        return {}
    twin, tried = randomised(model), coupling
    why = _fault(twin, tried, names)
    if why is None:
        return {}
    if not _runs(twin, coupling.example):
        twin = model
    # In float64, where a choice (a nearest neighbour) depends on the last bit of float32.
    twin, example = in_double(twin, coupling.example)
    tried = replace(coupling, example=example)
    why = _fault(twin, tried, names)
    if why is None:
        return {}
    if not _runs(model, coupling.example):
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
