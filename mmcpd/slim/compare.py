"""Run a model as it was combed, and compare a masked model with the slimmed one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..coupling import Coupling, Keep
from ..errors import SlimError
from ..example import Example
from ..modes import modes_kept
from ..nested import map_tensors, tensors_in
from .copying import copied, discarding, restored
from .mask import kept_rows, mask_, named_tensors
from .slimming import slim

Kind = TypeVar('Kind')
Gaps = TypeVar('Gaps')


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

    Of integers and booleans it is the share of elements that differ; where only one has a number it is infinite.

    Raises:
        SlimError: if they do not have the same shapes.
    """
    return max(differences(left, right), default=0.0)


def differences(left: Any, right: Any) -> list[float]:
    """Return the difference of each tensor of two outputs, as `difference`."""
    ours, theirs = tensors_in(left), tensors_in(right)
    if [t.shape for t in ours] != [t.shape for t in theirs]:
        raise SlimError(f'output shapes {[tuple(t.shape) for t in theirs]}, expected {[tuple(t.shape) for t in ours]}')
    return [_difference(a, b) if a.numel() else 0.0 for a, b in zip(ours, theirs, strict=True)]


def _difference(a: Tensor, b: Tensor) -> float:
    if not (a.is_floating_point() or a.is_complex()):
        return float((a != b).float().mean())  # labels, masks: the share that differs
    scale, gap = float(a.abs().max()), float((a - b).abs().max())
    if not math.isfinite(gap):
        return math.inf
    return gap / scale if scale > 0 else gap


def compare(model: nn.Module, coupling: Coupling, keep: Keep, small: nn.Module | None = None) -> float:
    """Return how far the slimmed model is from the masked one on the example inputs (see `difference`).

    Example:
        >>> compare(model, coupling, coupling.keep()) < 1e-6
        True
    """
    masked_names = kept_rows(coupling, keep)
    shared: dict[int, Any] = {id(t): t for name, t in named_tensors(model).items() if name not in masked_names}
    with discarding(model) as copies:
        copies.append(copied(model, shared, coupling.caches))
        mask_(copies[0], coupling, keep)
        if small is None:
            copies.append(small := slim(model, coupling, keep))
        return gap_between(copies[0], small, coupling.example)


def gap_between(masked: nn.Module, small: nn.Module, example: Example) -> float:
    """Return how far a slimmed model is from the masked one on the example inputs (see `difference`).

    Example:
        >>> gap_between(model, small, coupling.example) > 0.0    # the model is not masked
        True
    """
    return max(gaps_between(masked, small, example), default=0.0)


def gaps_between(masked: nn.Module, small: nn.Module, example: Example) -> list[float]:
    """Return how far each output of a slimmed model is from the masked one's (see `difference`)."""
    theirs = outputs_of(small, example)  # first: whoever watches both compares the masked model's with them
    return differences(outputs_of(masked, example), theirs)


def outputs_of(model: nn.Module, example: Example) -> list[Tensor]:
    """Return copies of the output tensors of a model on the example inputs; the model is put back afterwards."""
    with restored(model), evaluating(model):
        return [tensor.clone() for tensor in tensors_in(example.run_all(model))]  # one may be a buffer of the model


def compare_gradients(model: nn.Module, coupling: Coupling, keep: Keep) -> float:
    """Return how far the gradients of the slimmed model are from those of the masked one (see `gap_of_gradients`).

    Example:
        >>> compare_gradients(model, coupling, coupling.keep()) < 1e-6
        True
    """
    with discarding(model) as copies:
        copies += [copied(model, caches=coupling.caches), slim(model, coupling, keep)]
        mask_(copies[0], coupling, keep)
        return gap_of_gradients(copies[0], copies[1], coupling, keep)


def gap_of_gradients(masked: nn.Module, small: nn.Module, coupling: Coupling, keep: Keep) -> float:
    """Return how far a slimmed model's gradients are from those of the masked one, by inputs and kept rows.

    Relative to the largest of each tensor, or to a thousandth of the largest of all: some are zero but for rounding (by
    the bias of the keys). A query that takes up the scale of its attention has another gradient by right: it is left
    out.

    Example:
        >>> gap_of_gradients(copy.deepcopy(model), small, coupling, keep) > 0.0    # the model is not masked
        True
    """
    return max(gaps_of_gradients(masked, small, coupling, keep).values(), default=0.0)


