"""Build the bare dense model that a config is about, and an input of the size that it will see."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, DefaultScope
from torch import Tensor, nn

# Types that wrap a model, and the key of what they wrap.
WRAPPERS = {'Distiller': 'student', 'slimmed': 'model'}
# Transforms that fix the size of a picture, and the key of the size: (W, H) as in mmcv, (H, W) for crops.
SIZES = {
    'CenterCrop': 'crop_size',
    'RandomCrop': 'crop_size',
    'RandomResizedCrop': 'scale',
    'Resize': 'scale',
}

ConfigLike: TypeAlias = Config | str | os.PathLike


def as_config(config: ConfigLike) -> Config:
    """Return a config, read from a file if a path is given."""
    return config if isinstance(config, Config) else Config.fromfile(os.fspath(config))


def type_name(config: Mapping[str, Any]) -> str:
    """Return the class name that a config's `type` names, without its scope."""
    kind = config.get('type', '')
    return kind.rsplit('.', 1)[-1] if isinstance(kind, str) else kind.__name__


def student_config(config: ConfigLike) -> ConfigDict:
    """Return a copy of the config of the bare model inside a distiller or `slimmed`, with its preprocessor.

    Example:
        >>> student_config('configs/cpd/resnet50_prune.py').type
        'ImageClassifier'
    """
    cfg = as_config(config)
    model = copy.deepcopy(cfg.model)
    preprocessor = model.get('data_preprocessor') or cfg.get('data_preprocessor')
    while type_name(model) in WRAPPERS:
        model = model[WRAPPERS[type_name(model)]]
        preprocessor = model.get('data_preprocessor') or preprocessor
    if preprocessor is not None:  # as Runner does
        model.setdefault('data_preprocessor', copy.deepcopy(preprocessor))
    return model


def build_dense(config: ConfigLike) -> nn.Module:
    """Build the bare, unpruned model of a config, weights as its constructor leaves them, on the CPU.

    SyncBN layers become plain ones, as the Runner makes them on one process.

    Example:
        >>> type(build_dense('configs/cpd/resnet50_prune.py')).__name__
        'ImageClassifier'
    """
    cfg = as_config(config)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        return revert_sync_batchnorm(MODELS.build(student_config(cfg)))


def example_inputs(config: ConfigLike) -> Tensor:
    """Return one random input, (1, C, H, W), of the size that the config's model is tested at.

    The size is the config's `example_shape` (C, H, W) if it has one; else the first of: the preprocessor's
    `size`, the last transform of the test pipeline that fixes one, the config's `crop_size`, the training
    pipeline, the first sample of the test data. The input depends on nothing but its size.

    Raises:
        ValueError: The config tells no size.

    Example:
        >>> example_inputs('configs/cpd/resnet50_prune.py').shape
        torch.Size([1, 3, 32, 32])
    """
    cfg = as_config(config)
    if cfg.get('example_shape'):
        shape = tuple(cfg.example_shape)
    else:
        preprocessor = student_config(cfg).get('data_preprocessor') or {}
        shape = (_channels(preprocessor), *_size(cfg, preprocessor))
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, *shape, generator=generator)


def whole_forward(model: nn.Module, inputs: Tensor) -> list[Any]:
    """Run a model as it is tested, and its auxiliary heads on the same features, as training does.

    Without them a backbone channel that only an auxiliary head reads as well would be cut under it.

    Args:
        model: an mmpretrain or mmseg model.
        inputs: (N, C, H, W).

    Returns:
        The model's output, then that of each auxiliary head.

    Example:
        >>> c = comb(model, images, forward=whole_forward)
    """
    heads = getattr(model, 'auxiliary_head', None)
    if not heads:
        return [model(inputs)]
    features: list[Any] = []
    last: Any = model.neck if getattr(model, 'with_neck', False) else model.backbone
    handle = last.register_forward_hook(lambda _m, _i, out: features.append(out))
    try:
        out = model(inputs)
    finally:
        handle.remove()
    return [out, *(head(features[-1]) for head in (heads if isinstance(heads, nn.ModuleList) else [heads]))]


def datasets(config: Mapping[str, Any] | None) -> Iterator[ConfigDict]:
    """Yield the config of every data set under a data loader's, inside wrappers and concatenations too."""
    if config is None:
        return
    for key in ('dataset', 'datasets'):
        inner = config.get(key)
        for part in inner if isinstance(inner, list | tuple) else [inner] if inner else []:
            if 'dataset' in part or 'datasets' in part:
                yield from datasets(part)
            else:
                yield part


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
        'write example_shape = (3, H, W) into the config, or add --cfg-options example_shape=3,H,W'
    )
