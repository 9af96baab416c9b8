"""Sums are found in architectures that users prune, without knowing them; and the refitted net is still masked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.refit import refit
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep
from tests.helpers import EXACT, call, gap, randomise_

IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def backbone(**cfg):
    pytest.importorskip('mmpretrain')
    import mmpretrain.models  # noqa: F401
    from mmengine.registry import DefaultScope
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope('mmpretrain'):  # whatever an earlier test left
        return MODELS.build(cfg)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 16, 16)
        layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True, activation='gelu')
        self.layers, self.fc = nn.TransformerEncoder(layer, 2), nn.Linear(24, 4)

    def forward(self, x):
        return self.fc(self.layers(self.embed(x).flatten(2).mT).mean(1))


class Wrapped(nn.Module):
    """mmcv's attention and feed-forward network, which add the identity themselves, tokens first."""

    def __init__(self):
        super().__init__()
        pytest.importorskip('mmcv')
        from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention

        self.embed = nn.Conv2d(3, 24, 16, 16)
        self.att, self.ffn = MultiheadAttention(24, 2), FFN(24, 32, 2)

    def forward(self, x):
        x = self.embed(x).flatten(2).permute(2, 0, 1)
        return self.ffn(self.att(x)).mean(0)


CNN = dict(base_channels=8, stem_channels=8)
# What builds the net, and how many sums there are whose last layer lost rows or columns.
NETS = {
    'torch encoder': (Encoder, 4),
    'mmcv': (Wrapped, 2),
    'ResNet': (lambda: backbone(type='ResNet', depth=18, **CNN), 8),
    'ResNet, bottleneck': (lambda: backbone(type='ResNet', depth=50, **CNN, expansion=2), 16),
    'ConvNeXt': (lambda: backbone(type='ConvNeXt', arch=dict(depths=[1, 1, 2, 1], channels=[8, 12, 16, 24])), 5),
    'Swin': (
        lambda: backbone(type='SwinTransformer', img_size=64, window_size=2, arch=dict(
            embed_dims=12, depths=[2, 2, 1, 1], num_heads=[1, 2, 3, 6])), 12),
    'ViT': (
        lambda: backbone(type='VisionTransformer', img_size=64, out_type='avg_featmap', with_cls_token=False, arch=dict(
            embed_dims=24, num_layers=3, num_heads=2, feedforward_channels=32)), 6),
    'MobileNetV2': (lambda: backbone(type='MobileNetV2', widen_factor=0.25), 11),
    'EfficientNet': (lambda: backbone(type='EfficientNet', arch='b0'), 9),
}  # fmt: skip


@pytest.mark.parametrize('name', NETS)
def test_every_sum_is_found(name):
    build, sums = NETS[name]
    torch.manual_seed(0)
    model = build()
    randomise_(model)
    coupling = comb(model, IMAGES[:1])
    keep = random_keep(coupling, 0.7, 0)
    done = refit(model, coupling, keep, [IMAGES], samples=16)
    assert not done.report.uncorrected
    assert len(done.report.corrected) == sums, done.report.corrected
    refitted = call(coupling, done.model)
    assert gap(refitted, call(coupling, slim(done.model, coupling, keep))) <= EXACT
    other = {group: kept.roll(1) for group, kept in keep.items()}
    assert gap(refitted, call(coupling, slim(done.model, coupling, other))) > 1e-5
