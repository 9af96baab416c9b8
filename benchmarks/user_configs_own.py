"""Configs as users write them, with the features that shipped ones lack; each is the text of a config file.

`{data}` stands for the folder of `user_configs_data.write_pictures`, `OWN` for what each has of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.user_configs_data import write_pictures

CLASSIFIER = """
_base_ = ['mmpretrain::_base_/default_runtime.py']
data = '{data}'
names = ['c0', 'c1', 'c2', 'c3']
train_pipeline = [dict(type='LoadImageFromFile'), dict(type='RandomFlip', prob=0.5), dict(type='PackInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='PackInputs')]
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='CustomDataset', data_root=data, ann_file='train.txt', data_prefix='img/train', classes=names,
                 pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CustomDataset', data_root=data, ann_file='val.txt', data_prefix='img/val', classes=names,
                 pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='Accuracy', topk=(1,))
data_preprocessor = dict(num_classes=4, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
model = dict(
    type='ImageClassifier', backbone=dict(type='ResNet', depth=18, num_stages=4, out_indices=(3,)),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=4, in_channels=512, loss=dict(type='CrossEntropyLoss'), topk=(1,)))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9, weight_decay=1e-4))
param_scheduler = dict(type='MultiStepLR', by_epoch=True, milestones=[2, 3])
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_cfg = test_cfg = dict()
"""

SEGMENTOR = """
_base_ = ['mmseg::_base_/default_runtime.py']
data = '{data}'
names = ['c0', 'c1', 'c2', 'c3']
train_pipeline = [
    dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(64, 64), cat_max_ratio=0.9), dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs')]
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations'), dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='BaseSegDataset', data_root=data, img_suffix='.png', metainfo=dict(classes=names),
                 data_prefix=dict(img_path='img/train', seg_map_path='ann/train'), pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='BaseSegDataset', data_root=data, img_suffix='.png', metainfo=dict(classes=names),
                 data_prefix=dict(img_path='img/val', seg_map_path='ann/val'), pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[127.5] * 3, std=[127.5] * 3, bgr_to_rgb=True, pad_val=0,
                           seg_pad_val=255, size=(64, 64)),
    backbone=dict(type='ResNetV1c', depth=18, num_stages=4, out_indices=(0, 1, 2, 3), strides=(1, 2, 1, 1),
                  dilations=(1, 1, 2, 4), norm_cfg=norm_cfg, contract_dilation=True),
    decode_head=dict(type='FCNHead', in_channels=512, in_index=3, channels=64, num_convs=1, num_classes=4,
                     norm_cfg=norm_cfg, loss_decode=dict(type='CrossEntropyLoss')),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.01))
param_scheduler = [dict(type='PolyLR', eta_min=1e-5, power=0.9, begin=0, end=20, by_epoch=False)]
train_cfg = dict(type='IterBasedTrainLoop', max_iters=20, val_interval=10)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
default_hooks = dict(
    timer=dict(type='IterTimerHook'), logger=dict(type='LoggerHook', interval=10, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'), sampler_seed=dict(type='DistSamplerSeedHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=20))
"""

CODE = "custom_imports = dict(imports=['benchmarks.user_configs_code'], allow_failed_imports=False)\n"
BANDS = """
train_pipeline[0] = test_pipeline[0] = dict(type='LoadBands')
"""

RECIPE = """_base_ = 'base.py'
model = dict(_delete_=True, type='mmcpd.Distiller', student=_base_.model, losses=[dict(type='mmcpd.KDLoss')])
"""
HOOK = """default_hooks = dict(
    prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5), begin=4, end=12, interval=2))
"""
NEW_STYLE = """from mmengine.config import read_base
from mmcpd.distill import KDLoss
from mmcpd.engine import Distiller, PruneHook

with read_base():
    from .base import *

model = dict(type=Distiller, student=model, losses=[dict(type=KDLoss)])
default_hooks.update(prune=dict(type=PruneHook, target=dict(macs=0.5), begin=4, end=12, interval=2))
"""

TUTORIAL = """
default_scope = 'mmengine'
train_dataloader = dict(
    batch_size=4, num_workers=0, collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type='PlainTensors', data_root='{data}', split='train'))
