"""Compare an ONNX file with the model that it was exported of."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import Tensor, nn

from mmcpd.deploy.onnx import TOLERANCE, Forward, Inputs, as_tuple, evaluated, feed, open_session, outputs_of
from mmcpd.random_state import seeded

LABELS = 1e-3  # share of the labels that may differ: where two scores are equal but for rounding
SAME = "the model's outputs are the same for all inputs"
RUN_ERRORS = (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph, ort_errors.NotImplemented,
              ort_errors.RuntimeException)  # fmt: skip


@dataclass(frozen=True)
class Parity:
    """Say how far an ONNX file is from its model.

    Attributes:
        max_abs: Largest absolute difference of any output element.
        max_rel: Largest difference of any batch, relative to that batch's largest torch output; of whole numbers
            (labels) the share that differs.
        ok: Whether `max_rel` is within the tolerance, and all shapes and counts agree.
        batches: Size and relative difference of each batch; inf where the file failed or a shape differs.
        constant: The model's outputs are the same for all these inputs: then the comparison means nothing.
    """

    max_abs: float
    max_rel: float
    ok: bool
    batches: tuple[tuple[int, float], ...]
    constant: bool = False

    def __str__(self) -> str:
        """Say it in one line.

        Example:
            >>> print(Parity(0.0, 0.0, True, ((1, 0.0),), constant=True))
            largest relative difference 0.0e+00, which means nothing: the model's outputs are the same for all inputs
        """
        text = f'largest relative difference {self.max_rel:.1e}'
        return f'{text}, which means nothing: {SAME}' if self.constant else text


def check_parity(
    path: str | os.PathLike,
    model: nn.Module,
    inputs: Inputs | list[Inputs],
    forward: Forward | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare an ONNX file in ONNX Runtime with its model on one batch or several, better of several sizes.

    Inputs are one (a tensor, or a tuple of tensors) or a list; `forward` is as given to `export_onnx`. The largest
    difference allowed is `tolerance` times the batch's largest torch output; of labels one in a thousand may differ.
    The model runs from seed 0; its mode and the random numbers of the caller are restored.

    Raises:
        ValueError: There is nothing to compare.

    Example:
        >>> from mmcpd.deploy import export_onnx
        >>> path = export_onnx(model, images, 'model.onnx')
        >>> check_parity(path, model, [images, images[:1]]).ok
        True
    """
    batches: list[Inputs] = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise ValueError(f'{path}: no inputs to compare the file with the model on')
    session = open_session(path, threads=1)
    found, seen = [], []
    with evaluated(model), torch.no_grad():
        for args in map(as_tuple, batches):
            with seeded(0):
                outputs = outputs_of(model(*args) if forward is None else forward(model, *args))
            found.append(_differences(session, args, outputs, tolerance))
            seen.append(outputs)
    absolute, relative, ok = zip(*found, strict=True)
    sizes = [len(as_tuple(batch)[0]) for batch in batches]
    each = tuple(zip(sizes, relative, strict=True))
    return Parity(max(absolute), max(relative), all(ok), each, _constant(batches, seen, tolerance))


def _differences(
    session: onnxruntime.InferenceSession, args: tuple[Tensor, ...], expected: list[Tensor], tolerance: float
) -> tuple[float, float, bool]:
    """Return the largest absolute difference, the same relative to the largest expected value, and if that will do."""
    failed = (float('inf'), float('inf'), False)
    try:
        got = session.run(None, feed(session, args))
    except RUN_ERRORS:
        return failed  # e.g. a reshape that holds for one batch size only
    if [x.shape for x in got] != [tuple(x.shape) for x in expected]:
        return failed
    absolute, relative, ok = 0.0, 0.0, True
    for ours, theirs in zip(got, expected, strict=True):
        reference = theirs.detach().cpu().double().numpy()
        apart = np.abs(ours.astype(np.float64) - reference)
        if not np.isfinite(apart.max(initial=0.0)):
            return failed
        absolute = max(absolute, float(apart.max(initial=0.0)))
        if theirs.is_floating_point():
            share, allowed = float(apart.max(initial=0.0) / max(np.abs(reference).max(initial=0.0), 1e-12)), tolerance
        else:
            share, allowed = float((apart > 0).mean()) if apart.size else 0.0, LABELS
        relative, ok = max(relative, share), ok and share <= allowed
    return absolute, relative, ok


def _constant(batches: list[Inputs], seen: list[list[Tensor]], tolerance: float) -> bool:
    """Say whether no output differs between inputs by more than a comparison with this tolerance would notice."""
    pictures = [row for batch in batches for row in as_tuple(batch)[0]]
    same = all(torch.equal(row, pictures[0]) for row in pictures)
    for outputs in zip(*seen, strict=True):
        shapes: dict[torch.Size, list[Tensor]] = {}
        for row in (row.double() for batch in outputs for row in torch.atleast_1d(batch) if row.numel()):
            shapes.setdefault(row.shape, []).append(row)
        for rows in shapes.values():
            reference = rows[0].min() if same or len(rows) == 1 else rows[0]
            largest = max(float(row.abs().max()) for row in rows)
            if max(float((row - reference).abs().max()) for row in rows) > tolerance * largest:
                return False
    return True
