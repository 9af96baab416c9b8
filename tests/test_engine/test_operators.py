"""mmcv's operators by torchvision: the numbers they give, what is missing, and what combing sees of them."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import mmcpd.engine  # noqa: F401 - lets mmcv.ops be imported
from mmcpd.comb import comb
from mmcpd.engine import operators
from mmcpd.engine.operators import NAME, OPERATORS, StandIn, followed, stand_in
from tests.exact import exact
from tests.helpers import sample

pytest.importorskip('torchvision')
ops = importlib.import_module('mmcv.ops')
stood_in = pytest.mark.skipif(not isinstance(sys.modules[NAME], StandIn), reason='mmcv has compiled operators here')


def brute_nms(boxes, scores, threshold, offset):
    """Return the kept indices by the definition, box by box."""
    left = scores.argsort(descending=True).tolist()
    kept = []
    while left:
        best = left.pop(0)
        kept.append(best)

        def overlap(other, best=best):
            low, high = (
                torch.maximum(boxes[best, :2], boxes[other, :2]),
                torch.minimum(boxes[best, 2:], boxes[other, 2:]),
            )
            both = (high - low + offset).clamp(min=0).prod()
            areas = [(boxes[i, 2:] - boxes[i, :2] + offset).prod() for i in (best, other)]
            return both / (areas[0] + areas[1] - both)

        left = [other for other in left if overlap(other) <= threshold]
    return kept


def drawn_boxes(number, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    corner = (torch.rand(number, 2, generator=generator, dtype=torch.float64) * 20).round()
    side = (torch.rand(number, 2, generator=generator, dtype=torch.float64) * 9).round() + 1
    scores = torch.rand(number, generator=generator, dtype=torch.float64)
    return torch.cat([corner, corner + side], 1).to(dtype), scores.to(dtype)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('offset', [0, 1])
def test_nms_keeps_what_the_definition_keeps(offset, dtype):
    boxes, scores = drawn_boxes(60, dtype)
    dets, kept = ops.nms(boxes, scores, 0.35, offset=offset)
    assert kept.tolist() == brute_nms(boxes, scores, 0.35, offset)
    assert dets.dtype == dtype
    assert kept.tolist() != brute_nms(boxes, scores, 0.35, 1 - offset)  # or the offset would not be seen


def test_boxes_of_different_classes_do_not_cover_each_other():
    boxes, scores = drawn_boxes(40)
    classes = torch.arange(40) % 3
    config = {'type': 'nms', 'iou_threshold': 0.35}
    _, kept = ops.batched_nms(boxes, scores, classes, config)
    expected = [brute_nms(boxes[classes == c], scores[classes == c], 0.35, 0) for c in range(3)]
    places = [torch.nonzero(classes == c)[each, 0].tolist() for c, each in enumerate(expected)]
    assert sorted(kept.tolist()) == sorted(index for each in places for index in each)
    assert len(kept) > len(brute_nms(boxes, scores, 0.35, 0))  # all in one class


def regions():
    picture = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rois = torch.tensor([[0, 1.5, 2, 9, 12], [1, 0, 0, 15, 7.5], [0, 4, 4, 6, 6]], dtype=torch.float64)
    return picture, rois


@stood_in
def test_pooled_regions_of_a_constant_are_that_constant():
    _, rois = regions()
    assert torch.allclose(ops.roi_align(torch.full((2, 1, 16, 16), 3.0).double(), rois, 4), torch.tensor(3.0).double())


@stood_in
@pytest.mark.parametrize(
    'pool', [lambda x, rois: ops.roi_align(x, rois, 4, 0.5, 2), lambda x, rois: ops.roi_pool(x, rois, 4, 0.5)]
)
def test_region_pooling_has_the_gradient_of_what_it_computes(pool):
    picture, rois = regions()
    assert torch.autograd.gradcheck(lambda x: pool(x, rois), picture.requires_grad_())


@stood_in
@pytest.mark.parametrize('groups', [1, 2])
def test_deformable_convolutions_without_offsets_are_plain_ones_and_have_gradients(groups):
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(1, 18, 3, 3, dtype=torch.float64)
    mask = torch.ones(1, 9, 3, 3, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(x, weight, bias, 2, 1, 1, groups)
    torch.testing.assert_close(ops.modulated_deform_conv2d(x, offset, mask, weight, bias, 2, 1, 1, groups), plain)
    torch.testing.assert_close(ops.deform_conv2d(x, offset, weight, 2, 1, 1, groups) + bias[:, None, None], plain)
    offset = (offset + 0.3).requires_grad_()
    mask = (mask * 0.7).requires_grad_()
    assert not torch.allclose(ops.deform_conv2d(x, offset, weight, 2, 1, 1, groups) + bias[:, None, None], plain)
    assert torch.autograd.gradcheck(lambda *t: ops.deform_conv2d(*t, 2, 1, 1, groups), (x, offset, weight))
    assert torch.autograd.gradcheck(
        lambda *t: ops.modulated_deform_conv2d(*t, 2, 1, 1, groups), (x, offset, mask, weight, bias)
    )


@stood_in
def test_offsets_that_are_no_numbers_do_not_end_the_process():
    lines = (
        'import mmcpd.engine, torch, mmcv.ops',
        'offset = torch.full((1, 18, 6, 6), torch.nan)',
        'print(mmcv.ops.deform_conv2d(torch.ones(1, 2, 8, 8), offset, torch.ones(3, 2, 3, 3)).abs().sum().item())',
    )
    done = subprocess.run([sys.executable, '-c', '; '.join(lines)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ['0.0']), done.stderr[-500:]


@stood_in
@pytest.mark.parametrize('weighted', [False, True])
def test_the_focal_loss_is_that_of_its_definition(weighted):
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([0, 2, 3, 1, 3])  # 3 is the background
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64) if weighted else None
    expected = torch.empty(5, 3, dtype=torch.float64)
    for i in range(5):
        for j in range(3):
            p = logits[i, j].sigmoid()
            hit = int(target[i]) == j
            loss = -0.25 * (1 - p) ** 2 * p.log() if hit else -0.75 * p**2 * (1 - p).log()
            expected[i, j] = loss * (weight[min(int(target[i]), 2)] if weighted else 1.0)
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, 'none'), expected.detach())
    assert torch.autograd.gradcheck(lambda x: ops.sigmoid_focal_loss(x, target, 2.0, 0.25, weight, 'sum'), logits)


@pytest.mark.parametrize('kind', ['DeformConv2dPack', 'ModulatedDeformConv2dPack'])
@pytest.mark.parametrize('parts', [1, 2])
def test_channels_pass_through_a_deformable_convolution(kind, parts):
    deformed = getattr(ops, kind)(8, 12, 3, padding=1, deform_groups=parts, bias=False)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), deformed, nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 2, 3))
    with followed():
        exact(net, sample((2, 3, 9, 9)), {'0': 8 // parts, '2': 12})


class MaskedNet(nn.Module):
    """Convolve only where a picture is bright, as the heads of guided anchoring do at inference."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(12, 2, 1)
        self.masked = ops.MaskedConv2d(8, 12, 3, padding=1)

    def forward(self, x):
        return self.last(self.masked(self.first(x).relu(), x.mean(1) > 0.2).relu())


