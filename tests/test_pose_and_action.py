"""mmpose's and mmaction2's networks: masked and slimmed ones agree, by the code of docs/pose_and_action.md."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import mmcpd.engine  # noqa: F401 - before OpenMMLab's packages: it stands in for mmcv's compiled operators
from mmcpd.slim.compare import compare as difference
from mmcpd.slim.trial import random_keep, randomised
from tests.helpers import EXACT, rotated

PAGE = Path(__file__).parents[1] / 'docs' / 'pose_and_action.md'

RESNET = dict(type='ResNet', depth=50, base_channels=8, stem_channels=8)
HEATMAPS = dict(type='HeatmapHead', out_channels=5, loss=dict(type='KeypointMSELoss'))
SIMPLE_BASELINE = dict(
    type='TopdownPoseEstimator', backbone=RESNET,
    head={**HEATMAPS, 'in_channels': 256, 'deconv_out_channels': (16, 16), 'deconv_kernel_sizes': (4, 4)},
)  # fmt: skip


def stage(branches: int, block: str) -> dict[str, object]:
    channels = [8 * 2**level for level in range(branches)]
    return dict(num_modules=1, num_branches=branches, block=block, num_blocks=(1,) * branches, num_channels=channels)


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


def importable(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f'{package} is not installed: docs/pose_and_action.md')
    try:
        import_module(f'{package}.models')
    except (ImportError, AssertionError, ValueError) as error:
        pytest.skip(f'{package} is installed, but cannot be imported: {error}')


def run_page(model: nn.Module, example: torch.Tensor, package: str) -> dict[str, Any]:
    """Run the page's code on a network, and return its variables."""
    (code,) = re.findall(r'```python\n(.*?)```', PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {'model': model, 'example': example, 'package': package}
    exec(compile(code, str(PAGE), 'exec'), names)
    return names


@pytest.mark.parametrize('name', NETWORKS)
def test_masked_and_slimmed_networks_agree(name):
    package, config, shape = NETWORKS[name]
    importable(package)
    if name == 'rtmpose':
        importable('mmdet')  # which has its backbone
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(package):
        model = randomised(MODELS.build(ConfigDict(config))).double().eval()
    example = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    found = run_page(model, example, package)
    coupling, small = found['coupling'], found['small']
    keep = random_keep(coupling, 0.6, seed=0)
    exact = difference(model, coupling, keep, small)
    wrong = {}
    for group in coupling.groups:
        other = rotated(coupling, group.name, keep)
        if bool((other[group.name] != keep[group.name]).any()):
            wrong[group.name] = difference(model, coupling, other, small)
    assert not coupling.unused, 'the head is not run'
    assert exact <= EXACT
    assert min(wrong.values()) > 100 * EXACT, wrong
