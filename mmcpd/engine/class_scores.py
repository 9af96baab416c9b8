"""Score predictions class by class: accuracy of pictures, intersection over union of pixels, precision of boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

OVERLAP = 0.5  # from which a box is found


@dataclass(frozen=True, eq=False)
class ByClass:
    """Scores `(classes,)` in percent, NaN where a class is nowhere, and how often each is in the labels."""

    scores: np.ndarray
    counts: np.ndarray


def accuracies(truth: Sequence[int], predicted: Sequence[int], classes: int) -> ByClass:
    """Return which share of the pictures of each class is given that class.

    Example:
        >>> accuracies([0, 0, 1], [0, 1, 1], 3).scores.tolist()
        [50.0, 100.0, nan]
    """
    labels, right = np.asarray(truth, int), np.equal(truth, predicted)
    counts = np.bincount(labels, minlength=classes)
    return ByClass(_percent(np.bincount(labels[right], minlength=classes), counts), counts)


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return how many pixels of each class are given each, `(classes, classes)`; labels beyond are passed over.

    Example:
        >>> confusion(np.array([[0, 1], [1, 255]]), np.array([[0, 0], [1, 1]]), 2).tolist()
        [[1, 0], [1, 1]]
    """
    valid = (truth >= 0) & (truth < classes) & (predicted >= 0) & (predicted < classes)
    pairs = truth[valid].astype(int) * classes + predicted[valid].astype(int)
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def overlaps(pixels: np.ndarray) -> ByClass:
    """Return the intersection over union of each class, from a confusion `(classes, classes)`.

    Example:
        >>> overlaps(np.array([[1, 0], [1, 2]])).scores.round(1).tolist()
        [50.0, 66.7]
    """
    hits = pixels.diagonal()
    return ByClass(_percent(hits, pixels.sum(0) + pixels.sum(1) - hits), pixels.sum(1))


def _percent(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(100.0 * part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


# -- boxes -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Boxes:
    """The boxes of a picture: corners `(n, 4)` x1, y1, x2, y2 in pixels, labels `(n,)`, scores `(n,)`."""

    corners: np.ndarray
    labels: np.ndarray
    scores: np.ndarray

    def of(self, label: int) -> Boxes:
        """Return those of one class, the surest first."""
        places = np.flatnonzero(self.labels == label)
        places = places[np.argsort(-self.scores[places], kind='stable')]
        return Boxes(self.corners[places], self.labels[places], self.scores[places])


def precisions(truth: Sequence[Boxes], found: Sequence[Boxes], classes: int) -> ByClass:
    """Return the average precision of each class at an overlap of a half, the area under precision over recall.

    Source: Everingham et al., The Pascal Visual Object Classes Challenge, 2010, with the exact area.

    Example:
        >>> box = Boxes(np.array([[0.0, 0, 10, 10]]), np.array([0]), np.array([0.9]))
        >>> precisions([box], [box], 2).scores.tolist()
        [100.0, nan]
    """
    scores, counts = np.full(classes, np.nan), np.zeros(classes, int)
    for label in range(classes):
        pairs = [(t.of(label), f.of(label)) for t, f in zip(truth, found, strict=True)]
        counts[label] = sum(len(t.labels) for t, _ in pairs)
        if counts[label]:
            hits = np.concatenate([_hits(t.corners, f.corners) for t, f in pairs])
            order = np.argsort(-np.concatenate([f.scores for _, f in pairs]), kind='stable')
            scores[label] = 100 * _area(hits[order], int(counts[label]))
    return ByClass(scores, counts)


def _hits(truth: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Tell of boxes, the surest first, which ones find a box of the labels that is not found yet."""
    hits, free = np.zeros(len(found), bool), np.ones(len(truth), bool)
    over = _iou(found, truth)
    for number in range(len(found)):
        open_ = np.where(free, over[number], 0.0)
        if len(open_) and open_.max() >= OVERLAP:
            hits[number], free[int(open_.argmax())] = True, False
    return hits


def _iou(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    low = np.maximum(one[:, None, :2], other[None, :, :2])
    high = np.minimum(one[:, None, 2:], other[None, :, 2:])
    both = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1) for boxes in (one, other)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)


def _area(hits: np.ndarray, count: int) -> float:
    """Return the area under the precision that only falls, over recall."""
    right = hits.cumsum()
    precision = np.maximum.accumulate((right / np.arange(1, len(hits) + 1))[::-1])[::-1]
    return float(precision[hits].sum() / count)