@pytest.mark.parametrize('padding', [0, 1])
def test_a_masked_convolution_is_a_plain_one_where_the_mask_is(padding):
    torch.manual_seed(0)
    conv = ops.MaskedConv2d(3, 4, (2 * padding + 1, 2 * padding + 1), padding=padding).double()
    x, mask = torch.randn(1, 3, 5, 7).double(), torch.rand(1, 5, 7) > 0.5
    with torch.no_grad():
        torch.testing.assert_close(conv(x, mask), conv(x) * mask)
        assert conv(x, torch.zeros_like(mask)).eq(0).all()


def test_channels_pass_through_a_masked_convolution():
    with followed():
        exact(MaskedNet(), sample((1, 3, 9, 9)), {'first': 8, 'masked': 12})


@stood_in
def test_deformable_attention_of_a_gpu_is_that_of_the_cpu():
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch

    shapes, starts = torch.tensor([[4, 4], [2, 2]]), torch.tensor([0, 16])
    value = torch.randn(1, 20, 2, 3, dtype=torch.float64, requires_grad=True)
    places = (torch.rand(1, 5, 2, 2, 3, 2, dtype=torch.float64) * 0.8 + 0.1).requires_grad_()
    weights = torch.rand(1, 5, 2, 2, 3, dtype=torch.float64, requires_grad=True)

    def attention(*leaves):
        return MultiScaleDeformableAttnFunction.apply(leaves[0], shapes, starts, *leaves[1:], 64)

    leaves = (value, places, weights)
    torch.testing.assert_close(attention(*leaves), multi_scale_deformable_attn_pytorch(value, shapes, places, weights))
    assert torch.autograd.gradcheck(attention, leaves)


