"""Boxes for the second stage of a detector that do not depend on scores.

The first stage keeps the boxes of the best scores, and rounding decides between near ones: two networks that agree to
the last digit but one would hand different boxes to the second stage. With boxes that are given its outputs can be
compared, and its cost does not depend on the picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

SIDES = (16.0, 1024.0)  # pixels; so far apart that each level of a pyramid gets boxes, whatever the picture's size
USUAL_NUMBER = 1000


@contextmanager
def fixed_proposals(model: nn.Module) -> Iterator[list[Any]]:
    """Let the first stage of a two-stage detector hand over fixed boxes, as many as it does at most when testing.

    Yields a list that receives the maps of the first stage, one entry for each time it runs. A model without such a
    stage is left as it is. One whose first stage learns its boxes (Sparse R-CNN) keeps them, but each level of a
    pyramid gets some: a level that no box falls into would be coupled to nothing, and boxes of other pictures do.
    """
    maps: list[Any] = []
    first = cast(Any, getattr(model, 'rpn_head', None))
    if not hasattr(first, 'predict_by_feat') or not hasattr(model, 'roi_head'):
        with _dealt_out(model):
            yield maps
        return

    def predict(features: Sequence[Tensor], samples: Sequence[Any], **_: object) -> list[InstanceData]:
        maps.append(first(features))
        number = (first.test_cfg or {}).get('max_per_img', USUAL_NUMBER)
        boxes = [spread_boxes(number, *sample.metainfo['img_shape'][:2]).to(features[0]) for sample in samples]
        return [InstanceData(bboxes=each, scores=each.new_ones(number), labels=each.new_zeros(number).long())
                for each in boxes]  # fmt: skip

    first.predict = predict
    try:
        yield maps
    finally:
        del first.predict


@contextmanager
def _dealt_out(model: nn.Module) -> Iterator[None]:
    """Deal boxes out to the levels of pyramids one after the other, instead of by their sizes."""
    pooling: list[Any] = [module for module in model.modules() if hasattr(module, 'map_roi_levels')]
    before = [vars(module).get('map_roi_levels') for module in pooling]
    for module in pooling:
        module.map_roi_levels = lambda rois, levels: torch.arange(len(rois), device=rois.device) % levels
    try:
        yield
    finally:
        for module, own in zip(pooling, before, strict=True):
            del module.map_roi_levels
            if own is not None:
                module.map_roi_levels = own


def spread_boxes(number: int, height: int, width: int) -> Tensor:
    """Return boxes (number, 4) of all sizes as (x1, y1, x2, y2) in pixels, their centres spread over a picture.

    Example:
        >>> spread_boxes(3, 64, 64)[:, 2:].amin(0) > 0
        tensor([True, True])
    """
    place = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    centre = torch.stack([(torch.arange(number) * 0.618) % 1 * width, place * height], 1)  # (number, 2)
    side = SIDES[0] * (SIDES[1] / SIDES[0]) ** place
    half = torch.stack([side, side.flip(0).clamp(side / 2, side * 2)], 1) / 2  # half the width and height
    return torch.cat([centre - half, centre + half], 1)
