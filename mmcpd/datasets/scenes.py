"""Synthetic segmentation scenes composed of scikit-learn's handwritten digits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from mmcpd.datasets.digits import digits
from mmcpd.registry import DATASETS

STREAMS = {'train': 0, 'val': 1}  # each split draws its scenes from its own random stream
INK = 0.5  # a pixel belongs to a digit where at least half of it is ink
MAX_TILT = 15.0  # degrees


class Scene(NamedTuple):
    """Hold a picture and what each of its pixels shows."""

    image: np.ndarray  # uint8 (H, W, 3)
    labels: np.ndarray  # uint8 (H, W): 0 background, 1..10 the digits 0..9


def compose(
    images: np.ndarray,
    labels: np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int] = (96, 96),
    count: tuple[int, int] = (3, 7),
    scale: tuple[float, float] = (0.3, 0.6),
) -> Scene:
    """Draw several digits over each other on a mottled background.

    Each digit gets a random place, tilt, colour and a height of `scale` times the scene's shorter side; later digits
    cover earlier ones. Background and digits differ in brightness, either way round, so the labels can be seen.
    `images` are the digits to choose from, float32 (N, 8, 8) in 0..1, `labels` their classes, int64 (N,); `size` is
    (H, W); `count` and `scale` are the fewest and most digits, and the smallest and largest.

    Example:
        >>> compose(*digits('train'), np.random.default_rng(0)).labels.shape
        (96, 96)
    """
    canvas = Canvas(rng, size)
    seg = np.zeros(size, dtype=np.uint8)
    for pick in rng.integers(len(images), size=rng.integers(count[0], count[1] + 1)):
        coverage = placed(images[pick], rng, size, scale)
        canvas.paint(coverage)
        seg[coverage >= INK] = labels[pick] + 1
    return Scene(canvas.picture(), seg)


class Canvas:
    """Hold a mottled background, on which digits of another brightness, lighter or darker, are painted."""

    def __init__(self, rng: np.random.Generator, size: tuple[int, int]) -> None:
        self.rng = rng
        paper, self.ink = ((0.0, 0.4), (0.6, 1.0)) if rng.random() < 0.5 else ((0.6, 1.0), (0.0, 0.4))
        mottle = rng.uniform(*paper, size=(3, 3, 3)).astype(np.float32)
        self.pixels = np.clip(cv2.resize(mottle, size[::-1], interpolation=cv2.INTER_CUBIC), *paper)  # (H, W, 3)

    def paint(self, coverage: np.ndarray) -> None:
        """Paint in a random colour what a digit covers, (H, W) in 0..1."""
        alpha = np.clip((coverage - INK / 2) / INK, 0, 1)[:, :, None]  # soft edges, half way where labels change
        self.pixels = self.pixels * (1 - alpha) + self.rng.uniform(*self.ink, size=3).astype(np.float32) * alpha

    def picture(self) -> np.ndarray:
        """Return the picture with noise, uint8 (H, W, 3)."""
        noisy = self.pixels + 0.03 * self.rng.standard_normal(self.pixels.shape, dtype=np.float32)
        return np.rint(255 * np.clip(noisy, 0, 1)).astype(np.uint8)


def placed(
    image: np.ndarray, rng: np.random.Generator, size: tuple[int, int], scale: tuple[float, float]
) -> np.ndarray:
    """Return how much of each pixel (H, W) one digit covers, scaled, tilted and moved; its centre is inside."""
    height, width = size
    zoom = rng.uniform(*scale) * min(size) / image.shape[0]
    centre = ((image.shape[1] - 1) / 2, (image.shape[0] - 1) / 2)
    affine: np.ndarray = cv2.getRotationMatrix2D(centre, rng.uniform(-MAX_TILT, MAX_TILT), zoom)  # (2, 3), to target
    affine[:, 2] += rng.uniform((0.1 * width, 0.1 * height), (0.9 * width, 0.9 * height)) - centre
    return cv2.warpAffine(image, affine, (width, height), flags=cv2.INTER_CUBIC)


class ComposedDataset(BaseDataset):
    """Hold what data sets of composed scenes share: arguments, and a picture that depends on its index alone.

    Args:
        split: 'train' or 'val'.
        length: Number of scenes.
        size: Height and width of a scene, pixels, or one number for both.
        count, scale: Fewest and most digits in a scene; smallest and largest, relative to the scene's shorter side.
        seed: Another seed gives other scenes.
        pipeline, test_mode, indices, metainfo, **kwargs: As in MMEngine's `BaseDataset`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: An unknown split, or a length, size, count or scale that leaves nothing to draw.
    """

    def __init__(
        self,
        split: Literal['train', 'val'] = 'train',
        length: int = 1000,
        size: int | Sequence[int] = 96,
        count: tuple[int, int] = (3, 7),
        scale: tuple[float, float] = (0.3, 0.6),
        seed: int = 0,
        pipeline: Sequence[dict | Callable] = (),
        **kwargs: Any,
    ) -> None:
        if split not in STREAMS:
            raise ValueError(f"split is 'train' or 'val', not {split!r}")
        height, width = (size, size) if isinstance(size, int) else size
        if length < 1 or min(height, width) < 8:
            raise ValueError(f'length is at least 1 and size at least 8 pixels, not {length} and {size}')
        if not 0 < count[0] <= count[1] or not 0 < scale[0] <= scale[1]:
            raise ValueError(f'count and scale are (smallest, largest), above 0, not {count} and {scale}')
        self.split, self.length, self.seed = split, length, seed
        self.size, self.count, self.scale = (height, width), count, scale
        self.digits = digits('train' if split == 'train' else 'test')
        super().__init__(pipeline=list(pipeline), **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return what is common to all scenes, once per scene; pixels are drawn when they are asked for."""
        shape = {'img_shape': self.size, 'ori_shape': self.size}
        return [{'scene': index, **shape, **self.common(index)} for index in range(self.length)]

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """Return the results dict of one scene, its picture drawn."""
        info = super().get_data_info(idx)
        rng = np.random.default_rng((self.seed, STREAMS[self.split], info['scene']))
        return {**info, **self.drawn(rng)}

    def common(self, index: int) -> dict[str, Any]:
        """Return what mmseg's or mmdet's pipelines want beside the picture of a scene and its labels."""
        raise NotImplementedError

    def drawn(self, rng: np.random.Generator) -> dict[str, Any]:
        """Draw a scene: return its picture and its labels, by the names of mmseg's or mmdet's pipelines."""
        raise NotImplementedError


