"""Synthetic detection scenes composed of scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mmcpd.datasets.scenes import INK, Canvas, ComposedDataset, placed
from mmcpd.registry import DATASETS

MAX_OVERLAP = 0.1  # of the smaller of two boxes
ATTEMPTS = 20  # places that are tried for a digit before the scene does without it


class BoxedScene(NamedTuple):
    """Hold a picture, and the boxes and classes of the digits in it."""

    image: np.ndarray  # uint8 (H, W, 3)
    boxes: np.ndarray  # float32 (K, 4): x1, y1, x2, y2 in pixels
    labels: np.ndarray  # int64 (K,): 0..9


def compose_boxes(
    images: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int] = (128, 128),
    count: tuple[int, int] = (1, 5),
    scale: tuple[float, float] = (0.2, 0.5),
) -> BoxedScene:
    """Draw several digits beside each other on a mottled background, and box the ink of each.

    The arguments are those of `compose`. A digit whose box would cover more than a tenth of another's, or be covered
    so far by it, is moved; where no free place is found it is left out.

    Example:
        >>> from mmcpd.datasets.digits import digits
        >>> scene = compose_boxes(*digits('train'), np.random.default_rng(0))
        >>> scene.image.shape, scene.boxes.shape, scene.labels.tolist()
        ((128, 128, 3), (2, 4), [5, 8])
    """
    canvas = Canvas(rng, size)
    boxes: list[np.ndarray] = []
    shown: list[int] = []
    for pick in rng.integers(len(images), size=rng.integers(count[0], count[1] + 1)):
        for _ in range(ATTEMPTS):
            coverage = placed(images[pick], rng, size, scale)
            if (coverage < INK).all():
                continue  # so small that no pixel is ink
            box = inked(coverage)
            if all(overlap(box, other) <= MAX_OVERLAP for other in boxes):
                canvas.paint(coverage)
                boxes.append(box)
                shown.append(int(labels[pick]))
                break
    found = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    return BoxedScene(canvas.picture(), found, np.array(shown, dtype=np.int64))


def inked(coverage: np.ndarray) -> np.ndarray:
    """Return the box, float32 (4,), of those pixels (H, W) that are ink; x2 and y2 are the ends of the last ones.

    Example:
        >>> inked(np.eye(5)[:3]).tolist()
        [0.0, 0.0, 3.0, 3.0]
    """
    rows, columns = np.nonzero(coverage >= INK)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float32)


def overlap(box: np.ndarray, other: np.ndarray) -> float:
    """Return which share of the smaller of two boxes lies in the other.

    Example:
        >>> overlap(np.array([0, 0, 4, 4]), np.array([2, 2, 4, 4]))
        1.0
    """
    sides = np.clip(np.minimum(box[2:], other[2:]) - np.maximum(box[:2], other[:2]), 0, None)
    return float(sides.prod() / min((box[2:] - box[:2]).prod(), (other[2:] - other[:2]).prod()))


@DATASETS.register_module()
class DigitBoxesDataset(ComposedDataset):
    """Compose synthetic scenes of scikit-learn's digits with boxes, for mmdet's pipelines and COCO metric.

    Synthetic: a figure measured here says that something works, not how well it does on photographs. A scene
    depends on (`seed`, `split`, its index) alone. Training and validation scenes use disjoint digits: those of
    `digits('train')` and `digits('test')`. The results hold what `LoadImageFromFile` and `LoadAnnotations` would
    load, so a pipeline starts without them, and `instances`: a `CocoMetric` without `ann_file` makes its annotations of
    these where `PackDetInputs` has them among its `meta_keys`.

    Its arguments are those of `ComposedDataset`, scenes of 128x128 with 1 to 5 digits of 0.2 to 0.5 by default.

    Raises:
        ImportError: mmdet or scikit-learn is not installed.

    Example:
        >>> dataset = dict(type='mmcpd.DigitBoxesDataset', split='val', pipeline=[dict(type='mmdet.PackDetInputs')])
        >>> DigitBoxesDataset.METAINFO['classes'][:3]
        ('0', '1', '2')
    """

    METAINFO: dict = {  # noqa: RUF012 - MMEngine reads the class attribute
        'classes': tuple('0123456789'),
        'palette': [
            (230, 25, 75), (60, 180, 75), (255, 225, 25), (0, 130, 200), (245, 130, 48),
            (145, 30, 180), (70, 240, 240), (240, 50, 230), (210, 245, 60), (250, 190, 212),
        ],
        'synthetic': True,
    }  # fmt: skip

    def __init__(
        self,
        split: Literal['train', 'val'] = 'train',
        length: int = 1000,
        size: int | Sequence[int] = 128,
        count: tuple[int, int] = (1, 5),
        scale: tuple[float, float] = (0.2, 0.5),
        seed: int = 0,
        pipeline: Sequence[dict | Callable] = (),
        **kwargs: Any,
    ) -> None:
        try:
            from mmdet.structures.bbox import HorizontalBoxes
        except ImportError as error:
            message = f"boxes are mmdet's, which cannot be imported ({error}): pip install 'mmcpd[detection]'"
            raise ImportError(message) from error
        self.boxes = HorizontalBoxes
        super().__init__(split, length, size, count, scale, seed, pipeline, **kwargs)

    def common(self, index: int) -> dict[str, Any]:
        name = f'synthetic/{self.split}/{index}'  # there is no such file
        return {'img_id': index, 'img_path': name, 'scale_factor': (1.0, 1.0), 'flip': False, 'flip_direction': None}

    def drawn(self, rng: np.random.Generator) -> dict[str, Any]:
        scene = compose_boxes(*self.digits, rng, self.size, self.count, self.scale)
        return {
            'img': scene.image,
            'gt_bboxes': self.boxes(scene.boxes, dtype=None),
            'gt_bboxes_labels': scene.labels,
            'gt_ignore_flags': np.zeros(len(scene.labels), dtype=bool),
            'instances': [
                {'bbox': box.tolist(), 'bbox_label': int(label), 'ignore_flag': 0}
                for box, label in zip(scene.boxes, scene.labels, strict=True)
            ],
        }

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the classes of one scene's digits, for MMEngine's `ClassBalancedDataset`."""
        return [int(label) for label in self.get_data_info(idx)['gt_bboxes_labels']]