val_dataloader = dict(
    batch_size=4, num_workers=0, collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='PlainTensors', data_root='{data}', split='val'))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='RightShare')
model = dict(type='TutorialNet')
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_cfg = test_cfg = dict()
"""

NEW_BASE = """
from mmengine.dataset import DefaultSampler
from mmengine.hooks import CheckpointHook, IterTimerHook, LoggerHook, ParamSchedulerHook
from mmengine.optim import OptimWrapper
from torch.optim import AdamW
from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs, RandomFlip
from mmpretrain.evaluation import Accuracy
from mmpretrain.models import GlobalAveragePooling, ImageClassifier, LinearClsHead, ResNet

default_scope = 'mmpretrain'
data, names = '{data}', ['c0', 'c1', 'c2', 'c3']
model = dict(
    type=ImageClassifier, backbone=dict(type=ResNet, depth=18, num_stages=4, out_indices=(3,)),
    neck=dict(type=GlobalAveragePooling),
    head=dict(type=LinearClsHead, num_classes=4, in_channels=512, topk=(1,)))
data_preprocessor = dict(num_classes=4, mean=[127.5] * 3, std=[127.5] * 3, to_rgb=True)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=CustomDataset, data_root=data, ann_file='train.txt', data_prefix='img/train', classes=names,
                 pipeline=[dict(type=LoadImageFromFile), dict(type=RandomFlip, prob=0.5), dict(type=PackInputs)]))
val_dataloader = dict(
    batch_size=2, num_workers=0, sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=CustomDataset, data_root=data, ann_file='val.txt', data_prefix='img/val', classes=names,
                 pipeline=[dict(type=LoadImageFromFile), dict(type=PackInputs)]))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=Accuracy, topk=(1,))
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=AdamW, lr=1e-3))
train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=2)
val_cfg = test_cfg = dict()
default_hooks = dict(
    timer=dict(type=IterTimerHook), logger=dict(type=LoggerHook, interval=10),
    param_scheduler=dict(type=ParamSchedulerHook), checkpoint=dict(type=CheckpointHook, interval=1))
"""


@dataclass(frozen=True)
class Own:
    """A config of our own making: what it has that matters, its text, the recipe's, and the bands of its pictures."""

    name: str
    what: str
    text: str
    recipe: str = field(default=RECIPE + HOOK, repr=False)
    bands: int = 3


