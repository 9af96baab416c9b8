"""Scikit-learn's handwritten digits as an OpenMMLab classification data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
from mmengine.dataset import BaseDataset

from mmcpd.registry import DATASETS

Split = Literal['train', 'test']

INTERPOLATIONS = {'nearest': cv2.INTER_NEAREST, 'bilinear': cv2.INTER_LINEAR, 'bicubic': cv2.INTER_CUBIC}
TEST_EVERY = 4  # every fourth digit of each class, in scikit-learn's order, is a test digit


@cache
def _bundled() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits, float32 (1797, 8, 8) in 0..1, and their classes, int64 (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        message = 'the embedded digits come with scikit-learn, which is not installed: pip install scikit-learn'
        raise ImportError(message) from error
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


def digits(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return images, float32 (N, 8, 8) in 0..1, and classes, int64 (N,), of one part of scikit-learn's digits.

    Within each class, in scikit-learn's order, every fourth digit belongs to `test` and the others to `train`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: `split` is neither 'train' nor 'test'.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (CC BY 4.0).

    Example:
        >>> images, labels = digits('test')
        >>> images.shape[1:], labels[:3].tolist()
        ((8, 8), [0, 9, 5])
    """
    if split not in ('train', 'test'):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    images, labels = _bundled()
    test = np.zeros(len(labels), dtype=bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    chosen = test if split == 'test' else ~test
    return images[chosen], labels[chosen]


def enlarge(image: np.ndarray, size: tuple[int, int], interpolation: str = 'bicubic') -> np.ndarray:
    """Scale a float image (H, W) in 0..1 to `size` (H', W'), still in 0..1."""
    height, width = size
    scaled = cv2.resize(image, (width, height), interpolation=INTERPOLATIONS[interpolation])
    return np.clip(scaled, 0, 1)  # bicubic overshoots


@DATASETS.register_module()
class DigitsDataset(BaseDataset):
    """Show scikit-learn's 1797 handwritten digits (8x8, grey) as RGB images, uint8 (size, size, 3).

    The images lie in the results already (`img`, `img_shape`, `ori_shape`, `gt_label`, `sample_idx`), so a
    pipeline starts without `LoadImageFromFile`. It is registered in MMEngine's root, where every scope finds it.

    Args:
        split: 'train' (1352 digits) or 'test' (445): see `digits`.
        size: Height and width in pixels.
        interpolation: 'nearest', 'bilinear' or 'bicubic'.
        pipeline, test_mode, indices, metainfo, **kwargs: As in MMEngine's `BaseDataset`.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: An unknown split or interpolation, or a size below 1.

    Example:
        >>> DigitsDataset('train', pipeline=[dict(type='mmpretrain.PackInputs')])[0]['inputs'].shape
        torch.Size([3, 32, 32])
    """

    METAINFO: dict = {'classes': tuple('0123456789')}  # noqa: RUF012 - MMEngine reads the class attribute

    def __init__(
        self,
        split: Split = 'train',
        size: int = 32,
        interpolation: str = 'bicubic',
        pipeline: Sequence[dict | Callable] = (),
        **kwargs: Any,
    ) -> None:
        if interpolation not in INTERPOLATIONS:
            raise ValueError(f'interpolation is one of {", ".join(INTERPOLATIONS)}, not {interpolation!r}')
        if size < 1:
            raise ValueError(f'size is a number of pixels above 0, not {size}')
        self.split, self.size, self.interpolation = split, size, interpolation
        super().__init__(pipeline=list(pipeline), **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return one results dict per digit."""
        shape = (self.size, self.size)
        found = []
        for image, label in zip(*digits(self.split), strict=True):
            grey = np.rint(255 * enlarge(image, shape, self.interpolation)).astype(np.uint8)
            rgb = np.repeat(grey[:, :, None], 3, axis=2)  # (H, W) -> (H, W, 3)
            found.append({'img': rgb, 'img_shape': shape, 'ori_shape': shape, 'gt_label': int(label)})
        return found

    def get_cat_ids(self, idx: int) -> list[int]:
        """Return the class of one digit, as a list, for MMEngine's `ClassBalancedDataset`."""
        return [self.get_data_info(idx)['gt_label']]
