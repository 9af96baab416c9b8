"""A small classifier and a small segmentor, to be distilled with a few random pictures."""

from __future__ import annotations

import copy

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import torch
from mmengine.config import ConfigDict
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample

from mmcpd.engine.distillers import Distiller

torch.set_num_threads(1)
CLASSES = 4


def classifier(depth=18, **kwargs):
    return {
        'type': 'mmpretrain.ImageClassifier',
        'backbone': {'type': 'mmpretrain.ResNet', 'depth': depth, 'base_channels': 8, 'stem_channels': 8}
        | ({'in_channels': 3}),
        'neck': {'type': 'mmpretrain.GlobalAveragePooling'},
        'head': {
            'type': 'mmpretrain.LinearClsHead',
            'num_classes': CLASSES,
            'in_channels': 64,
            'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
        },
        'data_preprocessor': {
            'type': 'mmpretrain.ClsDataPreprocessor',
            'mean': [0.5, 0.5, 0.5],
            'std': [0.2, 0.2, 0.2],
            'num_classes': CLASSES,
        },
        **kwargs,
    }


def segmentor():
    return {
        'type': 'mmseg.EncoderDecoder',
        'backbone': {
            'type': 'mmseg.MobileNetV2',
            'widen_factor': 0.25,
            'strides': (1, 2, 2, 1, 1, 1, 1),
            'out_indices': (5, 6),
        },
        'decode_head': {
            'type': 'mmseg.FCNHead',
            'in_channels': 80,
            'channels': 8,
            'in_index': 1,
            'num_convs': 1,
            'concat_input': False,
            'num_classes': CLASSES,
            'norm_cfg': {'type': 'BN'},
            'loss_decode': {'type': 'mmseg.CrossEntropyLoss'},
        },
        'data_preprocessor': {
            'type': 'mmseg.SegDataPreProcessor',
            'mean': [0.0] * 3,
            'std': [1.0] * 3,
            'size': (32, 32),
        },
        'test_cfg': ConfigDict(mode='whole'),
    }


KD = {'type': 'KDLoss', 'tap': 'head.fc', 'loss_weight': 2.0}
CIRKD = {
    'type': 'CIRKDLoss',
    'tap': 'decode_head.conv_seg:in',
    'num_classes': CLASSES,
    'student_channels': 8,
    'pixel_queue': 32,
    'region_queue': 8,
}


def distiller(student=None, losses=(KD,), **kwargs):
    torch.manual_seed(0)
    return Distiller(student or classifier(), losses=losses, **kwargs)


def pictures(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        'inputs': [torch.randn(3, 32, 32, generator=g) for _ in range(n)],
        'data_samples': [DataSample().set_gt_label(i % CLASSES) for i in range(n)],
    }


def scenes(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        sample = SegDataSample(metainfo={'img_shape': (32, 32), 'ori_shape': (32, 32)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, CLASSES, (1, 32, 32), generator=g))
        samples.append(sample)
    return {'inputs': [torch.rand(3, 32, 32, generator=g) for _ in range(n)], 'data_samples': samples}


def losses_of(model, data):
    return model(**model.data_preprocessor(copy.deepcopy(data), training=True), mode='loss')
