"""mmdet's detectors: the samples that they are combed with, and masked and slimmed ones that agree."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger, print_log
from torch import nn

import mmcpd.engine  # noqa: F401 - lets mmdet be imported
from mmcpd.comb import comb
from mmcpd.engine.at_once import prune_at_once
from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.examples import example_data, example_inputs, picture_of
from mmcpd.engine.operators import followed
from mmcpd.engine.passes import DEPLOYED, TESTING, TRAINING, runs
from mmcpd.engine.proposals import fixed_proposals, spread_boxes
from mmcpd.engine.samples import Samples, made_up, on_pictures
from mmcpd.modes import InDouble
from mmcpd.nested import tensors_in
from mmcpd.slim import slim
from mmcpd.slim.compare import compare, difference, evaluating
from mmcpd.slim.mask import mask_
from mmcpd.slim.trial import in_double, random_keep, randomised

pytest.importorskip('mmdet', reason='mmdet is not installed')

from mmdet.models import SingleRoIExtractor
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

PREPROCESSOR = dict(type='DetDataPreprocessor', mean=[0.0] * 3, std=[50.0] * 3, pad_size_divisor=32, pad_mask=True)
BACKBONE = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, num_stages=4, out_indices=(1, 2, 3),
                style='pytorch')  # fmt: skip
NECK = dict(type='FPN', in_channels=[16, 32, 64], out_channels=16, num_outs=3)
ANCHORS = dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=[8, 16, 32])
CODER = dict(type='DeltaXYWHBBoxCoder')
ASSIGNER = dict(type='MaxIoUAssigner', pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1)
SAMPLER = dict(type='RandomSampler', num=16, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True)


CLASSES = dict(type='CrossEntropyLoss', bg_cls_weight=0.1, use_sigmoid=False, class_weight=1.0)


def retinanet():
    return dict(
        type='RetinaNet', data_preprocessor=PREPROCESSOR, backbone=BACKBONE, neck=NECK,
        bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2,
                       anchor_generator=ANCHORS, bbox_coder=CODER),
        train_cfg=dict(assigner=ASSIGNER, sampler=dict(type='PseudoSampler'), allowed_border=-1, pos_weight=-1),
        test_cfg=dict(nms_pre=50, score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=20),
    )  # fmt: skip


def two_stages(masks=False):
    extractor = dict(type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=3, sampling_ratio=2),
                     out_channels=16, featmap_strides=[8, 16, 32], finest_scale=32)  # fmt: skip
    train = dict(assigner=ASSIGNER, sampler=SAMPLER, pos_weight=-1)
    mask = dict(
        mask_roi_extractor=extractor,
        mask_head=dict(type='FCNMaskHead', num_convs=2, in_channels=16, conv_out_channels=16, num_classes=3),
    )
    return dict(
        type='MaskRCNN' if masks else 'FasterRCNN', data_preprocessor=PREPROCESSOR, backbone=BACKBONE, neck=NECK,
        rpn_head=dict(type='RPNHead', in_channels=16, feat_channels=16, anchor_generator=ANCHORS, bbox_coder=CODER),
        roi_head=dict(
            type='StandardRoIHead', bbox_roi_extractor=extractor,
            bbox_head=dict(type='Shared2FCBBoxHead', in_channels=16, fc_out_channels=32, roi_feat_size=3,
                           num_classes=3, bbox_coder=CODER),
            **(mask if masks else {}),
        ),
        train_cfg=dict(rpn=dict(**train, allowed_border=-1), rcnn=dict(**train, mask_size=6),
                       rpn_proposal=dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7))),
        test_cfg=dict(rpn=dict(nms_pre=50, max_per_img=20, nms=dict(type='nms', iou_threshold=0.7)),
                      rcnn=dict(score_thr=0.0, nms=dict(type='nms', iou_threshold=0.5), max_per_img=10,
                                mask_thr_binary=0.5)),
    )  # fmt: skip


def detr():
    layer = dict(self_attn_cfg=dict(embed_dims=16, num_heads=2), ffn_cfg=dict(embed_dims=16, feedforward_channels=24))
    return dict(
        type='DETR', num_queries=7, data_preprocessor=PREPROCESSOR, backbone={**BACKBONE, 'out_indices': (3,)},
        neck=dict(type='ChannelMapper', in_channels=[64], out_channels=16, kernel_size=1, num_outs=1),
        encoder=dict(num_layers=1, layer_cfg=layer),
        decoder=dict(num_layers=2, return_intermediate=True,
                     layer_cfg={**layer, 'cross_attn_cfg': dict(embed_dims=16, num_heads=2)}),
        positional_encoding=dict(num_feats=8, normalize=True),
        bbox_head=dict(type='DETRHead', num_classes=3, embed_dims=16, loss_cls=CLASSES),
        train_cfg=dict(assigner=dict(type='HungarianAssigner', match_costs=[
            dict(type='ClassificationCost', weight=1.0), dict(type='BBoxL1Cost', weight=5.0, box_format='xywh'),
            dict(type='IoUCost', iou_mode='giou', weight=2.0)])),
        test_cfg=dict(max_per_img=7),
    )  # fmt: skip


DETECTORS = {'retinanet': retinanet, 'faster_rcnn': two_stages, 'mask_rcnn': lambda: two_stages(True), 'detr': detr}


def config(name):
    cfg = Config(dict(model=DETECTORS[name](), default_scope='mmdet'))
    torch.manual_seed(0)
    return cfg, randomised(build_dense(cfg))


@pytest.fixture(scope='module', params=DETECTORS)
def combed(request):
    """Return the name, the model in float64 and its coupling."""
    cfg, model = config(request.param)
    coupling = comb_by_config(model, cfg, input_shape=(3, 64, 96))
    double, example = in_double(model, coupling.example)
    return request.param, double, replace(coupling, example=example)


def test_masked_and_slimmed_detectors_agree(combed):
    name, model, coupling = combed
    assert coupling.example.forward == InDouble(DEPLOYED)
    assert not coupling.untried
    assert not coupling.unsupported
    prunable, width = coupling.prunable_channels()
    assert prunable > 0.6 * width
    keep, other = (random_keep(coupling, 0.5, seed) for seed in (0, 1))
    assert compare(model, coupling, keep) < 1e-9
    assert compare(model, coupling, keep, slim(model, coupling, other)) > 1e-3, name


def test_predictions_and_losses_of_slimmed_detectors_are_those_of_masked_ones(combed):
    _, model, coupling = combed
    keep = random_keep(coupling, 0.5, 0)
    small, masked = slim(model, coupling, keep), copy.deepcopy(model)
    mask_(masked, coupling, keep)
    for each in (TESTING, TRAINING):
        example = replace(coupling.example, forward=InDouble(each))
        with evaluating(masked), evaluating(small):
            assert difference(example.run(masked), example.run(small)) < 1e-9


@pytest.mark.parametrize('name', DETECTORS)
def test_made_up_samples_fit_all_passes(name):
    _, model = config(name)
    data = made_up(model, torch.randn(1, 3, 64, 96))
    (sample,) = data['data_samples']
    assert sample.img_shape == sample.batch_input_shape == sample.ori_shape == sample.pad_shape == (64, 96)
    assert [runs(model, data, each) for each in (DEPLOYED, TESTING, TRAINING)] == [None] * 3
    assert sample.gt_instances.masks.masks.any(axis=(1, 2)).all()
    assert (sample.gt_instances.bboxes[:, 2:] <= torch.tensor([96, 64])).all()


def test_a_model_whose_loss_takes_no_known_sample_still_gets_one_that_it_runs_with():
    _, model = config('detr')
    model.loss = None
    data = made_up(model, torch.randn(1, 3, 64, 64))
    assert runs(model, {'inputs': data['inputs']}, DEPLOYED) is not None
    assert runs(model, data, DEPLOYED) is None


def own_samples(height, width):
    """Return a data set of one picture with a box in its lower right quarter, as a pipeline packs it."""
    sample = DetDataSample(metainfo=dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0)))
    box = torch.tensor([[width / 2, height / 2, width, height]])
    sample.gt_instances = InstanceData(bboxes=box, labels=torch.tensor([2]))
    return Samples([{'inputs': torch.zeros(3, height, width, dtype=torch.uint8), 'data_samples': sample}])


def test_samples_of_the_data_are_scaled_with_their_picture():
    cfg, model = config('retinanet')
    same = example_data(model, cfg, own_samples(64, 128))
    (sample,) = same['data_samples']
    assert sample.gt_instances.bboxes.tolist() == [[64, 32, 128, 64]]
    data = example_data(model, cfg, own_samples(64, 128), (3, 32, 32))
    (sample,) = data['data_samples']
    assert picture_of(data).shape == (1, 3, 32, 32)
    assert sample.img_shape == sample.batch_input_shape == (32, 32)
    assert sample.gt_instances.bboxes.tolist() == [[16, 16, 32, 32]]
    assert sample.gt_instances.labels.tolist() == [2]
    assert runs(model, data, TRAINING) is None


@pytest.mark.parametrize(
    ('transforms', 'expected'),
    [
        ([dict(type='Resize', scale=(300, 200))], (200, 300)),
        ([dict(type='Resize', scale=(416, 320), keep_ratio=True)], (320, 416)),
        ([dict(type='Resize', scale=(1333, 800), keep_ratio=True)], (320, 512)),
        ([dict(type='Resize', scale=(640, 640), keep_ratio=True), dict(type='Pad', size=(640, 384))], (384, 640)),
    ],
)
def test_the_size_of_a_detector_comes_from_its_test_pipeline(transforms, expected):
    cfg, model = config('retinanet')
    cfg.test_dataloader = dict(dataset=dict(type='CocoDataset', ann_file='none.json', pipeline=transforms))
    assert tuple(example_inputs(cfg, model).shape) == (1, 3, *expected)


def test_the_second_stage_takes_fixed_boxes_and_the_first_is_still_compared():
    _, model = config('faster_rcnn')
    data = made_up(model, torch.randn(1, 3, 64, 64))
    with evaluating(model):
        ((scores, _),), ((first_scores, _),) = DEPLOYED(model, data)
        model.rpn_head.rpn_cls.weight.data.neg_()  # other boxes are the best now
        ((other, _),), ((other_first, _),) = DEPLOYED(model, data)
        predicted = model.rpn_head.predict(model.extract_feat(data['inputs']), data['data_samples'])
    assert scores.shape == (20, 4)
    assert torch.equal(scores, other)
    assert not torch.equal(first_scores[0], other_first[0])
    assert len(predicted[0].bboxes) <= 20
    assert 'predict' not in vars(model.rpn_head)


def test_boxes_reach_each_level_of_a_pyramid():
    boxes = spread_boxes(100, 48, 64)
    side = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
    levels = (side / 56).log2().floor().clamp(0, 3)
    assert levels.unique().tolist() == [0, 1, 2, 3]
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2
    assert ((centre >= 0) & (centre <= torch.tensor([64, 48]))).all()


def test_a_model_without_two_stages_is_left_as_it_is():
    model = torch.nn.Module()
    model.rpn_head = SimpleNamespace(predict_by_feat=None)
    with fixed_proposals(model) as maps:
        assert not hasattr(model.rpn_head, 'predict')
    assert maps == []


class LearnedBoxes(nn.Module):
    """Pool from the level that fits a box, as Sparse R-CNN and QueryInst do; all of its boxes fit the first."""

    def __init__(self):
        super().__init__()
        pool = dict(type='RoIAlign', output_size=3, sampling_ratio=2)
        self.fine, self.coarse = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 2, stride=2)
        self.roi_head = SingleRoIExtractor(pool, out_channels=6, featmap_strides=[1, 2])
        self.head = nn.Conv2d(6, 2, 3)

    def forward(self, x):
        boxes = torch.tensor([[0, 1, 1, 5, 5], [0, 2, 2, 9, 8], [0, 0, 1, 7, 7]]).to(x)
        return self.head(self.roi_head([self.fine(x), self.coarse(x)], boxes))


def test_levels_that_no_learned_box_falls_into_are_coupled_too():
    model, x = LearnedBoxes().double(), torch.randn(1, 3, 16, 16).double()
    with followed():
        alone = comb(model, x, trial=False)
        found = comb(model, x, forward=DEPLOYED, trial=False)
        assert [(g.name, len(g.members)) for g in found.groups] == [('fine', 5)], 'with the bias of each, and the head'
        assert all('coarse.weight' not in {m.tensor for m in g.members} for g in alone.groups if g.name == 'fine')
        assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-12
    assert 'map_roi_levels' not in vars(model.roi_head)


def test_reading_data_keeps_the_log_visible(capsys, monkeypatch):
    """COCO's reader prints, which is hidden; a log that is made meanwhile must not write there for good."""
    name = f'log-{id(capsys)}'
    data = dict(type='CocoDataset', data_root='nowhere/', ann_file='none.json')
    monkeypatch.setattr(MMLogger, '_instance_dict', {})
    assert Samples.of_config(Config(dict(default_scope='mmdet', test_dataloader=dict(dataset=data)))) is None
    print_log(name, 'current')
    out = capsys.readouterr().out
    assert name in out
    assert 'loading annotations' not in out


@pytest.mark.filterwarnings('ignore:gauss_newton counts each batch as one sample')
def test_pictures_alone_are_enough_to_prune_what_asks_for_samples():
    cfg = Config(dict(model=detr(), default_scope='mmdet'))
    torch.manual_seed(0)
    model, pictures = build_dense(cfg).eval(), torch.rand(3, 3, 64, 96)
    combed = comb_by_config(model, cfg, input_shape=(3, 64, 96))
    with pytest.raises((AttributeError, TypeError, AssertionError)):
        combed.example.run(model, pictures)
    alone = on_pictures(combed, model, pictures[:1])
    assert 3 in tensors_in(alone.example.run(model, pictures))[-1].shape[:2]
    pruned = prune_at_once(model, alone, [pictures], {'macs': 0.7})
    assert pruned.left['macs'] <= 0.7 and pruned.refitted is not None
    net = build_dense(Config(dict(model=retinanet(), default_scope='mmdet'))).eval()
    plain = comb_by_config(net, Config(dict(model=retinanet(), default_scope='mmdet')), input_shape=(3, 64, 96))
    assert on_pictures(plain, net, pictures[:1]) is plain
