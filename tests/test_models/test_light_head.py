"""Hold the Light head and the whole SeaFormer segmenters against the paper, training and ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip('mmseg')

from mmseg.structures import SegDataSample

from mmcpd.models import LightHead, SeaFormer
from tests.helpers import TORCH_2_5

CONFIGS = Path(__file__).parents[2] / 'configs' / '_base_' / 'models'


def build(size: str, **backbone: object) -> nn.Module:
    """Build the segmenter that a size's config describes."""
    config = Config.fromfile(CONFIGS / f'seaformer_{size}.py').model
    config.backbone.update(backbone)
    return revert_sync_batchnorm(MODELS.build(config))


@pytest.fixture
def head() -> LightHead:
    torch.manual_seed(0)
    return LightHead(
        [6, 8],
        in_channels=[3, 4, 5],
        in_index=[0, 1, 2],
        channels=8,
        num_classes=7,
        norm_cfg=dict(type='BN'),
    ).eval()


# paper: parameters in millions and GFLOPs at 512x512, one decimal. counted: parameters, and the multiply-adds
# of convolutions and matrix products, which is torch.utils.flop_counter / 2.
COUNTS = {
    't': dict(paper=(1.7, 0.6), counted=(1667318, 562569216)),
    's': dict(paper=(4.0, 1.1), counted=(3990118, 1030875136)),
    'b': dict(paper=(8.6, 1.8), counted=(8605654, 1757585408)),
    'l': dict(paper=(14.0, 6.5), counted=(13951510, 6340313088)),
}


@pytest.mark.parametrize('size', COUNTS)
def test_counts_agree_with_the_paper(size: str) -> None:
    norm_elements = 0

    def count_norm(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal norm_elements
        norm_elements += output.numel()

    with torch.device('meta'):
        model = build(size).eval()
        image = torch.empty(1, 3, 512, 512)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(count_norm)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        logits = model(image, mode='tensor')
    params = sum(p.numel() for p in model.parameters())
    macs = counter.get_total_flops() // 2

    assert logits.shape == (1, 150, 64, 64)
    assert (params, macs) == COUNTS[size]['counted']
    # The authors count with fvcore: one per multiply-add, and two per element of an affine norm's output.
    assert (round(params / 1e6, 1), round((macs + 2 * norm_elements) / 1e9, 1)) == COUNTS[size]['paper']


def test_attention_block_count_by_hand() -> None:
    block = SeaFormer('tiny').trans1.transformer_blocks[0]
    dim, qk, v, hidden = 128, 64, 128, 256
    width = 2 * qk + v
    attn = dim * width + 2 * width  # to_q, to_k, to_v and their norms
    attn += width * 9 + 2 * width + width * dim + 2 * dim  # detail enhancement
    attn += 4 * qk * 16 + 2 * (v * v + 2 * v) + v * dim + 2 * dim  # positions, row, column, proj
    mlp = dim * hidden + 2 * hidden + hidden * 9 + hidden + hidden * dim + 2 * dim
    assert sum(p.numel() for p in block.parameters()) == attn + mlp


def test_state_dict_keys(head: LightHead) -> None:
    state = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items() if 'num_batches' not in name}
    conv = {
        'fuse1.local_embedding': (6, 3, 1, 1),
        'fuse1.global_act': (6, 4, 1, 1),
        'fuse2.local_embedding': (8, 6, 1, 1),
        'fuse2.global_act': (8, 5, 1, 1),
        'linear_fuse': (8, 1, 1, 1),
    }
    expected = {f'{name}.conv.weight': shape for name, shape in conv.items()}
    for name, shape in conv.items():
        expected |= {f'{name}.bn.{t}': shape[:1] for t in ('weight', 'bias', 'running_mean', 'running_var')}
    assert state == expected | {'conv_seg.weight': (7, 8, 1, 1), 'conv_seg.bias': (7,)}


@torch.no_grad()
def test_fusion_gates_local_features(head: LightHead) -> None:
    block, local, context = head.fuse1, torch.randn(2, 3, 6, 8), torch.randn(2, 4, 3, 4)
    gate = ((block.global_act(context) + 3) / 6).clamp(0, 1)
    gate = nn.functional.interpolate(gate, (6, 8), mode='bilinear', align_corners=False)
    torch.testing.assert_close(block(local, context), block.local_embedding(local) * gate)
    assert block.local_embedding(local).min() < 0 and block.global_act(context).min() < 0  # no activation
    block.global_act.bn.weight.zero_()  # a silent context halves, it does not erase
    torch.testing.assert_close(block(local, context), block.local_embedding(local) / 2)


@torch.no_grad()
def test_head_chains_fusions(head: LightHead) -> None:
    features = [torch.randn(2, 3, 9, 11), torch.randn(2, 4, 3, 4), torch.randn(2, 5, 2, 2)]
    x = head.fuse2(head.fuse1(features[0], features[1]), features[2])
    expected = head.conv_seg(head.linear_fuse(x))
    assert expected.shape == (2, 7, 9, 11)
    torch.testing.assert_close(head(features), expected)


@pytest.mark.parametrize('embed_dims', [[6], [6, 8, 8], [8, 6]])
def test_head_widths_must_fit(embed_dims: list[int]) -> None:
    with pytest.raises(ValueError, match='must end with channels=8'):
        LightHead(embed_dims, in_channels=[3, 4, 5], in_index=[0, 1, 2], channels=8, num_classes=7)


def test_head_is_registered_in_mmseg_scope() -> None:
    from mmseg.registry import MODELS as MMSEG_MODELS

    head = dict(embed_dims=[4], in_channels=[3, 4], in_index=[0, 1], channels=4, num_classes=3)
    with DefaultScope.overwrite_default_scope('mmseg'):
        assert type(MMSEG_MODELS.build(dict(type='mmcpd.LightHead', **head))) is LightHead


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = build('t', drop_path_rate=0.0)
    model.init_weights()
    model.decode_head.dropout = None
    images = torch.randn(2, 3, 64, 96)
    labels = torch.randint(0, 2, (2, 1, 64, 96)) * 149
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(4):
        loss, log = model.parse_losses(model(images, samples, mode='loss'))
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert without == []
        optimizer.step()
    assert {'decode.loss_ce', 'decode.acc_seg'} <= set(log)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize('dynamo', sorted({False, TORCH_2_5}))
@pytest.mark.filterwarnings('ignore::DeprecationWarning', 'ignore::FutureWarning', 'ignore::UserWarning')
def test_onnx_runtime_agrees(dynamo: bool, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.manual_seed(0)
    model = build('t').eval()
    for name, tensor in model.state_dict().items():
        if 'bn.' in name and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)  # wake the branches that start at gamma 0
    image = torch.rand(1, 3, 72, 100)
    with torch.no_grad():
        expected = model(image, mode='tensor')
    path = tmp_path / 'seaformer.onnx'
    torch.onnx.export(model, (image,), path, dynamo=dynamo, opset_version=18, input_names=['input'])
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {'input': image.numpy()})
    assert expected.std() > 0.01
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
