"""Compare a file that finds objects with its model: two lists of detections, in any order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mmcpd.deploy.onnx import TOLERANCE, feed, open_session
from mmcpd.deploy.parity import RUN_ERRORS, Parity
from mmcpd.modes import modes_kept

# What a model predicts of pictures: of each its boxes (M, 4), scores (M,) and labels (M,).
Predict = Callable[[nn.Module, Tensor], Sequence[tuple[Tensor, Tensor, Tensor]]]


def check_detections(
    path: str | os.PathLike, model: nn.Module, batches: Sequence[Tensor], predict: Predict, tolerance: float = TOLERANCE
) -> Parity:
    """Compare the detections of an ONNX file in ONNX Runtime with what the model itself predicts.

    The file's outputs are boxes (N, K, 4), scores (N, K) and labels (N, K), below 0 where there is no detection. The
    difference of two detections is that of their scores, or of their boxes in parts of the picture's longer side, or of
    the farthest coordinate where boxes lie outside; it is infinite where the file has more or fewer detections, other
    labels or numbers that are not finite, or does not run.

    Example:
        >>> from mmcpd.deploy import export_onnx
        >>> def found(model, pictures):    # a box for each picture, as large as its sum
        ...     return [(x.sum().expand(1, 4), torch.ones(1), torch.zeros(1).long()) for x in pictures.unbind()]
        >>> def stacked(model, pictures):
        ...     return tuple(torch.stack(part) for part in zip(*found(model, pictures), strict=True))
        >>> path = export_onnx(model, images, 'boxes.onnx', dynamic_batch=False, forward=stacked)
        >>> check_detections(path, model, [images], found).ok
        True
    """
    session = open_session(path, threads=1)
    worst, number = [], 0
    for pictures in batches:
        with modes_kept(model), torch.no_grad():
            expected = predict(model.eval(), pictures)
        number += sum(len(scores) for _, scores, _ in expected)
        try:
            got = [tuple(part) for part in zip(*session.run(None, feed(session, pictures)), strict=True)]
        except RUN_ERRORS:
            worst.append(float('inf'))
            continue
        longer = max(pictures.shape[-2:])
        worst.append(max(_difference(ours, found, longer) for ours, found in zip(expected, got, strict=True)))
    if number == 0:
        logging.getLogger('mmcpd').warning(f'{path}: no picture has a detection, so none were compared')
    largest = max(worst)
    return Parity(largest, largest, largest <= tolerance, tuple(zip(map(len, batches), worst, strict=True)))


def _difference(ours: tuple[Tensor, ...], found: tuple[np.ndarray, ...], longer: int) -> float:
    """Return the largest difference of a picture's detections; each of ours takes the nearest that is left."""
    boxes, scores, labels = (part.detach().cpu().numpy() for part in ours)
    there = found[2] >= 0
    theirs = [part[there] for part in found]
    if len(scores) != len(theirs[1]):
        return float('inf')
    far = np.abs(boxes).max(1, initial=longer)[:, None]  # of each box: some heads clip none to the picture
    apart = np.abs(boxes[:, None] - theirs[0]).max(2, initial=0.0) / far  # (ours, theirs)
    apart = np.maximum(apart, np.abs(scores[:, None] - theirs[1]))
    apart[np.isnan(apart) | (labels[:, None] != theirs[2])] = float('inf')
    largest = 0.0
    for row in apart:
        nearest = int(row.argmin())
        largest = max(largest, float(row[nearest]))
        apart[:, nearest] = float('inf')
    return largest
