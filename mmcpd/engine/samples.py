"""Samples to run a model's loss on: one of the config's data, or one that is made up where there are none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DATASETS, FUNCTIONS, DefaultScope
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmcpd.engine.build import datasets
from mmcpd.engine.passes import TRAINING, runs
from mmcpd.errors import first_line
from mmcpd.random_state import seeded

# What a data set raises whose files are not there.
ABSENT = (OSError, RuntimeError, ValueError, AssertionError, LookupError, ImportError, TypeError)


@dataclass(frozen=True)
class Samples:
    """A data set, and how its samples become a batch."""

    dataset: Any
    collate: Callable[[list[Any]], Any] = pseudo_collate

    @classmethod
    def of_loader(cls, loader: DataLoader) -> Samples:
        return cls(loader.dataset, cast(Any, loader.collate_fn))

    @classmethod
    def of_config(cls, cfg: Config, *loaders: str) -> Samples | None:
        """Build the data of the first of these loaders (train, validation, test), or None where none is here."""
        for name in loaders or ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            loader = cfg.get(name)
            if next(datasets(loader), None) is None:
                continue
            try:
                with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
                    found = cls(DATASETS.build(loader.dataset), collate_of(loader))
                    found.batch()
                return found
            except ABSENT as error:
                print_log(f'{name} cannot be read ({first_line(error)}): a picture of noise takes its place', 'current')
        return None

    def batch(self) -> Any:
        """Return a batch of the first sample, the same each time, whatever its pipeline draws; it may be written to."""
        with seeded(0):
            indexed = hasattr(self.dataset, '__getitem__')
            sample = self.dataset[0] if indexed else next(iter(self.dataset))
            return self.collate([copy.deepcopy(sample)])


def collate_of(loader: Any) -> Callable[[list[Any]], Any]:
    """Return how the loader of a config makes a batch of samples."""
    config = loader.get('collate_fn') or {'type': 'pseudo_collate'}
    kind = config['type']
    found = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    options = {name: value for name, value in config.items() if name != 'type'}
    return lambda batch: found(batch, **options)


def made_up(model: nn.Module, picture: Tensor) -> Any:
    """Return a batch of one picture (1, C, H, W), with a sample that the model's loss takes, if one is known."""
    if not hasattr(model, 'data_preprocessor'):
        return picture
    for sample in _usual_samples(*picture.shape[-2:]):
        data = {'inputs': picture, 'data_samples': [sample.to(picture.device)]}
        if runs(model, data, TRAINING) is None:
            return data
    return {'inputs': picture}


def _usual_samples(height: int, width: int) -> Iterator[Any]:
    """Yield a sample of the first class: of classifiers, of several labels, of segmentors."""
    if find_spec('mmpretrain') is not None:
        from mmpretrain.structures import DataSample

        yield DataSample().set_gt_label(0)
        yield DataSample().set_gt_label([0])
    if find_spec('mmseg') is not None:
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        size = (height, width)
        sample = SegDataSample(metainfo={'img_shape': size, 'ori_shape': size, 'pad_shape': size})
        sample.gt_sem_seg = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
        sample.gt_edge_map = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
        yield sample
