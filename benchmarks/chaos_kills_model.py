"""What `chaos_kills.py` trains: a tiny classifier with dropout, augmentation of its own, pruning and distillation."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import mmpretrain.datasets
import mmpretrain.models  # noqa: F401
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.registry import MODELS, TRANSFORMS
from torch import Tensor, nn

ITERATIONS, BEGIN, SAVED = 12, 4, 2  # pruning begins at 4, every second iteration is saved


@MODELS.register_module()
class TinyBackbone(nn.Sequential):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU()),
        )

    def forward(self, images: Tensor) -> tuple[Tensor]:
        return (super().forward(images),)


@TRANSFORMS.register_module()
class Shake(BaseTransform):
    """Change a picture by Python's, numpy's and torch's random numbers."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        shift = 20 * random.random() + 20 * np.random.rand() + 20 * float(torch.rand(1))
        results['img'] = np.clip(results['img'] + shift, 0, 255).astype(np.uint8)
        return results


def loader(count: int, sampler: str) -> dict[str, Any]:
    pipeline = [{'type': 'RandomFlip', 'prob': 0.5, 'direction': 'horizontal'}, {'type': 'Shake'}]
    dataset = {'type': 'mmcpd.DigitsDataset', 'split': 'train', 'indices': count}
    return {
        'batch_size': 8,
        'num_workers': 0,
        'sampler': {'type': sampler, 'shuffle': True},
        'dataset': {**dataset, 'pipeline': [*pipeline, {'type': 'PackInputs'}]},
    }


def config(folder: Path, by_epoch: bool, processes: int) -> Config:
    head = {'type': 'StackedLinearClsHead', 'num_classes': 10, 'in_channels': 16, 'mid_channels': [16]}
    student = {
        'type': 'ImageClassifier',
        'backbone': {'type': 'TinyBackbone'},
        'neck': {'type': 'GlobalAveragePooling'},
        'head': {**head, 'dropout_rate': 0.3},
    }
    epochs = {'by_epoch': True, 'max_epochs': ITERATIONS // SAVED, 'val_interval': 1}
    checkpoint = {'interval': 1 if by_epoch else SAVED, 'by_epoch': by_epoch, 'max_keep_ckpts': 1, 'save_best': 'auto'}
    return Config(
        {
            'default_scope': 'mmpretrain',
            'model': {'type': 'mmcpd.Distiller', 'student': student, 'losses': [{'type': 'mmcpd.KDLoss'}]},
            'data_preprocessor': {'num_classes': 10, 'mean': [79.5] * 3, 'std': [90.7] * 3},
            'train_dataloader': loader(8 * SAVED * processes, 'DefaultSampler' if by_epoch else 'InfiniteSampler'),
            'val_dataloader': loader(16, 'DefaultSampler'),
            'val_evaluator': {'type': 'Accuracy', 'topk': (1,)},
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9}},
            'train_cfg': epochs if by_epoch else {'by_epoch': False, 'max_iters': ITERATIONS, 'val_interval': SAVED},
            'val_cfg': {},
            'default_hooks': {
                'prune': {'type': 'mmcpd.PruneHook', 'begin': BEGIN, 'end': 8, 'interval': 2, 'target': {'macs': 0.6}},
                'checkpoint': {'type': 'mmcpd.CheckpointHook', **checkpoint},
            },
            'randomness': {'seed': 0},
            'work_dir': str(folder),
            'experiment_name': f'{folder.name}_{os.getpid()}',
            'launcher': 'none' if processes == 1 else 'pytorch',
            'model_wrapper_cfg': {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False},
            'log_level': 'WARNING',
        }
    )
