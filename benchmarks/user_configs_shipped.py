"""Draw configs that mmpretrain and mmseg ship, and make them runnable here: synthetic data, few pixels, few iterations.

A config's model, losses, optimizer, schedule, hooks and transforms stay. Data sets and their paths, workers, batch size
and length of the run change, pixels where the model takes fewer, and weights that would be downloaded.
"""

from __future__ import annotations

import contextlib
import copy
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, MODELS, init_default_scope
from torch import nn

from benchmarks.user_configs_data import TRAIN, write_pictures
from benchmarks.zoo_models import config_root

MOST = 60_000_000  # parameters
BATCH = 2
ITERATIONS = 20
SMALL = {'mmpretrain': 112, 'mmseg': 128}
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
PICTURES = ('ImageNet', 'ImageNet21k', 'CIFAR10', 'CIFAR100', 'MNIST', 'CustomDataset', 'CUB', 'VOC')
TINY = {'CIFAR10': (32, 32), 'CIFAR100': (32, 32), 'MNIST': (28, 28)}
SIZES = ('scale', 'scales', 'crop_size', 'size', 'stride', 'img_size', 'img_scale')


class Excluded(Exception):
    """This config cannot be used here; the message is the reason, short."""


_BUILT: dict[str, int | Excluded] = {}  # by the model's config: many differ in data and schedule alone


@dataclass(frozen=True)
class Shipped:
    """A config that can be used: its name among those of its package, and its parameters."""

    name: str
    params: int


def names(package: str) -> list[str]:
    """List the configs that a package ships, but for what others inherit."""
    root = config_root(package)
    return sorted(str(p.relative_to(root)) for p in root.rglob('*.py') if '_base_' not in p.relative_to(root).parts)


def shuffled(package: str, seed: int) -> list[str]:
    """Return the configs of a package in the order in which they are drawn."""
    order = names(package)
    random.Random(f'{package} {seed}').shuffle(order)
    return order


def draw(package: str, seed: int, excluded: dict[str, str]) -> Iterator[Shipped]:
    """Yield configs that build, in random order, at most one of each folder; `excluded` gets the others' reasons."""
    folders: set[str] = set()
    for name in shuffled(package, seed):
        folder = name.partition('/')[0]
        if folder in folders:
            continue
        try:
            params = count_params(package, name)
        except Excluded as reason:
            excluded[f'{package}/{name}'] = str(reason)
            continue
        folders.add(folder)
        yield Shipped(name, params)


def count_params(package: str, name: str) -> int:
    """Build a config's model and return its number of parameters.

    Raises:
        Excluded: It cannot be read or built here, is too large, or reads other data than labelled pictures.
    """
    cfg = read(package, name)
    if package == 'mmpretrain' and (kind := kind_of(cfg)) not in PICTURES:
        raise Excluded(f'data: there are no synthetic data for {kind}')
    params = parameters(cfg)
    if params > MOST:
        raise Excluded(f'size: above {MOST // 10**6} M parameters')
    return params


def parameters(cfg: Config) -> int:
    """Build a config's model, unless the same one was built before, and return its number of parameters."""
    if (text := str(cfg.model)) not in _BUILT:
        try:
            _BUILT[text] = sum(p.numel() for p in built(cfg).parameters())
        except Excluded as reason:
            _BUILT[text] = reason
    if isinstance(found := _BUILT[text], Excluded):
        raise found
    return found


