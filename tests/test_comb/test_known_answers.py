"""Models that everybody knows, with the number of groups that they must have."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from torch import nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import (
    CONTROL,
    EXACT,
    call,
    check_cost,
    check_equal,
    check_structure,
    gap,
    masked,
    randomise_,
    sample,
)

GROUPS = {
    'resnet18': 12,
    'resnet50': 37,
    'mobilenet_v2': 25,
    'resnext50_32x4d': 21,
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', GROUPS)
def test_convolutional_networks(name):
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().double().eval()
    found = comb(model, sample((1, 3, 64, 64)))
    assert len(found.groups) == GROUPS[name]
    assert not found.unsupported
    assert not any('trial' in f.reason for f in found.frozen)
    keep = random_keep(found, 0.7, 0)
    small, dense = slim(model, found, keep), call(found, model)
    assert gap(call(found, masked(model, found, keep)), call(found, small)) <= EXACT
    assert gap(dense, call(found, small)) > CONTROL
    group = max(found.groups, key=lambda g: g.units)
    other = {**keep, group.name: keep[group.name].roll(1)}
    assert gap(call(found, masked(model, found, other)), call(found, small)) > CONTROL


def test_resnet18_group_by_group():
    found = comb(torchvision.models.resnet18(), torch.rand(1, 3, 64, 64))
    stem, stages = found.groups[0], {1: 64, 2: 128, 3: 256, 4: 512}
    assert stem.name == 'conv1' and stem.units == 64
    inner = {f'layer{i}.{j}.conv1': width for i, width in stages.items() for j in range(2)}
    outer = {'conv1': 64, 'layer2.0.conv2': 128, 'layer3.0.conv2': 256, 'layer4.0.conv2': 512}
    assert {g.name: g.units for g in found.groups} == inner | outer
    tensors = {m.tensor for m in stem.members if m.role == 'out'}
    assert tensors == {'conv1.weight', 'layer1.0.conv2.weight', 'layer1.1.conv2.weight'}
    readers = {m.tensor for m in stem.cut}
    assert readers == {
        'layer1.0.conv1.weight',
        'layer1.1.conv1.weight',
        'layer2.0.conv1.weight',
        'layer2.0.downsample.0.weight',
    }


def test_resnext_goes_by_whole_convolution_groups():
    found = comb(torchvision.models.resnext50_32x4d(), torch.rand(1, 3, 64, 64), trial=False)
    group = found.group('layer1.0.conv1')
    assert group.units == 32
    rows = {(m.tensor, m.dim): tuple(m.index.shape) for m in group.members}
    assert rows['layer1.0.conv1.weight', 0] == rows['layer1.0.conv2.weight', 0] == (32, 4)
    assert rows['layer1.0.conv3.weight', 1] == (32, 4)


def transformer(kind: str = 'VisionTransformer', **options) -> nn.Module:
    """Build an mmpretrain classifier, whose embedding is not the model's output."""
    width = options.pop('width')
    backbone = dict(type=kind, **options)
    neck = dict(type='GlobalAveragePooling') if kind == 'SwinTransformer' else None
    head = dict(type='LinearClsHead' if neck else 'VisionTransformerClsHead', num_classes=5, in_channels=width)
    DefaultScope.get_instance('tests', scope_name='mmpretrain')
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head))


def small_vit() -> nn.Module:
    arch = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=40)
    return transformer(arch=arch, img_size=32, patch_size=8, width=24)


def small_swin() -> nn.Module:
    arch = dict(embed_dims=12, depths=[2, 2], num_heads=[2, 4])
    return transformer(
        'SwinTransformer', arch=arch, img_size=32, patch_size=2, window_size=4, out_indices=(1,), width=24
    )


def test_deit_small():
    model = transformer(arch='deit-small', img_size=32, patch_size=16, width=384)
    found = comb(model, torch.rand(1, 3, 32, 32))
    assert len(found.groups) == 25
    mlps = [g for g in found.groups if g.units == 1536]
    attentions = [g for g in found.groups if g.units == 64]
    (embedding,) = (g for g in found.groups if g.units == 384)
    assert (len(mlps), len(attentions)) == (12, 12)
    assert len(embedding.members) == 127
    for group in attentions:
        widths = {(m.tensor.split('attn.')[1], m.dim): m.index.shape[1] for m in group.members}
        assert widths == {('qkv.weight', 0): 18, ('qkv.bias', 0): 18, ('proj.weight', 1): 6}
    for group in mlps:
        assert sorted(m.role for m in group.members) == ['in', 'out', 'out']
    assert not found.unsupported


