"""Boxes in ONNX: what a detector predicts, by shapes that do not depend on its scores."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
from mmengine.config import Config
from torch import nn

from mmcpd.deploy import check_detections, check_parity, deploy, export_onnx
from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.operators import followed
from mmcpd.engine.passes import DEPLOYED
from mmcpd.engine.samples import WithSample, pass_on_pictures
from mmcpd.errors import DeployError
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep

pytest.importorskip('mmdet', reason='mmdet is not installed')

from mmcpd.engine.detections import NOTHING, detections, predictions, why_no_boxes
from tests.helpers import TORCH_2_10
from tests.test_engine.test_detectors import ANCHORS, CODER, detr, retinanet, two_stages

TESTING = dict(nms_pre=50, score_thr=0.05, min_bbox_size=0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=30)
LEVELS = dict(norm_cfg=dict(type='BN'), num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)


def with_head(kind, head, testing=TESTING, training=None):
    """A RetinaNet with another head."""
    return {**retinanet(), 'type': kind, 'bbox_head': head, 'test_cfg': testing, 'train_cfg': training}


def anchors():
    return {**retinanet(), 'test_cfg': TESTING}


def points():
    return with_head('FCOS', dict(type='FCOSHead', strides=[8, 16, 32], **LEVELS))


def distributions():
    grid = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=4, scales_per_octave=1, strides=[8, 16, 32])
    return with_head('GFL', dict(type='GFLHead', anchor_generator=grid, **LEVELS))


def one_nms_for_all():
    nms = dict(type='nms', iou_threshold=0.3, class_agnostic=True)
    head = dict(type='RTMDetSepBNHead', anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
                bbox_coder=dict(type='DistancePointBBoxCoder'), loss_cls=dict(type='QualityFocalLoss'),
                with_objectness=False, **LEVELS)  # fmt: skip
    return with_head('RTMDet', head, {**TESTING, 'nms': nms})


def boolean_masks():
    head = dict(type='YOLOXHead', strides=[8, 16, 32], **LEVELS)
    return with_head('YOLOX', head, dict(score_thr=0.2, nms=dict(type='nms', iou_threshold=0.65)))


def pooled_maxima():
    neck = dict(type='CTResNetNeck', in_channels=64, num_deconv_filters=(32, 16), num_deconv_kernels=(4, 4),
                use_dcn=False)  # fmt: skip
    backbone = {**retinanet()['backbone'], 'out_indices': (3,)}
    head = dict(type='CenterNetHead', num_classes=3, in_channels=16, feat_channels=16)
    testing = dict(topk=20, local_maximum_kernel=3, max_per_img=20)
    return {**with_head('CenterNet', head, testing), 'backbone': backbone, 'neck': neck}


def objectness_first():
    """A mask of the objectness takes rows before any score is looked at."""
    sizes = [[(10, 13), (16, 30)], [(30, 61), (62, 45)], [(59, 90), (80, 70)]]
    head = dict(type='YOLOV3Head', num_classes=3, in_channels=[16] * 3, out_channels=[16] * 3,
                featmap_strides=[8, 16, 32], norm_cfg=dict(type='BN'), bbox_coder=dict(type='YOLOBBoxCoder'),
                anchor_generator=dict(type='YOLOAnchorGenerator', base_sizes=sizes, strides=[8, 16, 32]))  # fmt: skip
    return with_head('YOLOV3', head, {**TESTING, 'conf_thr': 0.5, 'nms_pre': 500})


def deformed():
    """Deformable convolutions, which ONNX has from opset 19 on."""
    grid = dict(type='AnchorGenerator', ratios=[1.0], octave_base_scale=8, scales_per_octave=1, strides=[8, 16, 32])
    head = dict(type='TOODHead', anchor_type='anchor_free', anchor_generator=grid, norm_cfg=dict(type='BN'),
                num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2, num_dcn=1,
                bbox_coder=dict(type='DeltaXYWHBBoxCoder'))  # fmt: skip
    return with_head('TOOD', head)


def regions():
    """Proposals have no classes."""
    head = dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_generator=ANCHORS, bbox_coder=CODER)
    return {**with_head('RPN', None, dict(rpn=TESTING)), 'rpn_head': head}


def masks():
    """An RTMDet that finds masks as well."""
    head = dict(type='RTMDetInsHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1,
                anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16, 32]),
                bbox_coder=dict(type='DistancePointBBoxCoder'), loss_cls=dict(type='QualityFocalLoss'),
                loss_mask=dict(type='DiceLoss'), norm_cfg=dict(type='BN'))  # fmt: skip
    return with_head('RTMDet', head)


KINDS = {each.__name__: each for each in (anchors, points, distributions, one_nms_for_all, boolean_masks,
                                          pooled_maxima, objectness_first, detr)}  # fmt: skip


def made(model):
    """Build a model whose scores are spread over (0, 1), so that a threshold parts them and few are equal."""
    torch.manual_seed(0)
    net = build_dense(Config(dict(model=model, default_scope='mmdet')))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d) and name.startswith('bbox_head'):
            nn.init.normal_(module.weight, std=0.5 / module.weight[0].numel() ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    return net.eval()


def check(path, model, batches, _forward=None):
    return check_detections(path, model, batches, predictions)


@pytest.mark.parametrize(
    'opset', [pytest.param(18, marks=pytest.mark.slow), 17]
)  # the exporter over torch.export is slow
@pytest.mark.parametrize('name', KINDS)
def test_a_file_of_a_slim_detector_finds_what_the_model_predicts(tmp_path, name, opset):
    model, pictures = made(KINDS[name]()), torch.rand(2, 3, 64, 96)
    cfg = Config(dict(model=KINDS[name](), default_scope='mmdet'))
    coupling = comb_by_config(model, cfg, input_shape=(3, 64, 96))
    small = slim(model, coupling, random_keep(coupling, 0.5, 0))
    path = export_onnx(small, pictures, tmp_path / 'boxes.onnx', opset, dynamic_batch=False, forward=detections)
    parity = check(path, small, [pictures, pictures.flip(3)])
    assert parity.ok, parity
    assert [size for size, _ in parity.batches] == [2, 2]
    assert not check(path, model, [pictures]).ok
    operators = {node.op_type for node in onnx.load(path).graph.node}
    assert ('NonMaxSuppression' in operators) == (name not in ('pooled_maxima', 'detr'))


def test_places_that_no_detection_takes_are_marked_and_the_best_come_first():
    pictures = torch.rand(2, 3, 64, 96)
    model = made(anchors())
    with torch.no_grad():
        everything = detections(model, pictures)[1]
        model.bbox_head.test_cfg.score_thr = float(everything[0, 9] + everything[0, 10]) / 2
        boxes, scores, labels = detections(model, pictures)
    assert boxes.shape == (2, 30, 4) and scores.shape == labels.shape == (2, 30)
    assert (scores[0] > 0).tolist() == (labels[0] != NOTHING).tolist() == [True] * 10 + [False] * 20
    assert (scores.diff() <= 0).all()
    assert not boxes[0, 10:].any()
    assert (boxes[0, :10, 2:] > boxes[0, :10, :2]).all()


@pytest.mark.parametrize(('off', 'ok'), [(3e-6, True), (3e-4, False)])
def test_boxes_far_outside_are_compared_by_their_own_size(tmp_path, off, ok):
    def found(model, pictures, scale=1.0):  # a box of 20000 pixels for each picture, as heads find that clip none
        return [(x.mean().expand(1, 4) * 2e4 * scale, torch.ones(1), torch.zeros(1).long()) for x in pictures.unbind()]

    def stacked(model, pictures):
        return tuple(torch.stack(part) for part in zip(*found(model, pictures, 1 + off), strict=True))

    pictures = torch.ones(2, 3, 64, 96)
    path = export_onnx(nn.Identity(), pictures, tmp_path / 'boxes.onnx', dynamic_batch=False, forward=stacked)
    assert check_detections(path, nn.Identity(), [pictures], found).ok is ok


def test_one_box_far_outside_hides_no_other(tmp_path):
    def found(model, pictures, off=0.0):
        boxes = torch.tensor([[10.0, 10.0, 40.0, 40.0], [-1e6, -1e6, 1e6, 1e6]])
        boxes = boxes + torch.tensor([[off], [0.0]])
        return [(boxes + x.mean() * 0, torch.tensor([0.9, 0.06]), torch.zeros(2).long()) for x in pictures.unbind()]

    def stacked(model, pictures):
        return tuple(torch.stack(part) for part in zip(*found(model, pictures, 20.0), strict=True))

    pictures = torch.ones(1, 3, 64, 96)
    path = export_onnx(nn.Identity(), pictures, tmp_path / 'boxes.onnx', dynamic_batch=False, forward=stacked)
    parity = check_detections(path, nn.Identity(), [pictures], found)
    assert not parity.ok and parity.max_rel > 0.2


@pytest.mark.parametrize('change', ['box', 'score', 'label', 'number', 'not finite'])
def test_each_part_of_a_detection_is_compared(tmp_path, monkeypatch, change):
    model, pictures = made(anchors()), torch.rand(1, 3, 64, 96)
    path = export_onnx(model, pictures, tmp_path / 'boxes.onnx', dynamic_batch=False, forward=detections)
    assert check(path, model, [pictures]).ok
    predict = type(model).predict

    def changed(self, *inputs, **options):
        found = predict(self, *inputs, **options)
        each = found[0].pred_instances
        if change == 'number':
            found[0].pred_instances = each[:-1]
        elif change == 'box':
            each.bboxes[3, 2] += 0.1
        elif change == 'score':
            each.scores[3] += 0.001
        elif change == 'not finite':
            each.scores[3] = float('nan')
        else:
            each.labels[3] += 1
        return found

    monkeypatch.setattr(type(model), 'predict', changed)
    assert not check(path, model, [pictures]).ok


def test_a_file_that_does_not_run_is_infinitely_far(tmp_path):
    model, pictures = made(anchors()), torch.rand(1, 3, 64, 96)
    path = export_onnx(model, pictures, tmp_path / 'boxes.onnx', dynamic_batch=False, forward=detections)
    parity = check(path, model, [pictures, torch.rand(2, 3, 64, 96)])
    assert not parity.ok and [relative < 1 for _, relative in parity.batches] == [True, False]


def test_no_detection_at_all_is_said(tmp_path, caplog):
    model, pictures = made(anchors()), torch.rand(1, 3, 64, 96)
    model.bbox_head.test_cfg.score_thr = 1.0
    path = export_onnx(model, pictures, tmp_path / 'boxes.onnx', dynamic_batch=False, forward=detections)
    assert check(path, model, [pictures]).ok
    assert 'no picture has a detection' in caplog.text


def test_a_head_is_left_as_it_was():
    model, pictures = made(anchors()), torch.rand(1, 3, 64, 96)
    kind = type(model.bbox_head)
    before = kind._bbox_post_process, copy.copy(vars(model.bbox_head))
    with torch.no_grad():
        detections(model, pictures)
    assert (kind._bbox_post_process, vars(model.bbox_head)) == before
    assert '_bbox_post_process' not in vars(kind)


def soft_nms():
    return {**retinanet(), 'test_cfg': {**TESTING, 'nms': dict(type='soft_nms', iou_threshold=0.5)}}


@pytest.mark.parametrize(
    ('model', 'says'),
    [
        (two_stages, 'its boxes are not those of one dense head'),
        (soft_nms, "its nms has type='soft_nms'"),
        (masks, 'it finds masks as well'),
    ],
)
def test_what_cannot_be_exported_says_why(model, says):
    assert says in str(why_no_boxes(made(model())))


def test_what_can_be_exported_has_nothing_to_say():
    assert [why_no_boxes(made(kind())) for kind in KINDS.values()] == [None] * len(KINDS)


def test_boxes_that_have_no_labels_are_refused(tmp_path):
    model, pictures = made(regions()), torch.rand(1, 3, 64, 96)
    with pytest.raises(DeployError, match='chooses them before they have labels'):
        deploy({'net': model}, [pictures], tmp_path, dynamic_batch=False, forward=detections, runs=0, check=check)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not TORCH_2_10, reason='torch 2.9 exports a weight under the name of its cast')
def test_deformable_convolutions_are_exported_by_the_first_opset_that_has_them(tmp_path):
    model, pictures = made(deformed()), torch.rand(1, 3, 64, 96)
    options = dict(dynamic_batch=False, forward=detections, runs=0, check=check)
    with followed():
        report = deploy({'net': model}, [pictures], tmp_path, **options)
        assert report.models[0].parity.ok and report.facts['opset'] == 19
        with pytest.raises(DeployError, match=r'DeformConv is in ONNX from opset 19 on: ask for 19$'):
            deploy({'net': model}, [pictures], tmp_path, 18, **options)
    assert 'DeformConv' in {node.op_type for node in onnx.load(tmp_path / 'net.onnx').graph.node}


def test_a_file_that_finds_something_else_is_refused(tmp_path, monkeypatch):
    model, pictures = made(anchors()), torch.rand(1, 3, 64, 96)
    options = dict(dynamic_batch=False, forward=detections, runs=0, check=check)
    assert deploy({'net': model}, [pictures], tmp_path, **options).models[0].parity.ok
    monkeypatch.setattr('mmcpd.engine.detections._uncovered', lambda boxes, *_: torch.ones(len(boxes)) > 0)
    with pytest.raises(DeployError, match='not what the model computes'):
        deploy({'net': model}, [pictures], tmp_path, **options)


# -- maps of models that ask for samples -------------------------------------------------------------------------------
def test_a_model_that_asks_for_samples_is_exported_with_one(tmp_path):
    model, pictures = made(detr()), torch.rand(2, 3, 64, 96)
    forward = pass_on_pictures(model, pictures)
    assert isinstance(forward, WithSample)
    path = export_onnx(model, pictures, tmp_path / 'maps.onnx', dynamic_batch=False, forward=forward)
    assert check_parity(path, model, pictures, forward).ok
    assert not check_parity(path, made({**detr(), 'num_queries': 7}).train().apply(shift), pictures, forward).ok
    assert pass_on_pictures(made(anchors()), pictures) is DEPLOYED


def shift(module):
    if isinstance(module, nn.Linear):
        module.bias.data += 1.0


def test_a_model_that_runs_with_no_known_sample_says_why():
    class Picky(nn.Module):
        def forward(self, pictures, scale):
            return pictures * scale

    with pytest.raises(ValueError, match=r"Picky does not run \(TypeError: .*'scale'"):
        pass_on_pictures(Picky(), torch.rand(1, 3, 8, 8))
