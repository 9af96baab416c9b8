"""What a config's model is fed with: noise of its size, or pictures of its test data as the model sees them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from mmcpd.engine.build import ConfigLike, as_config, datasets, hook_options
from mmcpd.engine.samples import Samples, collate_of, made_up, resized
from mmcpd.engine.wrappers import student_config, type_name
from mmcpd.nested import map_tensors, tensors_in

ADVICE = 'give PruneHook input_shape=(C, H, W)'
# Transforms that fix the size of a picture, and the key of the size: (W, H) as in mmcv, (H, W) for crops.
SIZES = {'CenterCrop': 'crop_size', 'RandomCrop': 'crop_size', 'RandomResizedCrop': 'scale', 'Resize': 'scale',
         'Pad': 'size'}  # fmt: skip
WIDTH_FIRST = ('Resize', 'Pad')
LONGEST = 512  # pixels of the longer side where pictures keep their ratio, so that combing takes seconds


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


def example_data(
    model: nn.Module, cfg: Config, samples: Samples | None = None, given: Sequence[int] | None = None
) -> Any:
    """Return the batch of one that a model is combed with, as its `data_preprocessor` returns it.

    It is the first sample to train on, with noise for its pictures. Their size is the first of: `given`, (C, H, W) (an
    option of a tool, or what a checkpoint was combed with); the `input_shape` of the config's PruneHook or CombHook;
    the size in the config (the preprocessor's `size`, the last transform of the test pipeline that fixes one,
    `crop_size`, the training pipeline; of a resize that keeps the ratio its scale, no longer than `LONGEST` and rounded
    up to the preprocessor's `pad_size_divisor`); that of the sample. Where there are no data, pictures have as many
    channels as the first convolution takes, and the sample is made up.

    Raises:
        ValueError: nothing gives a size, or it is not (C, H, W), or the preprocessor returns no picture.
    """
    explicit = given or hook_options(cfg).get('input_shape')
    explicit = None if explicit is None else check_shape(explicit)
    size = explicit[1:] if explicit else _config_size(cfg)
    if samples is None or not hasattr(model, 'data_preprocessor'):
        if size is None:
            raise ValueError(f'{cfg.filename}: no transform fixes the size of the pictures, and no data: {ADVICE}')
        return made_up(model, noise(1, (explicit[0] if explicit else first_channels(model), *size)))
    data = cast(Any, model).data_preprocessor(samples.batch(), False)
    picture = picture_of(data)
    if picture.dim() != 4:
        return data
    shape = explicit or (picture.shape[1], *(size or picture.shape[2:]))
    data = map_tensors(data, partial(_noise_for, tuple(picture.shape), shape))
    if isinstance(data, dict) and isinstance(data.get('data_samples'), list):
        data['data_samples'] = [resized(each, picture.shape[2:], shape[1:]) for each in data['data_samples']]
    return data


def _noise_for(old: tuple[int, ...], new: tuple[int, ...], tensor: Tensor) -> Tensor:
    """Return noise in the new shape (C, H, W) for the picture (1, C, H, W), and for others of its size."""
    if tensor.dim() != 4 or tensor.shape[2:] != old[2:] or not tensor.is_floating_point():
        return tensor
    channels = new[0] if tuple(tensor.shape) == old else tensor.shape[1]
    return noise(len(tensor), (channels, *new[1:])).to(tensor)


def picture_of(data: Any) -> Tensor:
    """Return the first tensor of a preprocessed batch: the pictures (N, C, H, W).

    Raises:
        ValueError: there is none.
    """
    tensors = tensors_in(data['inputs'] if isinstance(data, dict) and 'inputs' in data else data)
    if not tensors:
        raise ValueError(f"the model's data_preprocessor returns no picture for a sample: {ADVICE}")
    return tensors[0]


def first_channels(model: nn.Module) -> int:
    """Return how many channels the first convolution of a model takes, 3 where it has none.

    Example:
        >>> first_channels(nn.Sequential(nn.Conv2d(9, 16, 3)))
        9
    """
    return next((m.in_channels for m in model.modules() if isinstance(m, _ConvNd)), 3)


def example_inputs(config: ConfigLike, model: nn.Module, given: Sequence[int] | None = None) -> Tensor:
    """Return noise of the size that a model is combed with, (1, C, H, W).

    Raises:
        ValueError: The config tells no size, and there are no data.

    Example:
        >>> from mmcpd.engine.build import build_dense
        >>> config = 'configs/cpd/resnet50_prune.py'
        >>> example_inputs(config, build_dense(config)).shape
        torch.Size([1, 3, 32, 32])
    """
    cfg = as_config(config)
    sized = given or hook_options(cfg).get('input_shape') or _config_size(cfg)
    samples = None if sized else Samples.of_config(cfg)
    return noise(1, picture_of(example_data(model, cfg, samples, given)).shape[1:])


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
    height, width = shape or example_inputs(cfg, model).shape[-2:]
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    if len(dataset) == 0:
        raise ValueError(f'{cfg.filename}: the test data set is empty')
    chosen = torch.linspace(0, len(dataset) - 1, sum(sizes)).long().tolist()
    collate = collate_of(cfg.test_dataloader)
    pictures = torch.cat([preprocessed(dataset[index], model, (height, width), collate) for index in chosen])
    return list(pictures.split(list(sizes)))


def random_batches(
    config: ConfigLike, model: nn.Module, sizes: Sequence[int], shape: tuple[int, int] | None = None
) -> list[Tensor]:
    """Return batches of normal noise of the size that the config's model is tested at, always the same.

    Example:
        >>> from mmcpd.engine.build import build_dense
        >>> config = 'configs/cpd/resnet50_prune.py'
        >>> random_batches(config, build_dense(config), (2,))[0].shape
        torch.Size([2, 3, 32, 32])
    """
    example = example_inputs(config, model)
    size = (example.shape[1], *(shape or example.shape[-2:]))
    return list(noise(sum(sizes), size).split(list(sizes)))


def preprocessed(
    sample: Any, model: nn.Module, shape: tuple[int, int], collate: Callable[[list[Any]], Any] = pseudo_collate
) -> Tensor:
    """Return the picture of one sample as the model sees it, (1, C, H, W)."""
    preprocessor: Any = model.data_preprocessor
    picture = picture_of(preprocessor(collate([sample]), False))
    if tuple(picture.shape[-2:]) == shape:
        return picture
    return F.interpolate(picture, size=shape, mode='bilinear', align_corners=False)


def _config_size(cfg: Config) -> tuple[int, int] | None:
    if 'model' not in cfg:
        return None
    preprocessor = student_config(cfg).get('data_preprocessor') or {}
    size = _pair(preprocessor.get('size')) or _pipeline_size(cfg, 'test_dataloader')
    size = size or _pair(cfg.get('crop_size')) or _pipeline_size(cfg, 'train_dataloader')
    return size or _size_within(cfg, preprocessor.get('pad_size_divisor', 1))


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
                return size[::-1] if size and name in WIDTH_FIRST else size
    return None


def _size_within(cfg: Config, divisor: int) -> tuple[int, int] | None:
    """Return the (H, W) of a picture that fills the scale in which the test pipeline keeps the ratio, at most."""
    for dataset in datasets(cfg.get('test_dataloader')):
        for transform in reversed(dataset.get('pipeline') or ()):
            if type_name(transform) == 'Resize' and (scale := _pair(transform.get('scale'))):
                shrink = max(1.0, max(scale) / LONGEST)
                height, width = (divisor * math.ceil(side / shrink / divisor) for side in scale[::-1])
                return height, width
    return None