@DATASETS.register_module()
class DigitScenesDataset(ComposedDataset):
    """Compose synthetic scenes of scikit-learn's digits with per-pixel labels, for mmseg's pipelines.

    Synthetic: a figure measured here says that something works, not how well it does on photographs. A scene
    depends on (`seed`, `split`, its index) alone. Training and validation scenes use disjoint digits: those of
    `digits('train')` and `digits('test')`. The results hold `img`, `img_shape`, `ori_shape` and `gt_seg_map`, so a
    pipeline starts without `LoadImageFromFile` and `LoadAnnotations`.

    Its arguments are those of `ComposedDataset`, scenes of 96x96 with 3 to 7 digits of 0.3 to 0.6 by default.

    Example:
        >>> DigitScenesDataset('val', length=2, pipeline=[dict(type='mmseg.PackSegInputs')])[1]['inputs'].shape
        torch.Size([3, 96, 96])
    """

    METAINFO: dict = {  # noqa: RUF012 - MMEngine reads the class attribute
        'classes': ('background', *'0123456789'),
        'palette': [
            [40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
            [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 212],
        ],
        'synthetic': True,
    }  # fmt: skip

    def common(self, index: int) -> dict[str, Any]:
        return {'seg_fields': ['gt_seg_map'], 'label_map': None, 'reduce_zero_label': False}

    def drawn(self, rng: np.random.Generator) -> dict[str, Any]:
        scene = compose(*self.digits, rng, self.size, self.count, self.scale)
        return {'img': scene.image, 'gt_seg_map': scene.labels}
