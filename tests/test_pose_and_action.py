"""mmpose's and mmaction2's networks: masked and slimmed ones agree, by the code of docs/pose_and_action.md."""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmcpd.engine  # noqa: F401 - before OpenMMLab's packages: it stands in for mmcv's compiled operators
from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.slim import compare, slim
from mmcpd.slim.trial import in_double, random_keep, randomised
from tests.helpers import CONTROL, EXACT, rotated

RESNET = dict(type='ResNet', depth=50, base_channels=8, stem_channels=8)
HEATMAPS = dict(type='HeatmapHead', out_channels=5, loss=dict(type='KeypointMSELoss'))
SIMPLE_BASELINE = dict(
    type='TopdownPoseEstimator', backbone=RESNET,
    head={**HEATMAPS, 'in_channels': 256, 'deconv_out_channels': (16, 16), 'deconv_kernel_sizes': (4, 4)},
)  # fmt: skip


def stage(branches: int, block: str, blocks: int = 1) -> dict[str, object]:
    channels = [8 * 2**level for level in range(branches)]
    return dict(num_modules=1, num_branches=branches, block=block, num_blocks=(blocks,) * branches, num_channels=channels)


HRNET = dict(
    type='TopdownPoseEstimator',
    backbone=dict(type='HRNet', in_channels=3, extra=dict(
        stage1=stage(1, 'BOTTLENECK'), **{f'stage{n}': stage(n, 'BASIC') for n in (2, 3, 4)})),
    head={**HEATMAPS, 'in_channels': 8, 'deconv_out_channels': None},
)  # fmt: skip
RTMPOSE = dict(
    type='TopdownPoseEstimator',
    backbone=dict(type='mmdet.CSPNeXt', deepen_factor=0.167, widen_factor=0.125, out_indices=(4,),
                  norm_cfg=dict(type='BN')),
    head=dict(
        type='RTMCCHead', in_channels=128, out_channels=5, input_size=(64, 96), in_featuremap_size=(2, 3),
        simcc_split_ratio=2.0, final_layer_kernel_size=3, loss=dict(type='KLDiscretLoss', use_target_weight=True),
        gau_cfg=dict(hidden_dims=24, s=16, expansion_factor=2, dropout_rate=0.0, drop_path=0.0, act_fn='SiLU',
                     use_rel_bias=False, pos_enc=False),
    ),
)  # fmt: skip
CONSENSUS = dict(type='AvgConsensus', dim=1)
TSN = dict(
    type='Recognizer2D', backbone=dict(type='mmpretrain.ResNet', depth=18, base_channels=8, stem_channels=8),
    cls_head=dict(type='TSNHead', num_classes=6, in_channels=64, consensus=CONSENSUS, dropout_ratio=0.4),
)  # fmt: skip
SLOW_ONLY = dict(
    type='Recognizer3D',
    backbone=dict(type='ResNet3dSlowOnly', depth=50, pretrained=None, base_channels=8, lateral=False,
                  conv1_kernel=(1, 7, 7), conv1_stride_t=1, pool1_stride_t=1, inflate=(0, 0, 1, 1)),
    cls_head=dict(type='I3DHead', in_channels=256, num_classes=6, dropout_ratio=0.5),
)  # fmt: skip

PICTURE, CLIPS, FRAMES = (2, 3, 96, 64), (2, 1, 3, 4, 32, 32), (2, 3, 3, 32, 32)
NETWORKS = {
    'simple_baseline': ('mmpose', SIMPLE_BASELINE, PICTURE),
    'hrnet': ('mmpose', HRNET, PICTURE),
    'rtmpose': ('mmpose', RTMPOSE, PICTURE),
    'tsn': ('mmaction', TSN, FRAMES),
    'slow_only': ('mmaction', SLOW_ONLY, CLIPS),
}


def pose(model, images):
    """Run a pose estimator, whose forward insists on data samples that this mode does not read."""
    return model(images, None, mode='tensor')


def action(model, clips):
    """Run a recogniser as far as its scores; its tensor mode ends at the backbone otherwise."""
    return model(clips, mode='tensor', stage='head')


def importable(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f'{package} is not installed: see docs/pose_and_action.md')
    try:
        import_module(f'{package}.models')
    except (ImportError, AssertionError, ValueError) as error:
        pytest.skip(f'{package} is installed, but cannot be imported: {error}')


@pytest.fixture(scope='module', params=NETWORKS)
def combed(request) -> tuple[nn.Module, Coupling]:
    package, config, shape = NETWORKS[request.param]
    importable(package)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(package):
        model = randomised(MODELS.build(ConfigDict(config))).eval()
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return model, comb(model, images, forward=action if package == 'mmaction' else pose)


def test_masked_and_slimmed_models_agree(combed):
    model, coupling = combed
    double, example = in_double(model, coupling.example)
    coupling = replace(coupling, example=example)
    keep = random_keep(coupling, 0.6, seed=0)
    small = slim(double, coupling, keep)
    assert compare.compare(double, coupling, keep, small) <= EXACT
    for group in coupling.groups:
        other = rotated(coupling, group.name, keep)
        if bool((other[group.name] != keep[group.name]).any()):
            assert compare.compare(double, coupling, other, small) > CONTROL, f'{group.name} goes unnoticed'
    print(len(coupling.groups), {k: v for k, v in getattr(coupling, 'frozen', {}).items()} if hasattr(coupling, 'frozen') else '')
