"""Samples to run a model's loss on: one of the config's data, or one that is made up where there are none."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger, print_log
from mmengine.registry import DATASETS, FUNCTIONS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmcpd.coupling import Coupling
from mmcpd.engine.build import datasets
from mmcpd.engine.passes import DEPLOYED, TRAINING, Pass, runs
from mmcpd.errors import first_line
from mmcpd.random_state import seeded

# What a data set raises whose files are not there.
ABSENT = (OSError, RuntimeError, ValueError, AssertionError, LookupError, ImportError, TypeError)
SIZES_OF_SAMPLES = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')  # keys of their metainfo, all (H, W)


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
            MMLogger.get_current_instance()  # made here, or it would write to the redirected output for good
            try:
                scope = DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine'))
                with scope, redirect_stdout(io.StringIO()):  # COCO's reader prints what it does
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
    """Return a batch of one picture (1, C, H, W), with a sample that the model's loss takes, if one is known.

    Where none is, a model whose deployed pass needs a sample gets the first with which that runs.
    """
    if not hasattr(model, 'data_preprocessor'):
        return picture
    made = [
        {'inputs': picture, 'data_samples': [sample.to(picture.device)]} for sample in _usual_samples(model, picture)
    ]
    plain = {'inputs': picture}
    tries = [(TRAINING, data) for data in made] + [(DEPLOYED, data) for data in (plain, *made)]
    return next((data for each, data in tries if runs(model, data, each) is None), plain)


@dataclass(frozen=True)
class WithSample:
    """Run the deployed pass on pictures (N, C, H, W), each with the same sample, where a model asks for one (DETR)."""

    sample: Any

    def __call__(self, model: nn.Module, pictures: Tensor) -> Any:
        return DEPLOYED(model, {'inputs': pictures, 'data_samples': [self.sample] * len(pictures)})


def pass_on_pictures(model: nn.Module, pictures: Tensor) -> Pass | WithSample:
    """Return how the deployed pass is called on pictures (N, C, H, W) alone.

    Raises:
        ValueError: the model runs neither on pictures alone nor with a sample that is known.
    """
    why = runs(model, pictures, DEPLOYED)
    if why is None:
        return DEPLOYED
    usual = _usual_samples(model, pictures) if hasattr(model, 'data_preprocessor') else ()
    for each in (each for sample in usual for each in (type(sample)(metainfo=sample.metainfo), sample)):
        with_sample = WithSample(each.to(pictures.device))
        if runs(model, pictures, with_sample) is None:
            return with_sample
    raise ValueError(
        f"what is deployed is forward(pictures, mode='tensor'), which {type(model).__name__} does not run ({why}): "
        f"give the forward's other arguments a default, and let mode 'tensor' return the logits"
    )


def on_pictures(coupling: Coupling, model: nn.Module, picture: Tensor) -> Coupling:
    """Return what was combed with an example of a picture (1, C, H, W) alone: a sample a model asks for is made up.

    Raises:
        ValueError: as `pass_on_pictures`.
    """
    if runs(model, picture, coupling.example.forward) is None:
        return coupling
    forward = pass_on_pictures(model, picture)
    return replace(coupling, example=replace(coupling.example, inputs=(picture,), forward=forward))


def _usual_samples(model: nn.Module, picture: Tensor) -> Iterator[Any]:
    """Yield samples of the packages that are loaded, those of the model's own package first."""
    own = type(model).__module__.split('.')[0]
    for package in sorted(MAKERS, key=lambda name: name != own):
        if package in sys.modules:
            height, width = picture.shape[-2:]
            yield from MAKERS[package](height, width)


def _of_classifiers(height: int, width: int) -> Iterator[Any]:
    """Yield a sample of the first class: of classifiers, of several labels."""
    from mmpretrain.structures import DataSample

    yield DataSample().set_gt_label(0)
    yield DataSample().set_gt_label([0])


def _of_segmentors(height: int, width: int) -> Iterator[Any]:
    """Yield a sample whose pixels are of the first class."""
    from mmseg.structures import SegDataSample

    size = (height, width)
    sample = SegDataSample(metainfo={'img_shape': size, 'ori_shape': size, 'pad_shape': size})
    sample.gt_sem_seg = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
    sample.gt_edge_map = PixelData(data=torch.zeros(1, *size, dtype=torch.long))
    yield sample


def detector_sample(height: int, width: int) -> Any:
    """Return a sample of a detector that says how large its picture is, and no more."""
    from mmdet.structures import DetDataSample

    sizes = dict.fromkeys(SIZES_OF_SAMPLES, (height, width))
    return DetDataSample(metainfo={**sizes, 'scale_factor': (1.0, 1.0), 'flip': False, 'border': (0, 0, 0, 0)})


def _of_detectors(height: int, width: int) -> Iterator[Any]:
    """Yield a sample with two objects of the first class, their boxes and masks; then with proposals of boxes too."""
    from mmdet.structures.mask import BitmapMasks

    size, sample = (height, width), detector_sample(height, width)
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.4, 0.9, 0.9]]) * torch.tensor([width, height] * 2)
    masks = np.zeros((2, *size), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.long().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.zeros(2, dtype=torch.long), masks=BitmapMasks(masks, *size)
    )
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.zeros(0, dtype=torch.long))
    sample.gt_sem_seg = PixelData(sem_seg=torch.zeros(1, *size, dtype=torch.long))
    yield sample
    sample = sample.clone()
    sample.proposals = InstanceData(bboxes=boxes.clone(), scores=torch.ones(2))
    yield sample


MAKERS = {'mmpretrain': _of_classifiers, 'mmseg': _of_segmentors, 'mmdet': _of_detectors}


def has_boxes(data: Mapping[str, Any]) -> bool:
    """Say whether the samples of a batch are a detector's."""
    samples = data.get('data_samples') or ()
    return any('gt_instances' in each for each in samples)


def resized(sample: Any, old: Sequence[int], new: Sequence[int]) -> Any:
    """Return a copy of a detector's sample for a picture that was scaled from a size (H, W) to another.

    Other samples are returned as they are.
    """
    if 'gt_instances' not in sample or tuple(old) == tuple(new):
        return sample
    size = (int(new[0]), int(new[1]))
    sample = sample.clone()
    sample.set_metainfo(dict.fromkeys(SIZES_OF_SAMPLES, size) | {'scale_factor': (1.0, 1.0)})
    for name in ('gt_instances', 'ignored_instances', 'proposals'):
        instances = sample.get(name)
        if instances is not None and 'bboxes' in instances:
            boxes = instances.bboxes
            instances.bboxes = boxes * boxes.new_tensor([new[1] / old[1], new[0] / old[0]] * 2)
        if instances is not None and 'masks' in instances:
            instances.masks = instances.masks.resize(size)
    if 'gt_sem_seg' in sample:
        labels = sample.gt_sem_seg.sem_seg
        sample.gt_sem_seg = PixelData(sem_seg=F.interpolate(labels[None].float(), size=size)[0].to(labels))
    return sample
