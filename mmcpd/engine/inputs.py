"""Take real inputs from a config's test data, preprocessed as the model sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn
from torch.nn import functional as F

from mmcpd.engine.build import ConfigLike, as_config, example_inputs


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
    generator = torch.Generator().manual_seed(0)
    size = (example.shape[1], *(shape or example.shape[-2:]))
    return [torch.randn(number, *size, generator=generator) for number in sizes]


def _preprocessed(sample: dict, model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Return one sample as the model sees it, (1, C, H, W)."""
    preprocessor: Any = model.data_preprocessor
    picture = preprocessor(pseudo_collate([sample]), False)['inputs']
    if tuple(picture.shape[-2:]) == shape:
        return picture
    return F.interpolate(picture, size=shape, mode='bilinear', align_corners=False)
