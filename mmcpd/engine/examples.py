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
from torch.utils.data import Dataset

from mmcpd.engine.build import ConfigLike, as_config, datasets, hook_options
from mmcpd.engine.wrappers import student_config, type_name
from mmcpd.random_state import seeded

# Transforms that fix the size of a picture, and the key of the size: (W, H) as in mmcv, (H, W) for crops.
SIZES = {'CenterCrop': 'crop_size', 'RandomCrop': 'crop_size', 'RandomResizedCrop': 'scale', 'Resize': 'scale'}


def noise(number: int, shape: Sequence[int]) -> Tensor:
    """Return normal noise, (number, *shape); the same for the same size."""
    return torch.randn(number, *shape, generator=torch.Generator().manual_seed(0))


def check_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an example input as a tuple (C, H, W).

    Raises:
        ValueError: it is not three positive integers.
    """
    numbers = isinstance(shape, list | tuple) and all(isinstance(n, int) and n > 0 for n in shape)
    if not numbers or len(shape) != 3:
        raise ValueError(f'input_shape is (C, H, W), three positive integers: got {shape}')
    return tuple(shape)


def input_shape(cfg: Config, given: Sequence[int] | None = None, pictures: Dataset | None = None) -> tuple[int, ...]:
    """Decide the shape of the input that a model is combed with, (C, H, W), for training and for every tool.

    It is the first of: `given` (an option of a tool, or what a checkpoint was combed with); the `input_shape` of the
    config's PruneHook or CombHook; the size in the config (the preprocessor's `size`, the last transform of the test
    pipeline that fixes one, `crop_size`, the training pipeline); the first training picture, from `pictures` where that
    data set is built already. Reading the picture leaves all random numbers as they were.

    Raises:
        ValueError: nothing gives a size, or it is not (C, H, W).

    Example:
        >>> input_shape(Config({'crop_size': (48, 64), 'model': {}}))
        (3, 48, 64)
    """
    explicit = given or hook_options(cfg).get('input_shape')
    if explicit is not None:
        return check_shape(explicit)
    if 'model' in cfg:
        preprocessor = student_config(cfg).get('data_preprocessor') or {}
        size = _config_size(cfg, preprocessor)
        if size is not None:
            return (len(preprocessor.get('mean') or (0, 0, 0)), *size)
    return _first_picture(cfg, pictures)


def example_inputs(config: ConfigLike, given: Sequence[int] | None = None) -> Tensor:
    """Return one random input, (1, C, H, W), of the shape that `input_shape` decides.

    Raises:
        ValueError: The config tells no size.

    Example:
        >>> example_inputs('configs/cpd/resnet50_prune.py').shape
        torch.Size([1, 3, 32, 32])
    """
    return noise(1, input_shape(as_config(config), given))


def data_batches(
    config: ConfigLike, model: nn.Module, sizes: Sequence[int], shape: tuple[int, int] | None = None
) -> list[Tensor]:
    """Return batches of the given sizes from the test data, each (N, C, H, W), spread over the whole set.

    The model's `data_preprocessor` normalises them; then pictures of another size are scaled to `shape`, (H, W), or to
    that of `example_inputs`.

    Raises:
        ValueError: The config has no test data, or the data set is empty.
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
    pictures = torch.cat([preprocessed(dataset[index], model, (height, width)) for index in chosen])
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


def preprocessed(sample: dict, model: nn.Module, shape: tuple[int, int]) -> Tensor:
    """Return one sample as the model sees it, (1, C, H, W)."""
    preprocessor: Any = model.data_preprocessor
    picture = preprocessor(pseudo_collate([sample]), False)['inputs']
    if tuple(picture.shape[-2:]) == shape:
        return picture
    return F.interpolate(picture, size=shape, mode='bilinear', align_corners=False)


def _config_size(cfg: Config, preprocessor: Mapping[str, Any]) -> tuple[int, int] | None:
    size = _pair(preprocessor.get('size')) or _pipeline_size(cfg, 'test_dataloader')
    return size or _pair(cfg.get('crop_size')) or _pipeline_size(cfg, 'train_dataloader')


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


def _first_picture(cfg: Config, pictures: Dataset | None) -> tuple[int, ...]:
    """Return the shape of the first picture to train on, or to test on where nothing is trained."""
    advice = 'give PruneHook input_shape=(3, H, W)'
    configs = (each for name in ('train_dataloader', 'test_dataloader') for each in datasets(cfg.get(name)))
    if pictures is None:
        config = next(configs, None)
        if config is None:
            raise ValueError(f'{cfg.filename}: no transform fixes the size of the pictures, and no data: {advice}')
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
            pictures = DATASETS.build(config)
    with seeded(0):  # the same size each time, whatever the pipeline draws
        sample: Any = pictures[0]
    try:
        return check_shape(tuple(sample['inputs'].shape))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"the first sample of {type(pictures).__name__} has no 'inputs' (C, H, W): {advice}"
        ) from error
