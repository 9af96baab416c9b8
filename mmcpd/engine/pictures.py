"""Pictures to prune by: of a config's training data or of any folder, without labels, as the model sees them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.logging import print_log
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from mmcpd.engine.build import ConfigLike, as_config, datasets
from mmcpd.engine.examples import example_inputs, preprocessed
from mmcpd.engine.wrappers import type_name
from mmcpd.errors import first_line
from mmcpd.names import in_short, look_up
from mmcpd.random_state import seeded

SUFFIXES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}
PIXELS = 64 * 224 * 224  # of one batch
Progress: TypeAlias = Callable[[int, int], None]


def pictures(
    config: ConfigLike,
    model: nn.Module,
    number: int,
    *,
    folder: str | os.PathLike | None = None,
    pipeline: Literal['test', 'train'] = 'test',
    shape: Sequence[int] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Tensor]:
    """Return pictures of the config's training data, or of a folder, in batches (N, C, H, W) on the CPU.

    They are drawn at random, by `seed`, each at most once; where there are fewer than asked for, all are taken, and the
    log says so. The model's `data_preprocessor` normalises them, those of another size are scaled to `shape`. Random
    numbers of the caller are as before afterwards.

    Args:
        config: its `train_dataloader` names the data, inside wrappers and concatenations too.
        model: the bare model, for its preprocessor.
        number: how many pictures.
        folder: take the pictures in this folder and those inside it instead; of those drawn, files that cannot be read
            are left out, and the log says how many.
        pipeline: 'test': the transforms of the test data, less those that load annotations; 'train': the pictures as
            training sees them, augmented and at random.
        shape: (C, H, W); what the model is combed with by default.
        seed: of the choice, and of random transforms.
        progress: called as `progress(done, total)` after each batch.

    Raises:
        ValueError: a number below 1; no folder, or no picture in it that can be read; a config without training data or
            test pipeline.

    Example:
        >>> from mmcpd.engine.build import build_dense
        >>> config = 'configs/cpd/resnet50_prune.py'
        >>> [batch.shape for batch in pictures(config, build_dense(config), 4)]
        [torch.Size([4, 3, 32, 32])]
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f'the number of pictures is an integer, 1 or more: got {number!r}')
    cfg = as_config(config)
    height, width = tuple(shape or example_inputs(cfg, model).shape[1:])[-2:]
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')), seeded(seed):
        samples = _of_data(cfg, pipeline) if folder is None else _of_folder(cfg, Path(folder), pipeline)
        chosen = torch.randperm(len(samples))[:number]
        if len(chosen) < number:
            print_log(f'{number} pictures were asked for, and there are {len(chosen)}', 'current', logging.WARNING)
        parts, batches = chosen.split(max(1, min(64, PIXELS // (height * width)))), []
        broken: list[str] = []  # why files are no pictures
        for number_read, part in enumerate(parts, 1):
            found = [_read(samples, index, broken) for index in part.tolist()]
            images = [preprocessed(each, model, (height, width)).cpu() for each in found if each is not None]
            if images:
                batches.append(torch.cat(images))
            if progress is not None:
                progress(number_read, len(parts))
    if broken:
        print_log(
            f'{len(broken)} of {len(chosen)} pictures are left out, {in_short(broken, 2)}', 'current', logging.WARNING
        )
    if not batches:
        raise ValueError(f'none of the {len(chosen)} pictures can be read: {broken[0]}')
    return batches


def _read(samples: Any, index: int, broken: list[str]) -> Any:
    """Return a sample, or None where a file of a folder is no picture, which is noted."""
    try:
        return samples[index]
    except PictureError as error:
        broken.append(str(error))
        return None


def _of_data(cfg: Config, pipeline: str) -> Any:
    """Return the training data as samples of a pipeline.

    Raises:
        ValueError: there are none, or the pipeline has another name.
    """
    look_up(dict.fromkeys(('test', 'train')), pipeline, 'pipeline')
    leaves = list(datasets(cfg.get('train_dataloader')))
    if not leaves:
        raise ValueError(f'{cfg.filename} has no train_dataloader to take pictures from: give a folder of pictures')
    if pipeline == 'train':
        samples = DATASETS.build(cfg.train_dataloader.dataset)
    else:
        transforms = _test_transforms(cfg)
        samples = ConcatDataset([DATASETS.build({**leaf, 'pipeline': transforms}) for leaf in leaves])
    if len(samples) == 0:
        raise ValueError(f'{cfg.filename}: the training data set is empty')
    return samples


def _of_folder(cfg: Config, folder: Path, pipeline: str) -> PictureFolder:
    if pipeline != 'test':
        raise ValueError("a folder of pictures goes through the test pipeline: leave out pipeline='train'")
    if not folder.is_dir():
        raise ValueError(f'there is no folder {folder} to take pictures from')
    files = sorted(
        file
        for file in folder.rglob('*')
        if file.suffix.lower() in SUFFIXES and not file.name.startswith('.') and file.is_file()
    )
    if not files:
        raise ValueError(f'{folder} holds no picture ({", ".join(sorted(SUFFIXES))}), nor do the folders inside it')
    transforms = _test_transforms(cfg)
    if not transforms or not type_name(transforms[0]).startswith('Load'):
        transforms = [{'type': 'LoadImageFromFile'}, *transforms]  # the config's own data lie in memory
    return PictureFolder(files, Compose(transforms))


class PictureError(ValueError):
    """A file cannot be read as a picture."""


class PictureFolder:
    """Read pictures from files, each through the same transforms."""

    def __init__(self, files: Sequence[Path], transform: Compose) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample.

        Raises:
            PictureError: the picture cannot be read, or a transform fails on it.
        """
        file = str(self.files[index])
        try:
            sample = self.transform({'img_path': file, 'seg_fields': []})
        except (OSError, AssertionError, AttributeError, ValueError, cv2.error) as error:  # mmcv 2.0's is the third
            raise PictureError(f'{file} cannot be read as a picture: {first_line(error)}') from error
        if sample is None:
            raise PictureError(f'{file} cannot be read as a picture: a transform of the test pipeline drops it')
        return sample


def _test_transforms(cfg: Config) -> list[Mapping[str, Any]]:
    """Return the transforms of the test data, less those that load annotations.

    Raises:
        ValueError: the config has no test pipeline.
    """
    for name in ('test_dataloader', 'val_dataloader'):
        for dataset in datasets(cfg.get(name)):
            if 'pipeline' in dataset:
                names = [(type_name(transform), transform) for transform in dataset['pipeline']]
                return [each for name, each in names if not (name.startswith('Load') and 'Annotation' in name)]
    raise ValueError(f'{cfg.filename} has no test_dataloader whose pipeline says how pictures are prepared')