def read(package: str, name: str) -> Config:
    """Read a shipped config.

    Raises:
        Excluded: It cannot be read, or says nothing about training.
    """
    try:
        cfg = Config.fromfile(config_root(package) / name)
    except Exception as error:
        raise Excluded(f'reading: {type(error).__name__}: {first_line(error)}') from error
    if missing := [key for key in ('model', 'train_dataloader', 'optim_wrapper') if cfg.get(key) is None]:
        raise Excluded(f'no training: the config has no {missing[0]}')
    if len({cfg.get(key) is None for key in ('val_dataloader', 'val_cfg', 'val_evaluator')}) > 1:
        raise Excluded('reading: MMEngine refuses a val_dataloader without val_cfg and val_evaluator')
    cfg.model = Config({'model': without_weights(cfg.model.to_dict())}).model
    cfg.default_scope = package
    init_default_scope(package)
    return cfg


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without paths of this machine."""
    text = (str(error).strip().splitlines() or [''])[0][:160]
    return text.replace(str(Path(torch.__file__).parents[1]), 'site-packages')


def without_weights(value: Any) -> Any:
    """Return a model's config without what would be downloaded: `pretrained`, and `init_cfg` of that type."""
    if isinstance(value, dict):
        kept = {k: without_weights(v) for k, v in value.items() if k != 'pretrained'}
        init = kept.get('init_cfg')
        if isinstance(init, dict) and init.get('type') == 'Pretrained':
            del kept['init_cfg']
        return kept
    return type(value)(map(without_weights, value)) if isinstance(value, list | tuple) else value


def built(cfg: Config) -> nn.Module:
    """Build a config's model: without memory where that works.

    Raises:
        Excluded: It does not build.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            with torch.device('meta'):
                return MODELS.build(copy.deepcopy(cfg.model))
        except Exception:  # noqa: BLE001 - many compute numbers while they are built; they get memory
            pass
        try:
            return MODELS.build(copy.deepcopy(cfg.model))
        except BaseException as error:
            raise Excluded(f'building: {type(error).__name__}: {first_line(error)}') from error


def adapt(package: str, name: str, folder: Path) -> Config:
    """Return a shipped config with synthetic data (written into `folder`) that one core trains in a minute."""
    cfg = read(package, name)
    _, pipeline = innermost(cfg)
    crop = crop_of(cfg, pipeline)
    plain = package == 'mmseg' or cfg.model.type == 'ImageClassifier'
    small = next((s for s in (SMALL[package], 256) if plain and s < crop and runs(resized(cfg, s / crop), s)), crop)
    cfg = resized(cfg, small / crop)
    set_data(cfg, package, folder)
    shorten(cfg)
    return cfg


def innermost(cfg: Config) -> tuple[Any, list[Any]]:
    """Return the training data set inside all wrappers, and its pipeline."""
    dataset, pipeline = cfg.train_dataloader.dataset, None
    while {'dataset', 'datasets'} & dataset.keys():
        pipeline = dataset.get('pipeline') or pipeline
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return dataset, [*dataset.get('pipeline', []), *(pipeline or [])]


def kind_of(cfg: Config) -> str:
    """Return the class name of the training data set inside all wrappers."""
    return str(innermost(cfg)[0].type).rpartition('.')[2]


def crop_of(cfg: Config, pipeline: list[Any]) -> int:
    """Return the side of a training picture in pixels."""
    for step in reversed(pipeline):
        kind = str(step['type']).rpartition('.')[2]
        if 'Crop' in kind or kind == 'Resize':
            value = step.get('crop_size') or step.get('scale')
            if value is not None:
                return min(value) if isinstance(value, list | tuple) else int(value)
    size = (cfg.model.get('data_preprocessor') or {}).get('size')
    return min(size) if size else 224


def resized(cfg: Config, factor: float) -> Config:
    """Return the config with all sizes of pictures times a factor."""

    def times(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(times, value))
        return max(1, round(value * factor)) if isinstance(value, int | float) and value > 32 else value

    def walk(value: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {k: times(v) if k in keys else walk(v, keys) for k, v in value.items()}
        return type(value)(walk(v, keys) for v in value) if isinstance(value, list | tuple) else value

    new = cfg.to_dict()
    if factor != 1:
        new |= {key: walk(new.get(key), SIZES) for key in LOADERS}
        model = new['model'] = walk(new['model'], ('img_size',))
        for key in {'data_preprocessor', 'test_cfg'} & model.keys():
            model[key] = walk(model[key], SIZES)
    return Config({k: v for k, v in new.items() if v is not None})


def runs(cfg: Config, side: int) -> bool:
    """Say whether a config's model takes pictures of this side."""
    shape = (BATCH, cfg.model.get('backbone', {}).get('in_channels') or 3, side, side)
    try:
        with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            revert_sync_batchnorm(MODELS.build(copy.deepcopy(cfg.model))).train()(torch.zeros(shape), mode='tensor')
    except Exception:  # noqa: BLE001 - whatever it is, this model needs its size
        return False
    return True


