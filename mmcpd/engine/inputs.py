"""What a config's model is fed with: noise of its size, or pictures of its test data as the model sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn
from torch.nn import functional as F

from mmcpd.engine.build import ConfigLike, as_config, datasets, student_config, type_name
from mmcpd.engine.options import comb_options

# Transforms that fix the size of a picture, and the key of the size: (W, H) as in mmcv, (H, W) for crops.
SIZES = {
    'CenterCrop': 'crop_size',
    'RandomCrop': 'crop_size',
    'RandomResizedCrop': 'scale',
    'Resize': 'scale',
}


def noise(number: int, shape: Sequence[int]) -> Tensor:
    """Return normal noise, (number, *shape); the same for the same size."""
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(0))


def example_inputs(config: ConfigLike) -> Tensor:
    """Return one random input, (1, C, H, W), of the size that the config's model is tested at.

    The size is the config's `comb.input_shape` (C, H, W) if it has one; else the first of: the preprocessor's
    `size`, the last transform of the test pipeline that fixes one, the config's `crop_size`, the training
    pipeline, the first sample of the test data.

    Raises:
        ValueError: The config tells no size.

    Example:
        >>> example_inputs('configs/cpd/resnet50_prune.py').shape
        torch.Size([1, 3, 32, 32])
    """
    cfg = as_config(config)
    shape = comb_options(cfg).get('input_shape')
    if shape is None:
        preprocessor = student_config(cfg).get('data_preprocessor') or {}
        shape = (_channels(preprocessor), *_size(cfg, preprocessor))
    return noise(1, shape)


def data_batches(
    config: ConfigLike, model: nn.Module, sizes: Sequence[int], shape: tuple[int, int] | None = None
) -> list[Tensor]:
    """Return batches of the given sizes from the test data, each (N, C, H, W), spread over the whole set.

    Pictures of another size are scaled to `shape`, after the model's own preprocessing.

    Args:
        config: Holds `test_dataloader`.
        model: Its `data_preprocessor` normalises.
        sizes: Batch sizes.
        shape: (H, W); None: that of `example_inputs`.

    Raises:
        ValueError: The config has no test data, or the data set is empty.

    Example:
        >>> [len(x) for x in data_batches('configs/cpd/resnet50_prune.py', model, (1, 3))]
        [1, 3]
    """
    cfg = as_config(config)
    if cfg.get('test_dataloader') is None:
        raise ValueError(f'{cfg.filename} has no test_dataloader to take inputs from')
    height, width = shape or example_inputs(cfg).shape[-2:]
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    if len(dataset) == 0:
        raise ValueError(f'{cfg.filename}: the test data set is empty')
    chosen = torch.linspace(0, len(dataset) - 1, sum(sizes)).long().tolist()
    pictures = torch.cat([_preprocessed(dataset[index], model, (height, width)) for index in chosen])
    return list(pictures.split(list(sizes)))


def random_batches(config: ConfigLike, sizes: Sequence[int], shape: tuple[int, int] | None = None) -> list[Tensor]:
    """Return batches of normal noise of the size that the config's model is tested at, always the same.

    Example:
        >>> random_batches('configs/cpd/resnet50_prune.py', (2,))[0].shape
        torch.Size([2, 3, 32, 32])
    """
    example = example_inputs(config)
    size = (example.shape[1], *(shape or example.shape[-2:]))
    return list(noise(sum(sizes), size).split(list(sizes)))


def _preprocessed(sample: dict, model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Return one sample as the model sees it, (1, C, H, W)."""
    preprocessor: Any = model.data_preprocessor
    picture = preprocessor(pseudo_collate([sample]), False)['inputs']
    if tuple(picture.shape[-2:]) == shape:
        return picture
    return F.interpolate(picture, size=shape, mode='bilinear', align_corners=False)


def _channels(preprocessor: Mapping[str, Any]) -> int:
    return len(preprocessor.get('mean') or (0, 0, 0))


def _size(cfg: Config, preprocessor: Mapping[str, Any]) -> tuple[int, int]:
    found = [
        _pair(preprocessor.get('size')),
        _pipeline_size(cfg, 'test_dataloader'),
        _pair(cfg.get('crop_size')),
        _pipeline_size(cfg, 'train_dataloader'),
    ]
    return next((size for size in found if size), None) or _sample_size(cfg)


def _pair(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _pipeline_size(cfg: Config, loader: str) -> tuple[int, int] | None:
    """Return (H, W) after the last transform that fixes it; a resize that keeps the ratio does not."""
    for dataset in datasets(cfg.get(loader)):
        for transform in reversed(dataset.get('pipeline') or ()):
            name = type_name(transform)
            if name in SIZES and not transform.get('keep_ratio') and SIZES[name] in transform:
                size = _pair(transform[SIZES[name]])
                return size[::-1] if size and name == 'Resize' else size  # mmcv's scale is (W, H)
    return None


def _sample_size(cfg: Config) -> tuple[int, int]:
    for dataset in datasets(cfg.get('test_dataloader')):
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
            height, width = DATASETS.build(dataset)[0]['inputs'].shape[-2:]
        return height, width
    raise ValueError(
        f'{cfg.filename}: no transform fixes the size of the pictures and there is no test data to look at; '
        'write comb = dict(input_shape=(3, H, W)) into the config, or add --cfg-options comb.input_shape=3,H,W'
    )