def gaps_of_gradients(masked: nn.Module, small: nn.Module, coupling: Coupling, keep: Keep) -> dict[str, float]:
    """Return the gap of each gradient, as `gap_of_gradients`, by the names of parameters and inputs."""
    ours, theirs = gradients_of(masked, coupling.example), gradients_of(small, coupling.example)
    for name in {rows.tensor for scale in coupling.fixes.scales for rows in scale.rows} & ours.keys():
        del ours[name], theirs[name]
    for name, dims in kept_rows(coupling, keep).items():
        for dim, live in dims.items() if name in ours else ():
            ours[name] = ours[name].index_select(dim, live.nonzero().flatten().to(ours[name].device))
    return gradient_gaps(ours, theirs)


def gradient_gaps(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
    """Return the difference of each gradient from the one of the same name and shape (see `gap_of_gradients`)."""
    ours = {name: gradient for name, gradient in ours.items() if gradient.numel()}  # some models have empty tensors
    floor = 1e-3 * max((float(g.abs().max()) for g in ours.values()), default=0.0)
    gaps = {
        name: float((g - theirs[name]).abs().max()) / max(float(g.abs().max()), floor, 1e-300)
        for name, g in ours.items()
    }
    return {name: gap if math.isfinite(gap) else math.inf for name, gap in gaps.items()}


def gradients_of(model: nn.Module, example: Example) -> dict[str, Tensor]:
    """Return the gradients of a fixed sum of all outputs by the parameters and, by their numbers, the inputs.

    By `backward`, as a training step has it: some recomputations allow no other way.
    """
    noise = torch.Generator().manual_seed(0)
    inputs = map_tensors(example.inputs, lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))
    sources: dict[str, Tensor] = dict(model.named_parameters())
    sources |= {f'input {number}': tensor for number, tensor in enumerate(tensors_in(inputs))}
    sources = {name: tensor for name, tensor in sources.items() if tensor.requires_grad}
    for tensor in sources.values():
        tensor.grad = None
    with restored(model), evaluating(model), torch.enable_grad():
        outputs = [t for t in tensors_in(replace(example, inputs=inputs).run_all(model)) if t.requires_grad]
        weights = [torch.randn(t.shape, generator=noise, dtype=t.dtype).to(t.device) for t in outputs]
        with _Contiguous():
            torch.autograd.backward(outputs, weights)
    return {n: torch.zeros_like(t) if t.grad is None else t.grad.detach() for n, t in sources.items()}


def moved_by_rounding(model: nn.Module, measured: Callable[[], Kind], gaps: Callable[[Kind, Kind], Gaps]) -> Gaps:
    """Return how far what is measured of a model moves when each of its weights moves by its last bits.

    Two ways to sum up the same numbers differ by as much. Few models amplify that: those that sample a picture at
    places that they compute of it, layer after layer, do so by a factor of 1e9.

    Example:
        >>> model = nn.Linear(4, 4).double()
        >>> 0 < moved_by_rounding(model, lambda: model.weight.detach() * 2, difference) < 1e-14
        True
    """
    noise = torch.Generator().manual_seed(0)
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    values = [weight.detach().clone() for weight in weights]
    before = measured()
    try:
        with torch.no_grad():
            for weight in weights:
                bits = 4 * torch.finfo(weight.dtype).eps * torch.randn(weight.shape, generator=noise)
                weight.mul_(1 + bits.to(weight))
        return gaps(before, measured())
    finally:
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)


class _Contiguous(TorchDispatchMode):
    """Hand tensors to the backward of batch norms in one order.

    On a CPU torch (2.14) computes wrong gradients where the gradient of a batch of one comes back in channels-last
    order, as from a layer norm over tokens: another error for each width. Instance norm is a batch norm of one.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.native_batch_norm_backward.default:
            args = (args[0].contiguous(), args[1].contiguous(), *args[2:])
        return func(*args, **(kwargs or {}))