@pytest.mark.parametrize('heads', ['dim', 'head'])
def test_a_small_vision_transformer(heads):
    torch.manual_seed(0)
    model = randomise_(small_vit())
    found = comb(model, sample((1, 3, 32, 32)), heads=heads)
    attentions = {g.name: g.units for g in found.groups if g.name.endswith('qkv')}
    assert attentions == {f'backbone.layers.{i}.attn.qkv': 8 if heads == 'dim' else 3 for i in range(2)}
    assert len(found.groups) == 5
    small = check_equal(model, found, seeds=(0,))
    check_cost(model, found)
    check_structure(model, found, small, small_vit)
    keep = found.keep()
    keep['backbone.layers.1.attn.qkv'][0] = False
    attention = slim(model, found, keep).backbone.layers[1].attn
    assert (attention.num_heads, attention.head_dims) == ((3, 7) if heads == 'dim' else (2, 8))


def test_whole_heads_of_a_small_vision_transformer_are_whole():
    found = comb(small_vit(), torch.rand(1, 3, 32, 32), heads='head')
    group = found.group('backbone.layers.0.attn.qkv')
    index = {(m.tensor.split('attn.')[1], m.dim): m.index.tolist() for m in group.members}
    qkv = [[head * 8 + i + 24 * piece for piece in range(3) for i in range(8)] for head in range(3)]
    proj = [[head * 8 + i for i in range(8)] for head in range(3)]
    assert index == {('qkv.weight', 0): qkv, ('qkv.bias', 0): qkv, ('proj.weight', 1): proj}


@pytest.mark.parametrize('heads', ['dim', 'head'])
def test_a_small_swin(heads):
    torch.manual_seed(0)
    model = randomise_(small_swin())
    found = comb(model, sample((1, 3, 32, 32)), heads=heads)
    attentions = [g.units for g in found.groups if g.name.endswith('qkv')]
    assert attentions == ([6, 6, 6, 6] if heads == 'dim' else [2, 2, 4, 4])
    tables = {m.tensor for g in found.groups for m in g.members if 'relative_position_bias_table' in m.tensor}
    assert len(tables) == (0 if heads == 'dim' else 4)
    assert not any('trial' in f.reason for f in found.frozen), found.reasons()
    small = check_equal(model, found, seeds=(0,))
    check_cost(model, found)
    check_structure(model, found, small, small_swin)


def test_float32_is_close_enough():
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    found = comb(model, torch.rand(2, 3, 64, 64))
    keep = random_keep(found, 0.7, 0)
    assert gap(call(found, masked(model, found, keep)), call(found, slim(model, found, keep))) < 1e-4


def test_the_cost_of_resnet50_is_the_published_one():
    model = torchvision.models.resnet50()
    found = comb(model, torch.rand(1, 3, 224, 224), trial=False)
    cost = found.cost(found.keep())
    assert cost.macs == 4_089_184_256
    assert cost.params == 25_557_032
    del model


@pytest.mark.parametrize('name', ['resnet18', 'mobilenet_v2', 'resnext50_32x4d'])
def test_the_cost_is_what_the_slim_model_runs(name):
    model = getattr(torchvision.models, name)()
    found = comb(model, torch.rand(1, 3, 64, 64), trial=False)
    check_cost(model, found, ratio=0.7)


def test_combing_does_not_depend_on_the_batch():
    model = small_vit()
    one = comb(copy.deepcopy(model), torch.rand(1, 3, 32, 32))
    three = comb(model, torch.rand(3, 3, 32, 32))
    assert [(g.name, g.units) for g in one.groups] == [(g.name, g.units) for g in three.groups]
    assert three.cost(three.keep()).macs == 3 * one.cost(one.keep()).macs
    assert three.cost(three.keep()).params == one.cost(one.keep()).params