OWN = (
    Own(
        'nine_bands',
        '9 bands, no mean, own loader',
        CLASSIFIER + (CODE + BANDS) + "model['backbone']['in_channels'] = 9\ndata_preprocessor = dict(num_classes=4)\n",
        bands=9,
    ),
    Own(
        'four_bands',
        'segmentation of 4 bands, one mean for all',
        SEGMENTOR
        + CODE
        + BANDS
        + "model['backbone']['in_channels'] = 4\n"
        + "model['data_preprocessor'].update(mean=[127.5], std=[127.5], bgr_to_rgb=False)\n",
        bands=4,
    ),
    Own(
        'multi_label',
        'several labels a picture, MultiLabelLinearClsHead',
        CLASSIFIER
        + """
several = dict(type='MultiLabelDataset', data_root=data)
train_dataloader['dataset'] = dict(several, ann_file='train.json', pipeline=train_pipeline)
val_dataloader['dataset'] = dict(several, ann_file='val.json', pipeline=test_pipeline)
data_preprocessor['to_onehot'] = True
model['head'] = dict(type='MultiLabelLinearClsHead', num_classes=4, in_channels=512,
                  loss=dict(type='CrossEntropyLoss', use_sigmoid=True))
val_evaluator = test_evaluator = [dict(type='MultiLabelMetric'), dict(type='AveragePrecision')]
test_dataloader = val_dataloader
""",
    ),
    Own(
        'two_tasks',
        'a second head that only loss and predict run',
        CLASSIFIER
        + CODE
        + """
model = dict(
    type='TwoTasks', backbone=model['backbone'], head=model['head'], side=64,
    data_preprocessor=dict(type='ClsDataPreprocessor', mean=[127.5] * 3, std=[127.5] * 3))
""",
    ),
    Own(
        'siamese',
        'change detection: two pictures through one backbone',
        SEGMENTOR
        + CODE
        + """
model['type'] = 'SiameseDecoder'
model['data_preprocessor'].update(mean=[127.5], std=[127.5], bgr_to_rgb=False)
train_pipeline.insert(1, dict(type='LoadBefore'))
test_pipeline.insert(1, dict(type='LoadBefore'))
""",
    ),
    Own(
        'side_heads',
        'own segmentor, side heads inside loss()',
        SEGMENTOR + CODE + "model.update(type='SideHeads', side_channels=[64, 128, 256, 512])\n",
    ),
    Own(
        'ema_precise_bn',
        'EMAHook, PreciseBNHook, save_best',
        CLASSIFIER
        + """
custom_hooks = [dict(type='EMAHook', momentum=1e-2), dict(type='PreciseBNHook', num_samples=8, interval=1)]
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1, save_best='auto'))
""",
    ),
    Own('new_style', 'read_base, classes as type', NEW_BASE, NEW_STYLE),
    Own(
        'frozen_stages',
        'frozen_stages=2 and norm_eval',
        CLASSIFIER + "model['backbone'].update(frozen_stages=2, norm_eval=True)\n",
    ),
    Own(
        'two_optimizers',
        'OptimWrapperDict: backbone and head apart',
        CLASSIFIER
        + CODE
        + """
optim_wrapper = dict(
    constructor='BackboneAndHead', backbone=dict(type='SGD', lr=0.01), head=dict(type='AdamW', lr=1e-3))
param_scheduler = None
""",
    ),
    Own(
        'tutorial',
        "MMEngine's tutorial: no defaults, no mode 'tensor'",
        TUTORIAL + CODE,
        "_base_ = 'base.py'\n" + HOOK,
    ),
    Own(
        'random_forward',
        'a head that draws random numbers (LightHamHead, rand_init)',
        SEGMENTOR
        + """
model['decode_head'] = dict(
    type='LightHamHead', in_channels=[128, 256, 512], in_index=[1, 2, 3], channels=64, ham_channels=64, num_classes=4,
    norm_cfg=dict(type='GN', num_groups=8), loss_decode=dict(type='CrossEntropyLoss'),
    ham_kwargs=dict(MD_S=1, MD_R=8, train_steps=3, eval_steps=3, inv_t=100, rand_init=True))
""",
    ),
    Own(
        'knet',
        'K-Net: several heads in a row, a batch that is fixed',
        SEGMENTOR
        + """
model['decode_head'] = dict(
    type='IterativeDecodeHead', num_stages=2,
    kernel_update_head=[
        dict(type='KernelUpdateHead', num_classes=4, num_ffn_fcs=2, num_heads=4, num_mask_fcs=1,
             feedforward_channels=128, in_channels=64, out_channels=64, dropout=0.0, conv_kernel_size=1,
             ffn_act_cfg=dict(type='ReLU', inplace=True), with_ffn=True,
             feat_transform_cfg=dict(conv_cfg=dict(type='Conv2d'), act_cfg=None),
             kernel_updator_cfg=dict(
                 type='KernelUpdator', in_channels=64, feat_channels=64, out_channels=64,
                 act_cfg=dict(type='ReLU', inplace=True), norm_cfg=dict(type='LN'))) for _ in range(2)],
    kernel_generate_head=dict(
        type='FCNHead', in_channels=512, in_index=3, channels=64, num_convs=2, num_classes=4, norm_cfg=norm_cfg,
        loss_decode=dict(type='CrossEntropyLoss')))
model['auxiliary_head'] = dict(
    type='FCNHead', in_channels=256, in_index=2, channels=32, num_convs=1, num_classes=4, norm_cfg=norm_cfg,
    loss_decode=dict(type='CrossEntropyLoss', loss_weight=0.4))
""",
    ),
)


def write_own(own: Own, folder: Path) -> None:
    """Write `base.py`, `prune.py` and the data of a config into a folder."""
    write_pictures(folder / 'data', (64, 96), 4, own.bands)
    (folder / 'base.py').write_text(own.text.replace('{data}', str(folder / 'data')))
    (folder / 'prune.py').write_text(own.recipe)
