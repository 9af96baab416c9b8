"""Hold the backbone against the paper's counts, the checkpoints' keys and an attention written as loops."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from mmcpd.models import SeaFormer
from mmcpd.models.convert import backbone_state_dict
from mmcpd.models.seaformer import (
    ARCHS,
    AxialPositionEmbedding,
    ConvMlp,
    ConvNorm,
    InvertedResidual,
    SqueezeAxialAttention,
)

MICRO: dict[str, Any] = dict(
    stem_channels=4,
    stages=[[[3, 1, 8, 1]], [[3, 2, 8, 2]], [[5, 2, 12, 2]]],
    depths=[2],
    key_dims=[3],
    num_heads=[2],
    mlp_ratios=[2],
)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Draw every parameter and running statistic, so that no branch is silent and every norm matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            low = 0.5 if 'running_var' in name else -0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + low)


# shapes


@pytest.mark.parametrize(
    ('arch', 'widths'),
    [
        ('t', (32, 128, 160)),
        ('small', (48, 160, 192)),
        ('b', (64, 192, 256)),
        ('large', (128, 192, 256, 320)),
    ],
)
@pytest.mark.parametrize('size', [(64, 128), (75, 97)])
def test_output_shapes(arch: str, widths: tuple[int, ...], size: tuple[int, int]) -> None:
    with torch.device('meta'):
        features = SeaFormer(arch).eval()(torch.empty(2, 3, *size))
    strides = (8, *(64 >> n for n in reversed(range(len(widths) - 1))))
    # a padded convolution of stride 2 rounds up, so a chain of them does too
    expected = [(2, c, *(math.ceil(n / s) for n in size)) for c, s in zip(widths, strides, strict=True)]
    assert [tuple(f.shape) for f in features] == expected


def test_a_dict_gives_everything() -> None:
    features = SeaFormer(MICRO, in_channels=1).eval()(torch.rand(1, 1, 32, 32))
    assert [tuple(f.shape) for f in features] == [(1, 8, 8, 8), (1, 12, 4, 4)]
    by_name, by_value = SeaFormer('tiny').state_dict(), SeaFormer(ARCHS['tiny']).state_dict()
    assert {k: v.shape for k, v in by_name.items()} == {k: v.shape for k, v in by_value.items()}


@pytest.mark.parametrize(
    ('arch', 'message'),
    [
        ('huge', "arch 'huge' is unknown"),
        ({k: v for k, v in MICRO.items() if k != 'depths'}, 'needs exactly'),
        (MICRO | dict(width=1), 'needs exactly'),
        (MICRO | dict(depths=[1, 1]), 'one entry per transformer stage'),
        (MICRO | {k: [1, 1] for k in ('depths', 'key_dims', 'num_heads', 'mlp_ratios')}, 'at most 1'),
    ],
)
def test_arch_errors(arch: str | dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SeaFormer(arch)


# state dict


def test_state_dict_keys() -> None:
    state = {name: tuple(tensor.shape) for name, tensor in SeaFormer('tiny').state_dict().items()}
    attn, mlp = 'trans1.transformer_blocks.1.attn', 'trans2.transformer_blocks.0.mlp'
    expected = {
        'smb1.stem_block.0.c.weight': (16, 3, 3, 3),
        'smb1.stem_block.0.bn.running_var': (16,),
        'smb1.layer1.conv.0.c.weight': (16, 1, 3, 3),  # t = 1: no expansion
        'smb1.layer1.conv.2.bn.bias': (16,),
        'smb1.layer2.conv.0.c.weight': (64, 16, 1, 1),
        'smb1.layer2.conv.2.c.weight': (64, 1, 3, 3),
        'smb1.layer2.conv.4.bn.weight': (16,),
        'smb2.layer1.conv.2.c.weight': (48, 1, 5, 5),
        'smb5.layer1.conv.4.c.weight': (160, 768, 1, 1),
        f'{attn}.to_q.c.weight': (64, 128, 1, 1),
        f'{attn}.to_k.bn.weight': (64,),
        f'{attn}.to_v.c.weight': (128, 128, 1, 1),
        f'{attn}.dwconv.c.weight': (256, 1, 3, 3),
        f'{attn}.pwconv.c.weight': (128, 256, 1, 1),
        f'{attn}.pos_emb_rowq.pos_embed': (1, 64, 16),
        f'{attn}.pos_emb_rowk.pos_embed': (1, 64, 16),
        f'{attn}.pos_emb_columnq.pos_embed': (1, 64, 16),
        f'{attn}.pos_emb_columnk.pos_embed': (1, 64, 16),
        f'{attn}.proj_encode_row.1.c.weight': (128, 128, 1, 1),
        f'{attn}.proj_encode_column.1.bn.running_mean': (128,),
        f'{attn}.proj.1.c.weight': (128, 128, 1, 1),
        f'{mlp}.fc1.c.weight': (640, 160, 1, 1),
        f'{mlp}.dwconv.weight': (640, 1, 3, 3),
        f'{mlp}.dwconv.bias': (640,),
        f'{mlp}.fc2.bn.weight': (160,),
    }
    assert {name: state.get(name) for name in expected} == expected
    assert {name.split('.')[0] for name in state} == {f'smb{i}' for i in range(1, 6)} | {'trans1', 'trans2'}
    block = {name.removeprefix(attn + '.').split('.')[0] for name in state if name.startswith(attn)}
    assert block == {
        *('to_q', 'to_k', 'to_v', 'dwconv', 'pwconv', 'proj', 'proj_encode_row', 'proj_encode_column'),
        *('pos_emb_rowq', 'pos_emb_rowk', 'pos_emb_columnq', 'pos_emb_columnk'),
    }


@pytest.mark.parametrize('init', [False, True])
def test_projections_start_silent(init: bool) -> None:
    model = SeaFormer(MICRO)
    if init:
        model.init_weights()
    zero = {n for n, p in model.named_parameters() if n.endswith('bn.weight') and not p.any()}
    assert zero == {
        f'trans1.transformer_blocks.{i}.attn.{branch}.1.bn.weight'
        for i in (0, 1)
        for branch in ('proj', 'proj_encode_row', 'proj_encode_column')
    }


def test_init_weights_uses_the_fan_out_per_group() -> None:
    torch.manual_seed(0)
    model = SeaFormer('large')
    model.init_weights()
    depthwise = model.trans3.transformer_blocks[0].mlp.dwconv.weight
    dense = model.smb5.layer1.conv[4].c.weight
    assert depthwise.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.05)
    assert dense.std().item() == pytest.approx(math.sqrt(2 / 320), rel=0.05)


def test_init_weights_follows_init_cfg() -> None:
    model = SeaFormer(MICRO, init_cfg=dict(type='Constant', val=0.25, layer='Conv2d'))
    model.init_weights()
    assert (model.smb1.stem_block[0].c.weight == 0.25).all()


@pytest.mark.parametrize('outer', ['state_dict', 'state_dict_ema', 'model', None])
@pytest.mark.parametrize('prefix', ['', 'module.', 'backbone.', 'module.backbone.'])
def test_pretrained(tmp_path: Path, outer: str | None, prefix: str) -> None:
    source = SeaFormer(MICRO)
    randomise(source)
    weights = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    weights['decode_head.conv_seg.bias' if 'backbone' in prefix else 'linear.bias'] = torch.zeros(3)
    path = tmp_path / 'seaformer.pth'
    torch.save({outer: weights, 'epoch': 3} if outer else weights, path)
    model = SeaFormer(MICRO, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_pretrained_prefers_the_average_and_takes_a_prefix() -> None:
    checkpoint = dict(state_dict={'a.x': torch.zeros(1)}, state_dict_ema={'a.x': torch.ones(1), 'b.y': torch.ones(1)})
    assert backbone_state_dict(checkpoint, 'a') == {'x': torch.ones(1)}
    with pytest.raises(ValueError, match=r"begins with 'c\.'.*\['a', 'b'\]"):
        backbone_state_dict(checkpoint, 'c.')


def test_pretrained_of_another_model_raises(tmp_path: Path) -> None:
    path = tmp_path / 'other.pth'
    torch.save(dict(state_dict=nn.Linear(2, 2).state_dict()), path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of SeaFormer, the first is 'smb1"):
        SeaFormer(MICRO, init_cfg=dict(type='Pretrained', checkpoint=str(path))).init_weights()


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg', 'mmpretrain'])
def test_is_registered_in_every_scope(scope: str) -> None:
    registry = pytest.importorskip(f'{scope}.registry').MODELS
    with DefaultScope.overwrite_default_scope(scope):
        assert type(registry.build(dict(type='mmcpd.SeaFormer', arch=MICRO))) is SeaFormer


def test_is_a_backbone_of_a_classifier() -> None:
    pytest.importorskip('mmpretrain.models')
    classifier = MODELS.build(
        dict(
            type='mmpretrain.ImageClassifier',
            backbone=dict(type='mmcpd.SeaFormer', arch=MICRO),
            neck=dict(type='mmpretrain.GlobalAveragePooling'),
            head=dict(type='mmpretrain.LinearClsHead', num_classes=5, in_channels=12),
        )
    )
    assert classifier.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 5)


# blocks


def test_drop_path_rises_within_each_stage() -> None:
    model = SeaFormer('large', drop_path_rate=0.1)
    for stage in (model.trans1, model.trans2, model.trans3):
        rates = [block.drop_path.drop_prob for block in stage.transformer_blocks]
        assert rates == pytest.approx([0.0, 0.05, 0.1])


@pytest.mark.parametrize(('stride', 'width', 'shortcut'), [(1, 8, True), (2, 8, False), (1, 4, False)])
def test_inverted_residual_shortcut(stride: int, width: int, shortcut: bool) -> None:
    block = InvertedResidual(8, width, 3, stride, 2).eval()
    randomise(block)
    x = torch.rand(1, 8, 6, 6)
    torch.testing.assert_close(block(x), block.conv(x) + (x if shortcut else 0))


def test_conv_mlp_bounds_its_activation_at_6() -> None:
    mlp = ConvMlp(2, 2).eval()
    with torch.no_grad():
        mlp.dwconv.weight.zero_()
        mlp.dwconv.bias.copy_(torch.tensor([-1.0, 3.0, 6.0, 9.0]))
        mlp.fc2.c.weight.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])[..., None, None])
    expected = torch.tensor([3.0, 12.0]) / math.sqrt(1 + mlp.fc2.bn.eps)
    torch.testing.assert_close(mlp(torch.rand(1, 2, 1, 1)).flatten(), expected)


def interpolated(embedding: Tensor, length: int) -> Tensor:
    """Interpolate (C, K) linearly to (C, length) with pixel centres at half positions, as loops."""
    out = embedding.new_zeros(embedding.shape[0], length)
    for i in range(length):
        source = max((i + 0.5) * embedding.shape[1] / length - 0.5, 0.0)
        low = min(int(source), embedding.shape[1] - 1)
        high, part = min(low + 1, embedding.shape[1] - 1), source - low
        out[:, i] = (1 - part) * embedding[:, low] + part * embedding[:, high]
    return out


@pytest.mark.parametrize('length', [1, 5, 16, 23, 64])
def test_position_embedding_is_interpolated(length: int) -> None:
    module = AxialPositionEmbedding(3).double()
    x = torch.rand(2, 3, length, dtype=torch.float64)
    torch.testing.assert_close(module(x), x + interpolated(module.pos_embed[0], length), rtol=0, atol=1e-12)
    if length == 16:
        torch.testing.assert_close(module(x), x + module.pos_embed, rtol=0, atol=1e-12)


def resized(attn: SqueezeAxialAttention, dims: int, heads: int, key_dim: int, head_dim: int) -> None:
    """Give an attention other widths, in place, as pruning does: the scale stays."""
    qk, v = heads * key_dim, heads * head_dim
    attn.num_heads, attn.key_dim, attn.head_dim = heads, key_dim, head_dim
    attn.to_q, attn.to_k, attn.to_v = ConvNorm(dims, qk), ConvNorm(dims, qk), ConvNorm(dims, v)
    attn.dwconv, attn.pwconv = (
        ConvNorm(2 * qk + v, 2 * qk + v, 3, groups=2 * qk + v),
        ConvNorm(2 * qk + v, dims),
    )
    for name in ('rowq', 'rowk', 'columnq', 'columnk'):
        setattr(attn, f'pos_emb_{name}', AxialPositionEmbedding(qk))
    attn.proj_encode_row[1], attn.proj_encode_column[1] = ConvNorm(v, v), ConvNorm(v, v)
    attn.proj[1] = ConvNorm(v, dims)


def naive_axis(attn: SqueezeAxialAttention, q: Tensor, k: Tensor, v: Tensor, axis: str, scale: float) -> Tensor:
    """Attend with one Python loop per index: q, k (N, heads * key_dim, L), v (N, heads * head_dim, L)."""
    length = q.shape[2]
    q = q + interpolated(getattr(attn, f'pos_emb_{axis}q').pos_embed[0], length)
    k = k + interpolated(getattr(attn, f'pos_emb_{axis}k').pos_embed[0], length)
    key_dim, head_dim = q.shape[1] // attn.num_heads, v.shape[1] // attn.num_heads
    out = torch.zeros_like(v)
    for n in range(q.shape[0]):
        for h in range(attn.num_heads):
            for i in range(length):
                scores = [
                    sum((q[n, h * key_dim + d, i] * k[n, h * key_dim + d, j]).item() for d in range(key_dim)) * scale
                    for j in range(length)
                ]
                total = sum(math.exp(score) for score in scores)
                for d in range(head_dim):
                    row = h * head_dim + d
                    out[n, row, i] = sum(math.exp(scores[j]) / total * v[n, row, j].item() for j in range(length))
    return out


@pytest.mark.parametrize('pruned', [None, (2, 3, 5), (2, 4, 3), (1, 4, 8)])
@torch.no_grad()
def test_attention_equals_loops(pruned: tuple[int, int, int] | None) -> None:
    attn = SqueezeAxialAttention(embed_dims=6, key_dim=4, num_heads=2)
    if pruned:
        resized(attn, 6, *pruned)
    attn = attn.double().eval()
    randomise(attn, seed=1)
    attn.to_v.bn.weight *= 60
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    width, height = x.shape[3], x.shape[2]
    row = naive_axis(attn, *(sum(t[..., i] for i in range(width)) / width for t in (q, k, v)), 'row', 0.5)
    column = naive_axis(attn, *(sum(t[:, :, i] for i in range(height)) / height for t in (q, k, v)), 'column', 0.5)
    for bounded in (row, column, v):
        assert bounded.min() < 0 and bounded.max() > 6  # both ends of ReLU6 are at work
    row = attn.proj_encode_row[1](row.clamp(0, 6)[:, :, :, None])
    column = attn.proj_encode_column[1](column.clamp(0, 6)[:, :, None, :])
    fused = torch.zeros_like(v)
    for i in range(height):
        for j in range(width):
            fused[:, :, i, j] = row[:, :, i, 0] + column[:, :, 0, j] + v[:, :, i, j]
    gate = (attn.proj[1](fused.clamp(0, 6)) + 3).clamp(0, 6) / 6
    detail = attn.pwconv(attn.dwconv(torch.cat((q, k, v), 1)).clamp(0, 6))

    assert gate.std() > 0.01  # neither dead nor saturated, so that the comparison sees the attention
    torch.testing.assert_close(attn(x), gate * detail, rtol=0, atol=1e-11)
    attn.scale = 0.6
    assert not torch.allclose(attn(x), gate * detail, rtol=0, atol=1e-6)


def test_attention_scale_is_a_plain_attribute() -> None:
    attn = SqueezeAxialAttention(embed_dims=6, key_dim=16, num_heads=2)
    assert [type(a) for a in (attn.num_heads, attn.key_dim, attn.head_dim, attn.scale)] == [
        int,
        int,
        int,
        float,
    ]
    assert (attn.num_heads, attn.key_dim, attn.head_dim, attn.scale) == (2, 16, 32, 0.25)