@stood_in
def test_a_missing_operator_says_its_name_and_what_to_do():
    boxes, scores = drawn_boxes(3, torch.float32)
    with pytest.raises(NotImplementedError, match=r'softnms is one of the compiled operators of mmcv, .* install mmcv'):
        ops.soft_nms(boxes, scores)
    with pytest.raises(NotImplementedError, match="roi_align with pool_mode='max'"):
        ops.roi_align(torch.ones(1, 1, 4, 4), torch.tensor([[0.0, 0, 0, 2, 2]]), 2, 1.0, 0, 'max')


def test_the_first_use_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(operators, 'print_log', lambda text, _logger: logging.getLogger('mmcpd').warning(text))
    module = StandIn(cause='none here')
    assert not caplog.records  # nothing at import
    for _ in range(2):
        module.nms(torch.zeros(1, 4), torch.zeros(1), iou_threshold=0.5, offset=0)
    assert [record.message for record in caplog.records] == [
        'none here: torchvision computes nms, pooling of regions and the like'
    ]


def test_compiled_operators_stay(monkeypatch):
    compiled = ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, compiled)
    stand_in()
    assert sys.modules[NAME] is compiled


def test_an_extension_that_cannot_be_loaded_is_replaced(monkeypatch, tmp_path):
    mmcv = importlib.import_module('mmcv')
    (tmp_path / '_ext.py').write_text('raise ImportError("undefined symbol: _ZN")\n')
    monkeypatch.setattr(mmcv, '__path__', [str(tmp_path)])
    monkeypatch.setitem(sys.modules, NAME, None)
    monkeypatch.delitem(sys.modules, NAME)
    stand_in()
    assert sys.modules[NAME].cause == 'the compiled operators of mmcv cannot be loaded (undefined symbol: _ZN)'


class Opaque(ModuleType):
    """Compiled operators that write into their outputs where no dispatcher sees it."""

    def __getattr__(self, name):
        if name.startswith('__'):
            raise AttributeError(name)
        return self.operator

    def operator(self, *args, **options):
        raise AssertionError('a compiled operator ran')


class TwoStages(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.pool = torch.nn.Conv2d(3, 8, 3), ops.RoIAlign((2, 2), 1.0, 2)
        self.fc = torch.nn.Linear(32, 5)

    def forward(self, x):
        rois = torch.tensor([[0.0, 1, 1, 6, 6], [0, 0, 2, 5, 7]], dtype=x.dtype)
        return self.fc(self.pool(self.conv(x), rois).flatten(1))


def test_combing_follows_region_pooling_whatever_mmcv_was_compiled_with(monkeypatch):
    align = sys.modules['mmcv.ops.roi_align']
    opaque = Opaque(NAME)
    monkeypatch.setattr(align, 'ext_module', opaque)
    model, x = TwoStages(), torch.randn(1, 3, 10, 10)
    with pytest.raises(AssertionError, match='a compiled operator ran'):
        model(x)
    with followed():
        coupling = comb(model, (x,))
    assert align.ext_module is opaque
    assert [(group.name, group.units) for group in coupling.groups] == [('conv', 8)]
    assert not coupling.unsupported
    assert {member.tensor for member in coupling.groups[0].members} >= {'conv.weight', 'fc.weight'}


def test_only_what_is_in_the_table_is_replaced_while_combing():
    opaque = Opaque(NAME)
    both = StandIn(opaque)
    assert both.softnms == opaque.operator
    assert both.nms is OPERATORS['nms']
