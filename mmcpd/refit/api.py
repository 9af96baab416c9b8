"""Refit: give a masked model new weights in closed form, layer by layer, so that it follows the dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..coupling import Coupling, arguments
from ..slim.compare import evaluating, tensors_in
from ..slim.mask import MaskedForward, kept_rows, mask_, named_tensors
from ..slim.trial import double
from .masked_run import MaskedRun
from .report import RefitReport, SkippedLayer
from .targets import DenseRun, Refittable, count_pictures

_CHECKED = 128  # pictures, or the first batch if it has more, on which outputs are compared
Inputs = tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Refitted:
    """A masked and refitted copy of a model, and what was done."""

    model: nn.Module
    report: RefitReport


def refit(
    model: nn.Module,
    coupling: Coupling,
    keep: Mapping[str, Tensor],
    batches: Iterable[Tensor | Inputs],
    *,
    ridge: float = 0.1,
    samples: int = 64,
    gram_limit: int = 1 << 30,
    teacher: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Refitted:
    """Mask a copy of a model and give each layer that lost rows or columns the weight that makes up for them best.

    Layers behind it that lost nothing get one too where their output ends in a sum, whose other operand has changed.

    No labels, no gradients: each layer is a ridge regression from what it reads in the refitted model to what it puts
    out in the dense one, `W + (Cxx + lam I)^-1 (Cxy - Cxx W)` with `lam = ridge * mean(diag Cxx)`. A constant goes into
    the layer's bias, or is taken from the running mean of the batch norm that alone reads its output; with neither the
    moments are not centred. Where an output ends in a sum, its target makes up for what the other operand lost too.

    No layer's error at the sampled positions gets larger. Where the outputs on the first 128 pictures (one batch at
    least) get further from the dense ones, the whole refit is undone, and the report says so.

    Batches are held in memory, and for one of them the layers' targets. Moments take `8 * D**2` bytes for a layer with
    D kept columns times kernel taps. Two forwards a batch, and `samples * D**2` multiplications a layer.

    Args:
        model: the dense model, which stays as it is.
        coupling: what combing found for it.
        keep: True for each unit that is kept.
        batches: inputs, each a tensor `(N, C, H, W)` or a tuple of the forward's arguments; 300 pictures in all are
            enough for a small net.
        ridge: how strongly a weight is pulled towards the old one.
        samples: positions per picture of each layer's output that are fitted, tokens of a linear layer.
        gram_limit: bytes that a layer's Gram matrix may take. A convolution beyond it changes all taps of its kernel
            alike, which needs the moments of channels only; a linear layer is left alone.
        teacher: a module of the same architecture that takes the dense model's part; `model` may then be masked.
        progress: called as `progress(done, total)` after each batch.

    Raises:
        ValueError: no batch, a keep that does not fit, a model that is masked, a ridge that is not positive, or values
            that are not finite; the message names the layer.

    Source: ridge regression by layers, as in CORP and GRAIL; the corrected sums are this library's.

    Example:
        >>> done = refit(model, coupling, keep, [images])
        >>> [(layer.tensor, layer.after <= layer.before) for layer in done.report.refitted]
        [('conv1.weight', True), ('conv2.weight', True)]
        >>> done.report.refitted_distance < done.report.masked_distance
        True
    """
    inputs = [arguments(batch) for batch in batches]
    _check(model, coupling, keep, inputs, ridge, teacher)
    masked, dense = copy.deepcopy(model), model if teacher is None else teacher
    mask_(masked, coupling, keep)
    forward = coupling.example.forward
    with evaluating(masked), evaluating(dense):
        checked = _first(inputs)
        expected = [forward(dense, *batch) for batch in checked]

        def distance() -> float:
            return _distance(expected, [forward(masked, *batch) for batch in checked])

        before = distance()
        targets = DenseRun(dense, kept_rows(coupling, keep), samples)
        targets.run(forward, inputs[0])
        found = list(targets.places(gram_limit))
        run = MaskedRun(masked, [place for place in found if isinstance(place, Refittable)], ridge)
        for number, batch in enumerate(inputs):
            if number:
                targets.run(forward, batch)
            run.run(forward, batch, targets.targets)
            if progress is not None:
                progress(number + 1, len(inputs))
        after = distance()
        if undone := not after <= before:
            run.undo_()
    report = RefitReport(
        refitted=run.results(),
        skipped=tuple(place for place in found if isinstance(place, SkippedLayer)),
        uncorrected=run.uncorrected(targets.broken),
        masked_distance=before,
        refitted_distance=after,
        undone=undone,
    )
    return Refitted(masked, report)


def _check(
    model: nn.Module,
    coupling: Coupling,
    keep: Mapping[str, Tensor],
    inputs: Sequence[Inputs],
    ridge: float,
    teacher: nn.Module | None,
) -> None:
    """Raise a ValueError for arguments that cannot be used."""
    coupling.check(keep)
    if not inputs:
        raise ValueError('there is no batch to refit on: give at least one')
    if not ridge > 0:
        raise ValueError(f'ridge must be positive, not {ridge}')
    tensors, others = named_tensors(model), named_tensors(model if teacher is None else teacher)
    for name, tensor in tensors.items():
        other = others.get(name)
        if other is None or other.shape != tensor.shape:
            raise ValueError(f"the teacher has no '{name}' of shape {tuple(tensor.shape)}: give the same architecture")
    if teacher is None and _is_masked(model, tensors, coupling, keep):
        raise ValueError('the model is masked already: give the dense model, or the dense one as `teacher`')


def _is_masked(model: nn.Module, tensors: Mapping[str, Tensor], coupling: Coupling, keep: Mapping[str, Tensor]) -> bool:
    """Say whether what `keep` removes is zero already, or statistics leave channels out."""
    if any(isinstance(vars(module).get('forward'), MaskedForward) for module in model.modules()):
        return True
    removed = [
        tensors[name].detach().movedim(dim, 0)[~kept.to(tensors[name].device)]
        for name, dims in kept_rows(coupling, keep).items()
        for dim, kept in dims.items()
        if isinstance(tensors[name], nn.Parameter)
    ]
    return bool(removed) and not any(bool(rows.any()) for rows in removed)


def _first(inputs: Sequence[Inputs]) -> list[Inputs]:
    """Return as many batches as hold `_CHECKED` pictures, at least one."""
    count = 0
    chosen: list[Inputs] = []
    for batch in inputs:
        count += count_pictures(batch)
        if chosen and count > _CHECKED:
            break
        chosen.append(batch)
    return chosen


def _distance(expected: Sequence[object], outputs: Sequence[object]) -> float:
    """Return the mean square of differences as a share of the mean square of what is expected."""
    difference = square = 0.0
    for ours, theirs in zip(tensors_in(list(expected)), tensors_in(list(outputs)), strict=True):
        if ours.is_floating_point() and ours.numel():
            scale = double(ours).square().mean().clamp(min=torch.finfo(torch.float64).tiny)
            difference += float((double(ours) - double(theirs)).square().mean() / scale)
            square += 1.0
    return difference / max(square, 1.0)
