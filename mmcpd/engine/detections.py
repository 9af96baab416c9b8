"""What a one-stage detector finds, computed with shapes that do not depend on the scores: a graph can be exported.

A dense head chooses boxes by a threshold, and how many there are is known when it runs. Here it keeps as many as it may
keep at most, and those below the threshold get a score of zero. Its own code decodes the boxes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmcpd.engine.operators import vision
from mmcpd.engine.samples import detector_sample
from mmcpd.errors import DeployError

NOTHING = -1  # the label of a place that no detection takes
CHOICE = 'filter_scores_and_topk'  # what mmdet's heads call by a name in their own module
LAST = '_bbox_post_process'  # the method of mmdet's heads that removes covered boxes
NMS_KEYS = ('type', 'iou_threshold', 'class_agnostic', 'split_thr')


def why_no_boxes(model: nn.Module) -> str | None:
    """Return why no boxes can be exported of a model, or None where they can be."""
    head = cast(Any, getattr(model, 'bbox_head', None))
    if any(getattr(part, 'mask_head', None) is not None for part in (model, head)):
        return 'it finds masks as well, which are not exported'
    if not hasattr(head, 'predict_by_feat') or hasattr(model, 'roi_head'):
        return 'its boxes are not those of one dense head'
    nms = (head.test_cfg or {}).get('nms') or {}
    unknown = [f'{key}={nms[key]!r}' for key in nms if key not in NMS_KEYS or (key == 'type' and nms[key] != 'nms')]
    return f'its nms has {unknown[0]}, for which there is no ONNX operator' if unknown else None


def detections(model: nn.Module, pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes (N, K, 4), scores (N, K) and labels (N, K) of a one-stage detector, best first.

    `pictures` (N, 3, H, W) are preprocessed. Boxes are (x1, y1, x2, y2) in their pixels. K is the most that the config
    allows in a picture; places that no detection takes have score 0 and label -1.
    """
    head = cast(Any, model).bbox_head
    with _fixed_shapes(head):
        boxes, scores, labels = zip(*predictions(model, pictures), strict=True)
    return torch.stack(boxes), torch.stack(scores), torch.stack(labels)


def predictions(model: nn.Module, pictures: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return what a detector itself predicts of each of N pictures (N, 3, H, W): boxes (M, 4), scores, labels (M,)."""
    samples = [detector_sample(*map(int, pictures.shape[-2:])) for _ in range(len(pictures))]
    found = [each.pred_instances for each in cast(Any, model).predict(pictures, samples, rescale=False)]
    return [(each.bboxes, each.scores, each.labels) for each in found]


# -- selection with fixed shapes ---------------------------------------------------------------------------------------
@contextmanager
def _fixed_shapes(head: Any) -> Iterator[None]:
    """Let a dense head select boxes without shapes that depend on the scores."""
    kinds = type(head).__mro__
    modules = dict.fromkeys(sys.modules[kind.__module__] for kind in kinds)
    # The class that defines a method: while torch.export runs, a module is of a new class at each access.
    defining = [kind for kind in kinds if LAST in vars(kind)][:1]
    changed: list[tuple[Any, str, Any]] = [
        *((module, CHOICE, _best) for module in modules if hasattr(module, CHOICE)),
        *((kind, LAST, staticmethod(_selected)) for kind in defining),
        (torch.onnx, 'is_in_onnx_export', lambda: False),  # where it is, mmdet imports a package that it no longer has
    ]
    with ExitStack() as stack:
        for each in changed:
            stack.enter_context(patch.object(*each))
        stack.enter_context(_Unfiltered())
        yield


def _best(scores: Tensor, _threshold: float, number: int, results: Any = None) -> tuple[Tensor, Tensor, Tensor, Any]:
    """Return the best `number` of scores (P, classes), with their labels, indices of P, and `results` there."""
    classes, flat = scores.shape[1], scores.flatten()
    values, where = flat.topk(min(number, len(flat)) if number > 0 else len(flat))
    index, labels = where // classes, where % classes
    if isinstance(results, dict):
        return values, labels, index, {name: value[index] for name, value in results.items()}
    if isinstance(results, list):
        return values, labels, index, [value[index] for value in results]
    return values, labels, index, results if results is None else results[index]


def _selected(
    results: InstanceData, cfg: Any, rescale: bool = False, with_nms: bool = True, img_meta: Any = None
) -> InstanceData:
    """Return the best boxes (K, 4) after nms, with their scores and labels."""
    if 'labels' not in results:
        raise DeployError('no boxes can be exported: the head chooses them before they have labels; leave --boxes out')
    boxes, scores, labels = results.bboxes, results.scores, results.labels
    shown = scores > cfg.get('score_thr', 0)
    if 'score_factors' in results:
        scores = scores * results.score_factors
    if cfg.get('min_bbox_size', -1) >= 0:
        shown = shown & (boxes[:, 2:] - boxes[:, :2] > cfg.min_bbox_size).all(1)
    scores = torch.where(shown, scores, -1.0)  # so that none that is not shown covers one that is
    if with_nms and cfg.get('nms'):
        shown = shown & _uncovered(boxes, scores, labels, cfg.nms)
    scores, index = torch.where(shown, scores, 0.0).topk(min(cfg.get('max_per_img', len(scores)), len(scores)))
    shown = shown[index]
    labels = torch.where(shown, labels[index], NOTHING)
    return InstanceData(bboxes=boxes[index] * shown[:, None], scores=scores, labels=labels)


def _uncovered(boxes: Tensor, scores: Tensor, labels: Tensor, cfg: Any) -> Tensor:
    """Say of each box whether nms keeps it; boxes of different classes are moved apart, as mmcv does."""
    if not cfg.get('class_agnostic', False):
        boxes = boxes + (labels.to(boxes) * (boxes.max() + 1))[:, None]
    index = vision().nms(boxes, scores, cfg.iou_threshold)
    return torch.zeros_like(scores).scatter(0, index, 1.0) > 0


class _Unfiltered(TorchFunctionMode):
    """Let `x[mask]` return all rows of x, those that the mask leaves out as -1: scores below any threshold."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and (mask := _mask(args[1])) is not None:
            rows = args[0]
            left_out = ~mask.reshape(*mask.shape, *[1] * (rows.dim() - mask.dim()))
            return rows.masked_fill(left_out, False if rows.dtype == torch.bool else -1)
        return func(*args, **(kwargs or {}))


def _mask(index: Any) -> Tensor | None:
    """Return the mask of `x[mask]` and of `x[mask, :]`."""
    first, rest = (index[0], index[1:]) if isinstance(index, tuple) and index else (index, ())
    found = isinstance(first, Tensor) and first.dtype == torch.bool and all(each == slice(None) for each in rest)
    return first if found else None
