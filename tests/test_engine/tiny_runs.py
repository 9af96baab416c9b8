"""A run of four epochs on 64 digits, pruned to half of its MACs between the first and the last, and what to ask it."""

from __future__ import annotations

import copy

import torch
from mmengine.config import Config
from mmengine.hooks import Hook

from mmcpd.engine.distillers import Distiller
from mmcpd.engine.hooks import PruneHook
from tests.helpers import TORCH_2_5

torch.set_num_threads(1)
EPOCH = 4  # iterations
# What `config` takes for units that go all at once.
AT_ONCE = {'default_hooks.prune': {'_delete_': True, 'type': 'mmcpd.PruneHook', 'at_once': True, 'pictures': 32}}
STUDENT = {
    'type': 'ImageClassifier',
    'backbone': {'type': 'ResNet', 'depth': 18, 'base_channels': 8, 'stem_channels': 8},
    'neck': {'type': 'GlobalAveragePooling'},
    'head': {
        'type': 'LinearClsHead',
        'num_classes': 10,
        'in_channels': 64,
        'loss': {'type': 'CrossEntropyLoss'},
        'topk': (1,),
    },
}


def loader(count):
    dataset = {'type': 'mmcpd.DigitsDataset', 'split': 'train', 'indices': count, 'pipeline': [{'type': 'PackInputs'}]}
    sampler = {'type': 'DefaultSampler', 'shuffle': count == 64}
    return {'batch_size': 16, 'num_workers': 0, 'sampler': sampler, 'dataset': dataset}


def config(work_dir, *, distil=True, epochs=4, **changes):
    """A run of 16 iterations: dense for 4, pruning until 12 by an event every 2, then 4 more."""
    model = copy.deepcopy(STUDENT)
    if distil:
        model = {'type': 'mmcpd.Distiller', 'student': model, 'losses': [{'type': 'mmcpd.KDLoss'}]}
    cfg = Config(
        {
            'default_scope': 'mmpretrain',
            'model': model,
            'data_preprocessor': {'num_classes': 10, 'mean': [79.5] * 3, 'std': [90.7] * 3},
            'train_dataloader': loader(64),
            'val_dataloader': loader(32),
            'val_evaluator': {'type': 'Accuracy', 'topk': (1,)},
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9}},
            'train_cfg': {'by_epoch': True, 'max_epochs': epochs, 'val_interval': 1},
            'val_cfg': {},
            'default_hooks': {
                'prune': {'type': 'mmcpd.PruneHook', 'begin': 4, 'end': 12, 'interval': 2, 'target': {'macs': 0.5}},
                'checkpoint': {'type': 'CheckpointHook', 'interval': 1},
                'logger': {'type': 'LoggerHook', 'interval': 2},
            },
            'randomness': {'seed': 0},
            'work_dir': str(work_dir),
            'experiment_name': work_dir.name,
            'log_level': 'INFO',
        }
    )
    changes = copy.deepcopy(changes)  # merging takes `_delete_` out of them
    cfg.merge_from_dict({name.replace('prune.', 'default_hooks.prune.'): value for name, value in changes.items()})
    return cfg


def hook_of(runner, kind=PruneHook):
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


class Watch(Hook):
    """Note what is left, and whether somebody teaches, after each iteration."""

    priority = 'LOWEST'

    def __init__(self):
        self.left, self.taught, self.losses = [], [], []

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.left.append(hook_of(runner).pruner.left()['macs'])
        model = runner.model
        self.taught.append(isinstance(model, Distiller) and model.teacher is not None)
        self.losses.append(float(outputs['loss'].detach()))


def train(runner):
    watch = Watch()
    runner.register_hook(watch)
    runner.train()
    return watch


X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def log_of(tmp_path, name='run'):
    return '\n'.join(file.read_text() for file in sorted((tmp_path / name).glob('*/*.log')))


SHARE = '49.' if TORCH_2_5 else '50.0%'  # of the MACs that remain: initial weights of torch 2.4 are others
