"""A tiny run with dropout and augmentation that draws from every generator, for the tests of resuming."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from torch.utils.data import RandomSampler

ITERATIONS = 12
PRUNE = {'type': 'mmcpd.PruneHook', 'begin': 4, 'end': 8, 'interval': 2, 'target': {'macs': 0.6}}


@TRANSFORMS.register_module(force=True)
class Shake(BaseTransform):
    """Change a picture by Python's, numpy's and torch's random numbers."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        shift = 20 * random.random() + 20 * np.random.rand() + 20 * float(torch.rand(1))
        results['img'] = np.clip(results['img'] + shift, 0, 255).astype(np.uint8)
        return results


@DATA_SAMPLERS.register_module(force=True)
class TorchSampler(RandomSampler):
    """Shuffle by a seed from torch's generator, as torch's loaders do."""

    def __init__(self, dataset: Any, shuffle: bool, seed: int) -> None:
        super().__init__(dataset)


@HOOKS.register_module(force=True)
class Stop(Hook):
    """End a run by an error after some iterations, as a killed one ends."""

    priority = 'LOWEST'

    def __init__(self, after: int) -> None:
        self.after = after

    def after_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        if runner.iter + 1 == self.after:
            raise KeyboardInterrupt


def loader(count: int, workers: int = 0, sampler: str = 'InfiniteSampler', persistent: bool = False) -> dict[str, Any]:
    pipeline = [{'type': 'RandomFlip', 'prob': 0.5, 'direction': 'horizontal'}, {'type': 'Shake'}]
    dataset = {'type': 'mmcpd.DigitsDataset', 'split': 'train', 'indices': count}
    return {
        'batch_size': 8,
        'num_workers': workers,
        'persistent_workers': persistent,
        'sampler': {'type': sampler, 'shuffle': True},
        'dataset': {**dataset, 'pipeline': [*pipeline, {'type': 'PackInputs'}]},
    }


def config(folder: Path, by_epoch: bool, *, workers: int = 0, sampler: str = '', **changes: object) -> Config:
    """Return a run of 12 iterations, validated and saved every second; in epochs 4 make one."""
    head = {'type': 'StackedLinearClsHead', 'num_classes': 10, 'in_channels': 16, 'mid_channels': [16]}
    epochs = {'by_epoch': True, 'max_epochs': 3, 'val_interval': 1}
    iterations = {'by_epoch': False, 'max_iters': ITERATIONS, 'val_interval': 2}
    sampler = sampler or ('DefaultSampler' if by_epoch else 'InfiniteSampler')
    cfg = Config(
        {
            'default_scope': 'mmpretrain',
            'model': {
                'type': 'ImageClassifier',
                'backbone': {'type': 'mmcpd.CIFARResNet', 'depth': 20, 'stem_channels': 4, 'base_channels': 4},
                'neck': {'type': 'GlobalAveragePooling'},
                'head': {**head, 'dropout_rate': 0.3},
            },
            'data_preprocessor': {'num_classes': 10, 'mean': [79.5] * 3, 'std': [90.7] * 3},
            'train_dataloader': loader(32, workers, sampler),
            'val_dataloader': loader(16, 0, 'DefaultSampler'),
            'val_evaluator': {'type': 'Accuracy', 'topk': (1,)},
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9}},
            'train_cfg': epochs if by_epoch else iterations,
            'val_cfg': {},
            'default_hooks': {
                'prune': PRUNE,
                'checkpoint': {
                    'type': 'mmcpd.CheckpointHook',
                    'interval': 1 if by_epoch else 2,
                    'by_epoch': by_epoch,
                    'save_best': 'auto',
                },
                'logger': {'type': 'LoggerHook', 'interval': 2},
            },
            'randomness': {'seed': 0},
            'work_dir': str(folder),
            'experiment_name': folder.name,
            'log_level': 'WARNING',
        }
    )
    cfg.merge_from_dict(changes)
    return cfg


def run(cfg: Config, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Train, at most until `stop` iterations, and return the model's tensors."""
    run.count += 1
    cfg = cfg.copy()
    cfg.experiment_name += f'_{run.count}'
    cfg.custom_hooks = [{'type': 'Stop', 'after': stop}] if stop else []
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
    except KeyboardInterrupt:
        assert stop, 'only a run that is to be stopped ends so'
    finally:
        DefaultScope._instance_dict.clear()
    return {name: value.clone() for name, value in runner.model.state_dict().items()}


run.count = 0


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)