def set_data(cfg: Config, package: str, folder: Path) -> None:
    """Write synthetic data, and read them with the config's own pipelines."""
    kind = kind_of(cfg)
    classes = classes_of(cfg.model)
    write_pictures(folder, TINY.get(kind, (120, 160)), classes)
    for key in LOADERS:
        if (loader := cfg.get(key)) is None:
            continue
        _, pipeline = innermost(Config({'train_dataloader': loader}))
        split = 'train' if key == 'train_dataloader' else 'val'
        make = segmentation if package == 'mmseg' else labels
        loader.dataset = make(kind, pipeline, folder, split, classes)
        loader.num_workers, loader.persistent_workers = 0, False
        loader.batch_size = min(loader.get('batch_size', BATCH), BATCH) if split == 'val' else BATCH
        loader.pop('batch_sampler', None)
    if kind == 'VOC':
        cfg.val_evaluator = cfg.test_evaluator = [dict(type='MultiLabelMetric'), dict(type='AveragePrecision')]
    DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset))[0]


def classes_of(model: Any) -> int:
    """Return the number of classes that a model's (last) head tells apart."""
    head = model.get('decode_head') or model.get('head') or {}
    head = head[-1] if isinstance(head, list | tuple) else head
    return max(int(head.get('num_classes') or 10), 2)


def labels(kind: str, pipeline: list[Any], folder: Path, split: str, classes: int) -> dict[str, Any]:
    """Return a data set of mmpretrain, of one or of several labels."""
    if not any('Load' in str(step['type']) for step in pipeline):  # the data set was of arrays
        gray = dict(color_type='grayscale') if kind == 'MNIST' else {}
        pipeline = [dict(type='LoadImageFromFile', **gray), *pipeline]
    common = dict(data_root=str(folder), pipeline=pipeline)
    if kind == 'VOC':
        return dict(type='MultiLabelDataset', ann_file=f'{split}.json', **common)
    names, prefix = [f'c{n}' for n in range(classes)], f'img/{split}'
    return dict(type='CustomDataset', ann_file=f'{split}.txt', data_prefix=prefix, classes=names, **common)


def segmentation(kind: str, pipeline: list[Any], folder: Path, split: str, classes: int) -> dict[str, Any]:
    """Return a data set of mmseg."""
    return dict(
        type='BaseSegDataset',
        data_root=str(folder),
        data_prefix=dict(img_path=f'img/{split}', seg_map_path=f'ann/{split}'),
        img_suffix='.png',
        reduce_zero_label=any(step.get('reduce_zero_label') for step in pipeline),
        metainfo=dict(classes=[f'c{n}' for n in range(classes)]),
        pipeline=pipeline,
    )


def shorten(cfg: Config) -> None:
    """Train for a few iterations, in epochs where the config counts epochs; what would begin later is left out."""
    loop, epochs = cfg.train_cfg, ITERATIONS * BATCH // TRAIN
    plans = cfg.get('param_scheduler') or []
    plans, length = plans if isinstance(plans, list) else [plans], {True: epochs, False: ITERATIONS}
    cfg.param_scheduler = [p for p in plans if p.get('begin', 0) < length[p.get('by_epoch', True)]]
    if loop.get('by_epoch', 'Epoch' in loop.get('type', 'Iter')) and 'max_iters' not in loop:
        loop.update(max_epochs=epochs, val_interval=1, val_begin=1)
        loop.pop('dynamic_intervals', None)
    else:
        loop.update(max_iters=ITERATIONS, val_interval=ITERATIONS)
        checkpoint = (cfg.get('default_hooks') or {}).get('checkpoint')
        if checkpoint is not None and not checkpoint.get('by_epoch', True):
            checkpoint.interval = ITERATIONS
