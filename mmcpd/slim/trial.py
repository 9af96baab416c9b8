"""The safety net: what is masked can be slimmed, on models that were never tried.

Combing ends with a trial: remove units at random, mask one copy, slim another, run both on the example input and
compare; once with about half of the units gone and once with a few, since some mistakes show in only one of them. The
weights are random: behind a branch that is still almost zero no mistake would show. It runs in float64, where rounding
hides nothing. Where the copies differ, or where slimming or running fails, the groups at fault are found by bisection.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..coupling import Coupling, Example, Keep
from ..errors import CombError, SlimError, first_line
from ..nested import map_tensors, tensors_in
from ..random_state import draws
from .compare import compare, compare_gradients, evaluating
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


def _fault(model: nn.Module, coupling: Coupling, among: Sequence[str], gradients: bool) -> str | None:
    """Return why pruning these groups fails, or None where it does not."""
    keeps = [random_keep(coupling, share, seed, among=set(among), awkward=True) for share, seed in KEEPS]
    try:
        gap = max(compare(model, coupling, keep) for keep in keeps)
        slope = max(compare_gradients(model, coupling, keep) for keep in keeps) if gradients else 0.0
    except torch.cuda.OutOfMemoryError:
        raise
    except FAILURES as error:
        text = first_line(error)
        return f'a trial failed: {text if isinstance(error, SlimError) else f"{type(error).__name__}: {text}"}'
    tolerance = TOLERANCE.get(next((p.dtype for p in model.parameters()), torch.float32), 1e-3)
    if gap > tolerance:
        why = f'a trial failed: the slimmed model differs from the masked one by {gap:.1e}'
        with evaluating(model):
            drawn = draws(lambda: coupling.example.forward(model, *coupling.example.inputs))
        return f'{why}; the forward draws random numbers, whose count must not depend on a width' if drawn else why
    if slope > 10 * tolerance:
        return (
            f'a trial failed: gradients of the slimmed model differ from those of the masked one by {slope:.1e}: a '
            'backward of its own, or a recomputation, goes over all channels'
        )
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


def _tried(model: nn.Module, coupling: Coupling, gradients: bool) -> tuple[nn.Module, Coupling, str | None]:
    """Try all groups at once: in float64 and with random weights, or as far as the model runs so.

    Returns:
        The model and the coupling that were tried, and why it failed, or None.
    """
    names = [group.name for group in coupling.groups]
    own, example = in_double(model, coupling.example)
    tried, twin = replace(coupling, example=example), randomised(own)
    why = _fault(twin, tried, names, gradients)
    if why is not None and not _runs(twin, example):
        twin, why = own, _fault(own, tried, names, gradients)
    return twin, tried, why


def disagreement(model: nn.Module, coupling: Coupling, forward: Callable[..., object]) -> str | None:
    """Return why another forward than the one that was combed cannot be run on the slimmed model, or None if it can.

    Example:
        >>> disagreement(model, coupling, lambda model, images: model(images).relu()) is None
        True
    """
    tried = replace(coupling, example=Example(coupling.example.inputs, forward))
    return _tried(model, tried, False)[2] if coupling.groups else None


def faults_of(model: nn.Module, coupling: Coupling, *, gradients: bool = False) -> dict[str, str]:
    """Return the groups that cannot be slimmed, with the reason; found by bisection.

    Args:
        model: the model that was combed.
        coupling: what combing found.
        gradients: compare gradients too: for models with a backward of their own.

    Raises:
        CombError: if the model's output on the example input is not finite, so that nothing could be compared.
    """
    if not coupling.groups:
        return {}
    twin, tried, why = _tried(model, coupling, gradients)
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
            reason = _fault(twin, tried, good + half, gradients)
            if reason is None:
                good.extend(half)
            else:
                bisect(half, reason)

    bisect([group.name for group in coupling.groups], why)
    return faults
