"""Hold the invariants of the zoo sweep on one small model of each of the paper's families, and a few others."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from benchmarks.zoo_checks import KEEP, count_macs, parity, slimmed, sweep_rotate
from benchmarks.zoo_family import Deployed, calibrate_, randomise_
from benchmarks.zoo_report import rotation_fault
from benchmarks.zoo_uses import in_training
from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import in_double, random_keep
from tests.helpers import TORCH_2_5


def classifier(width, neck=True, head='LinearClsHead', **backbone):
    neck = dict(type='mmpretrain.GlobalAveragePooling') if neck else None
    head = dict(type=f'mmpretrain.{head}', num_classes=7, in_channels=width)
    return dict(type='mmpretrain.ImageClassifier', backbone=backbone, neck=neck, head=head)


def segmentor(head, channels, neck=None, **backbone):
    head = dict(in_channels=channels, in_index=list(range(len(channels))), num_classes=7, align_corners=False, **head)
    return dict(type='mmseg.EncoderDecoder', backbone=backbone, neck=neck, decode_head=head)


BN = dict(type='BN')
SMALL = {
    # the paper's five families
    'resnet': classifier(256, type='mmpretrain.ResNet', depth=50, stem_channels=8, base_channels=8, expansion=4),
    'mobilenet_v2': classifier(1280, type='mmpretrain.MobileNetV2', widen_factor=0.25),
    'resnext': classifier(
        512, type='mmpretrain.ResNeXt', depth=50, groups=8, width_per_group=2, stem_channels=16, base_channels=16
    ),
    'deit': classifier(
        48,
        neck=False,
        head='VisionTransformerClsHead',
        type='mmpretrain.VisionTransformer',
        arch=dict(embed_dims=48, num_layers=2, num_heads=4, feedforward_channels=96),
        img_size=64,
        patch_size=16,
    ),
    'vit_upernet': segmentor(
        dict(type='mmseg.UPerHead', channels=16, norm_cfg=BN),
        [48, 48],
        type='mmseg.VisionTransformer',
        img_size=64,
        embed_dims=48,
        num_layers=2,
        num_heads=4,
        mlp_ratio=2,
        out_indices=(0, 1),
        final_norm=True,
        patch_bias=True,
    ),
    'seaformer': segmentor(
        dict(type='mmcpd.LightHead', channels=16, embed_dims=[16, 16], norm_cfg=BN),
        [32, 128, 160],
        type='mmcpd.SeaFormer',
        arch='tiny',
        norm_cfg=BN,
    ),
    # others: windows, efficient attention, shuffles, layer scale, squeeze and excitation, concatenation, fusion
    'swin': classifier(
        48,
        type='mmpretrain.SwinTransformer',
        arch=dict(embed_dims=24, depths=[2, 2], num_heads=[2, 4]),
        img_size=56,
        out_indices=(1,),
    ),
    'segformer': segmentor(
        dict(type='mmseg.SegformerHead', channels=16, norm_cfg=BN),
        [8, 16, 24, 32],
        type='mmseg.MixVisionTransformer',
        embed_dims=8,
        num_layers=[1, 1, 1, 1],
        num_heads=[1, 2, 3, 4],
    ),
    'shufflenet_v2': classifier(1024, type='mmpretrain.ShuffleNetV2', widen_factor=0.5),
    'convnext': classifier(
        64,
        neck=False,
        type='mmpretrain.ConvNeXt',
        arch=dict(depths=[1, 1, 2, 1], channels=[8, 16, 32, 64]),
        out_indices=(3,),
    ),
    'mobilenet_v3': classifier(576, type='mmpretrain.MobileNetV3', arch='small'),
    'densenet': classifier(
        42, type='mmpretrain.DenseNet', arch=dict(growth_rate=8, depths=[2, 3, 2, 3], init_channels=16)
    ),
    'hrnet': segmentor(
        dict(type='mmseg.FCNHead', channels=24, norm_cfg=BN, input_transform='resize_concat', num_convs=1),
        [8, 16],
        type='mmseg.HRNet',
        norm_cfg=BN,
        extra=dict(
            stage1=dict(num_modules=1, num_branches=1, block='BOTTLENECK', num_blocks=(1,), num_channels=(8,)),
            stage2=dict(num_modules=1, num_branches=2, block='BASIC', num_blocks=(1, 1), num_channels=(8, 16)),
            stage3=dict(num_modules=1, num_branches=3, block='BASIC', num_blocks=(1, 1, 1), num_channels=(8, 16, 24)),
            stage4=dict(
                num_modules=1, num_branches=4, block='BASIC', num_blocks=(1,) * 4, num_channels=(8, 16, 24, 32)
            ),
        ),
    ),
}
SIZES = {'swin': 56}
HEADS = {'deit': 8, 'vit_upernet': 8, 'swin': 12, 'segformer': 10}  # that are rotated


@pytest.fixture(scope='module', params=SMALL)
def case(request):
    """A small model with random weights, its input, its comb and a random keep."""
    import mmpretrain.models  # noqa: F401
    import mmseg.models  # noqa: F401
    from mmengine.registry import MODELS, DefaultScope

    import mmcpd.models  # noqa: F401

    config = copy.deepcopy(SMALL[request.param])
    size = SIZES.get(request.param, 64)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(config['type'].split('.')[0]):
        net = MODELS.build(config)
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    model = calibrate_(randomise_(Deployed(net), 0).eval(), x)
    found = comb(model, x)
    return model, x, found, random_keep(found, KEEP, 2)


@pytest.fixture(scope='module')
def exact(case):
    """The same in float64, slimmed by the keep and by one that is shifted."""
    model, _, found, keep = case
    double, example = in_double(model, found.example)
    return slimmed(double, replace(found, example=example), keep)


def test_almost_every_parameter_can_be_pruned(case):
    prunable, total = case[2].prunable()
    assert prunable / total > 0.95, case[2].reasons().most_common(3)


def test_masked_equals_slimmed(exact):
    gaps = exact.gaps()
    assert gaps['gap'] < 1e-9
    assert gaps['control'] > 1e-4


def test_masked_equals_slimmed_in_training_with_gradients(exact):
    row = in_training(exact)
    assert max(row['gap'], row['gradient_gap']) < 1e-8
    assert min(row['control'], row['gradient_control']) > 1e-4


@torch.no_grad()
def test_the_cost_is_what_the_slimmed_model_costs(case, exact):
    _, _, found, keep = case
    cost = found.cost(keep)
    assert cost.params == sum(p.numel() for p in exact.small.parameters())
    assert cost.macs == count_macs(exact)


@torch.no_grad()
def test_the_slimmed_model_exports(request, case):
    model, x, found, keep = case
    if not TORCH_2_5 and request.node.callspec.params['case'] == 'vit_upernet':
        pytest.skip('torch 2.4 exports no pooling to sizes that are no factors of the input')
    assert parity(slim(model, found, keep), (x,))['error_parity'] < 1e-3


def test_heads_are_rotated_and_the_outputs_stay(request, case):
    model, x, _, _ = case
    row = sweep_rotate(model, (x,))
    assert row['heads'] == HEADS.get(request.node.callspec.params['case'], 0), row
    assert rotation_fault(row) is None
    if row['heads']:
        assert rotation_fault(row | {'gap': 1e-9}).startswith('WRONG')
        assert rotation_fault(row | {'gap_control': 1e-12}).startswith('the control')
