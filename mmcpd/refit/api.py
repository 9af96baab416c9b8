"""Refit: give a masked model new weights in closed form, layer by layer, so that it follows the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..coupling import Coupling
from ..example import arguments, check_filled
from ..modes import run_once
from ..nested import tensors_in
from ..slim.compare import evaluating
from ..slim.copying import copied, restored
from ..slim.mask import MaskedForward, kept_rows, mask_, named_tensors
from ..slim.trial import double
from .masked_run import MaskedRun
from .report import RefitReport, SkippedLayer
from .targets import DenseRun, Refittable

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
    gram_limit: int = 2 << 30,
    teacher: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Refitted:
    """Mask a copy of a model and give each layer that lost rows or columns the weight that makes up for them best.

    Layers behind it that lost nothing get one too where their output ends in a sum, whose other operand has changed.

    No labels, no gradients: each layer is a ridge regression from what it reads in the refitted model to what it puts
    out in the dense one, `W + (Cxx + lam I)^-1 (Cxy - Cxx W)` with `lam = ridge * mean(diag Cxx)`. A constant goes into
    the layer's bias, or is taken from the running mean of the batch norm that alone reads its output; with neither the
    moments are not centred. Where an output ends in a sum, its target makes up for what the other operand lost too.

    No layer's error at the sampled positions gets larger. Where the outputs on all batches together get further from
    the dense ones, the whole refit is undone, and the report says so; what is infinite in both (masks) is left out.

    Memory: the batches, and for one of them the layers' targets; two copies of the model; and a Gram matrix of
    `8 * D**2` bytes for each layer with D kept columns times kernel taps, `gram_limit` in all, beside a few of the
    largest while it is solved, and some three times `8 * D * O` bytes for a layer of O outputs. Time: for each batch
    two forwards of the dense model and three of the pruned one, and for each of its layers `D**2` multiplications a
    sampled position and one Cholesky decomposition of `D**3 / 3`.

    Args:
        model: the dense model, which stays as it is.
        coupling: what combing found for it.
        keep: True for each unit that is kept.
        batches: inputs, each a tensor `(N, C, H, W)` or a tuple of the forward's arguments; 300 pictures in all are
            enough for a small net.
        ridge: how strongly a weight is pulled towards the old one.
        samples: positions per picture of each layer's output that are fitted, tokens of a linear layer.
        gram_limit: bytes that the Gram matrices of all layers may take together. Where they would take more, the
            largest convolutions change all taps of their kernels alike, which needs the moments of channels only; if
            that is not enough, the largest layers are left alone, and the report says which.
        teacher: a module of the same architecture that takes the dense model's part; `model` may then be masked.
        progress: called as `progress(done, total)` after each batch.

    Raises:
        ValueError: no batch, an empty one, a keep that does not fit, nothing to be fitted to, an option that makes no
            sense, or values that are not finite; the message names the layer, or the output.

    Source: ridge regression by layers, as in CORP and GRAIL; the corrected sums are this library's.

    Example:
        >>> done = refit(model, coupling, keep, [images])
        >>> [(layer.tensor, layer.after <= layer.before) for layer in done.report.refitted]
        [('conv1.weight', True), ('conv2.weight', True)]
        >>> done.report.refitted_distance < done.report.masked_distance
        True
    """
    inputs = [arguments(batch) for batch in batches]
    _check(coupling, keep, inputs, ridge, samples, gram_limit)
    _check_models(model, coupling, keep, teacher)
    dense = model if teacher is None else teacher
    with torch.inference_mode(False):
        masked = copied(model, caches=coupling.caches)
        mask_(masked, coupling, keep)
        refitted = copied(masked)
    forward, before, after = coupling.example.run, _Distance(), _Distance()
    with run_once(), restored(dense), evaluating(masked), evaluating(refitted), evaluating(dense):
        targets = DenseRun(dense, kept_rows(coupling, keep), samples)
        expected = targets.run(forward, inputs[0])
        found = targets.refittable(gram_limit)
        run = MaskedRun(refitted, [layer for layer in found if isinstance(layer, Refittable)], ridge)
        for number, batch in enumerate(inputs):
            if number:
                expected = targets.run(forward, batch)
            run.run(forward, batch, targets.targets)
            before.add(expected, forward(masked, *batch))
            if progress is not None:
                progress(number + 1, len(inputs))
        for batch in inputs:
            after.add(forward(dense, *batch), forward(refitted, *batch))
    report = RefitReport(
        refitted=run.results(),
        skipped=tuple(layer for layer in found if isinstance(layer, SkippedLayer)),
        uncorrected=run.uncorrected(targets.broken),
        masked_distance=before.value,
        refitted_distance=after.value,
        undone=not after.value <= before.value,
        gram_bytes=sum(layer.form.gram_bytes for layer in found if isinstance(layer, Refittable)),
    )
    return Refitted(masked if report.undone else refitted, report)


def _check(
    coupling: Coupling,
    keep: Mapping[str, Tensor],
    inputs: Sequence[Inputs],
    ridge: float,
    samples: int,
    gram_limit: int,
) -> None:
    """Raise a ValueError for arguments that cannot be used."""
    coupling.check(keep)
    if not inputs:
        raise ValueError('there is no batch to refit on: give at least one')
    for number, batch in enumerate(inputs):
        check_filled(batch, number)
    if not ridge > 0:
        raise ValueError(f'ridge must be positive, not {ridge}')
    if samples < 1 or gram_limit < 0:
        raise ValueError(f'samples must be 1 or more, gram_limit 0 or more, not {samples} and {gram_limit}')


def _check_models(model: nn.Module, coupling: Coupling, keep: Mapping[str, Tensor], teacher: nn.Module | None) -> None:
    """Raise a ValueError for models that cannot be used."""
    tensors, others = named_tensors(model), named_tensors(model if teacher is None else teacher)
    for name, tensor in tensors.items():
        other = others.get(name)
        if other is None or other.shape != tensor.shape:
            raise ValueError(f"the teacher has no '{name}' of shape {tuple(tensor.shape)}: give the same architecture")
    if teacher is None and _is_masked(model, tensors, coupling, keep):
        raise ValueError(
            'the model is masked already, or zero wherever `keep` removes something: there is nothing to be fitted to; '
            'give the dense model, or the dense one as `teacher`, or slim it as it is'
        )


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


class _Distance:
    """How far outputs are from those expected over batches: the squared difference as a share of the square.

    It is the mean of these shares over the output tensors.
    """

    def __init__(self) -> None:
        self.sums: dict[int, Tensor] = {}  # of each output tensor: (2,), squared difference and square

    def add(self, expected: object, outputs: object) -> None:
        for number, (ours, theirs) in enumerate(zip(tensors_in(expected), tensors_in(outputs), strict=True)):
            if (ours.is_floating_point() or ours.is_complex()) and ours.numel():
                wanted, found = (double(torch.view_as_real(t) if t.is_complex() else t) for t in (ours, theirs))
                if bool(wanted.isnan().all()):
                    raise ValueError(
                        f'output {number} (from 0) of the dense model is not a number: refit on inputs for which it is'
                    )
                same = (wanted.isinf() & (wanted == found)) | (wanted.isnan() & found.isnan())
                wanted, found = (value.masked_fill(same, 0) for value in (wanted, found))
                pair = torch.stack([(wanted - found).square().sum(), wanted.square().sum()])
                self.sums[number] = self.sums.get(number, torch.zeros_like(pair)) + pair

    @property
    def value(self) -> float:
        shares = [float(gap / square.clamp(min=torch.finfo(gap.dtype).tiny)) for gap, square in self.sums.values()]
        return sum(shares) / max(len(shares), 1)
