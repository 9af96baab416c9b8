"""Detectors are distilled: classification maps by default, levels of pyramids by one line, checked at the start."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, DefaultScope
from torch import nn

from mmcpd.distill import CWDLoss, FeatureLoss, KDLoss, Taps
from mmcpd.engine.distillers import Distiller

pytest.importorskip('mmdet', reason='mmdet is not installed: pip install .[detection]')
torch.set_num_threads(1)
MODELS = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'models'
LEVELS = ['neck.fpn_convs.0', 'neck.fpn_convs.1', 'neck.fpn_convs.2']
RTM = [f'bbox_head.rtm_cls.{n}' for n in range(3)]


def detector(name, losses):
    """Return a distiller around one of the small detectors, its preprocessed batch."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        student = Config.fromfile(MODELS / f'{name}_boxes.py').model
        model = Distiller(student, losses=losses).train()
        scenes = DATASETS.build(dict(type='mmcpd.DigitBoxesDataset', length=2, pipeline=[dict(type='PackDetInputs')]))
    model.student.init_weights()
    return model, model.data_preprocessor(pseudo_collate([scenes[0], scenes[1]]), True)


def losses_of(model, batch):
    found = model(**copy.deepcopy(batch), mode='loss')
    return {name: value for name, value in found.items() if name.startswith('loss_distill_')}


def taught(model, batch):
    """Let the student teach itself, change it, and return its losses."""
    losses_of(model, batch)
    model.begin_distillation()
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.mul_(1.1)
    return losses_of(model, batch)


def seen(model, batch, *taps):
    """Return what taps see in the student as it is, and in the teacher."""
    with Taps(model.student, taps) as ours:
        model.student(**copy.deepcopy(batch), mode='loss')
    with torch.no_grad():
        return ours.seen, Taps(model.teacher, taps).run(**copy.deepcopy(batch), mode='tensor')


@pytest.mark.parametrize(
    ('name', 'compared'),
    [
        ('retinanet', {'bbox_head.retina_cls': (3, True)}),
        ('fcos', {'bbox_head.conv_cls': (3, True), 'bbox_head.conv_centerness': (3, True)}),
        ('rtmdet', dict.fromkeys(RTM, (1, True))),
        ('detr', {'bbox_head:0': (1, True)}),  # of all layers of the decoder, in one tensor
    ],
)
def test_without_a_tap_all_classification_maps_are_compared_and_no_boxes(name, compared):
    model, batch = detector(name, ['mmcpd.KDLoss'])
    loss = taught(model, batch)['loss_distill_kd']
    found = model._comparisons['kd']
    assert {each.tap: (model._numbers[each.tap], each.loss.sigmoid) for each in found} == compared
    ours, theirs = seen(model, batch, *compared)
    expected = 0
    for tap, (number, sigmoid) in compared.items():
        assert len(ours[tap]) == len(theirs[tap]) == number
        for a, b in zip(ours[tap], theirs[tap], strict=True):
            a, b = (x.flatten(0, -2) if name == 'detr' else x.movedim(1, -1).flatten(0, -2) for x in (a, b))
            expected += KDLoss(sigmoid=sigmoid)(a, b)
    assert loss > 0 and torch.allclose(loss, expected, rtol=1e-4)
    one_level = KDLoss(sigmoid=sigmoid)(a, b)
    assert len(ours) * number == 1 or not torch.allclose(loss, one_level, rtol=1e-2)
    loss.backward()
    path, _, output = tap.partition(':')
    layers = [p for n, p in model.student.named_parameters() if n.startswith(path) and (not output or 'cls' in n)]
    assert layers and all(weight.grad.abs().sum() > 0 for weight in layers)


def test_a_sigmoid_map_is_compared_class_by_class():
    """By hand: the divergence of two Bernoulli variables for each anchor and class, the mean over places."""
    model, batch = detector('retinanet', [dict(type='mmcpd.KDLoss', tau=1.0)])
    loss = taught(model, batch)['loss_distill_kd']
    ours, theirs = seen(model, batch, 'bbox_head.retina_cls')
    expected = by_softmax = 0
    for a, b in zip(*(each['bbox_head.retina_cls'] for each in (ours, theirs)), strict=True):
        s, t = a.double(), b.double()
        yes, no = (
            b.sigmoid() * (F.logsigmoid(t) - F.logsigmoid(s)),
            (-b).sigmoid() * (F.logsigmoid(-t) - F.logsigmoid(-s)),
        )
        expected += (yes + no).sum(1).mean()
        by_softmax += (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
    assert torch.allclose(loss.double(), expected, rtol=1e-3)
    assert not torch.allclose(loss.double(), by_softmax, rtol=1e-1)


@pytest.mark.parametrize('tap', ['neck.fpn_convs.*', LEVELS, 'neck:*'])
@pytest.mark.parametrize('kind', ['CWDLoss', 'FeatureLoss'])
def test_levels_of_a_pyramid_are_compared_by_one_line(tap, kind):
    model, batch = detector('retinanet', [dict(type=f'mmcpd.{kind}', tap=tap, name='levels')])
    loss = taught(model, batch)['loss_distill_levels']
    ours, theirs = seen(model, batch, *LEVELS)
    compare = CWDLoss() if kind == 'CWDLoss' else FeatureLoss()
    each = [compare(ours[level][0], theirs[level][0]) for level in LEVELS]
    assert loss > 0 and torch.allclose(loss, sum(each), rtol=1e-4)
    assert not torch.allclose(loss, each[-1], rtol=1e-2) and not torch.allclose(loss, each[0], rtol=1e-2)


@pytest.mark.parametrize('kind', ['CWDLoss', 'FeatureLoss'])
def test_classification_maps_are_compared_by_other_losses_too(kind):
    model, batch = detector('rtmdet', [dict(type=f'mmcpd.{kind}', name='maps')])
    loss = taught(model, batch)['loss_distill_maps']
    ours, theirs = seen(model, batch, *RTM)
    compare = CWDLoss() if kind == 'CWDLoss' else FeatureLoss()
    each = [compare(ours[tap][0], theirs[tap][0]) for tap in RTM]
    assert torch.allclose(loss, sum(each), rtol=1e-4) and not torch.allclose(loss, each[0], rtol=1e-2)


def test_levels_of_unlike_widths_are_compared_as_they_are():
    taps = ['backbone.layer2', 'backbone.layer4']
    model, batch = detector('retinanet', [dict(type='mmcpd.FeatureLoss', tap=taps)])
    loss = taught(model, batch)['loss_distill_feature']
    ours, theirs = seen(model, batch, *taps)
    expected = sum(F.mse_loss(ours[tap][0], theirs[tap][0]) for tap in taps)
    assert loss > 0 and torch.allclose(loss, expected, rtol=1e-4)


def test_one_line_at_the_start_names_the_taps_and_how_many_outputs_they_have(monkeypatch):
    said = []
    monkeypatch.setattr('mmcpd.engine.distillers.print_log', lambda line, **_: said.append(line))
    model, batch = detector('retinanet', ['mmcpd.KDLoss', dict(type='mmcpd.CWDLoss', tap='neck.fpn_convs.*')])
    losses_of(model, batch)
    assert said[0].splitlines() == [
        "distillation: KDLoss 'kd' compares bbox_head.retina_cls (x3) by sigmoid",
        "distillation: CWDLoss 'cwd' compares neck.fpn_convs.0 + neck.fpn_convs.1 + neck.fpn_convs.2",
    ]


@pytest.mark.parametrize(
    ('losses', 'says'),
    [
        ([dict(type='mmcpd.CWDLoss', tap='neck.fpn_conv.*')], r"tap 'neck\.fpn_conv\.\*': no module of RetinaNet"),
        ([dict(type='mmcpd.CWDLoss', tap=['neck.fpn_convs.*', 3])], 'a name or a list of names'),
        ([dict(type='mmcpd.CWDLoss', tap=[])], 'a name or a list of names'),
    ],
)
def test_wrong_taps_are_named_when_it_is_built(losses, says):
    with pytest.raises(ValueError, match=says):
        detector('retinanet', losses)


def test_as_many_taps_on_the_teacher_are_asked_for_when_training_starts():
    model, batch = detector('retinanet', [dict(type='mmcpd.CWDLoss', tap='neck.fpn_convs.*', teacher_tap=LEVELS[:2])])
    with pytest.raises(ValueError, match=r'the student has the taps .*fpn_convs\.2, the teacher .*fpn_convs\.1; set'):
        losses_of(model, batch)


def test_what_cannot_be_compared_is_found_when_training_starts():
    model, batch = detector('detr', ['mmcpd.CWDLoss'])
    with pytest.raises(ValueError, match='CWDLoss compares maps'):
        losses_of(model, batch)


class Joined(BaseModel):
    """A net whose loss reads the maps of all levels at once, of a layer that runs once per level."""

    def __init__(self, shared):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        heads = [nn.Conv2d(4, 2, 1) for _ in range(1 if shared else 2)]
        self.classes, self.boxes = nn.ModuleList(heads), nn.Conv2d(4, 4, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        first = self.stem(inputs)
        levels = [first, F.max_pool2d(first, 2)]
        maps = [self.classes[n % len(self.classes)](each) for n, each in enumerate(levels)]
        boxes = [self.boxes(each).exp() for each in levels]
        if mode == 'tensor':
            return maps, boxes
        flat, places = (torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in part]) for part in (maps, boxes))
        if mode == 'predict':
            return torch.cat([flat.sigmoid(), places], 1)
        overlaps = torch.minimum(places, torch.ones(4)).prod(1) / torch.maximum(places, torch.ones(4)).prod(1)
        focal = F.binary_cross_entropy_with_logits(flat, torch.zeros_like(flat), reduction='none') * flat.sigmoid() ** 2
        return {'loss_cls': focal.sum(), 'loss_box': 1 - overlaps.mean()}


@pytest.mark.parametrize(('shared', 'taps'), [(True, {'classes.0': 2}), (False, {'classes.0': 1, 'classes.1': 1})])
def test_levels_that_a_loss_reads_joined_are_found_one_by_one(shared, taps):
    torch.manual_seed(0)
    model = Distiller(Joined(shared), losses=['mmcpd.KDLoss']).train()
    batch = {'inputs': torch.randn(2, 3, 16, 16), 'data_samples': None}
    loss = taught(model, batch)['loss_distill_kd']
    assert model._numbers == taps and all(each.loss.sigmoid for each in model._comparisons['kd'])
    assert loss > 0


def test_a_teacher_with_fewer_levels_is_said_once(monkeypatch):
    model, _ = detector('retinanet', [dict(type='mmcpd.CWDLoss', tap=LEVELS, name='levels')])
    lines = []
    monkeypatch.setattr('mmcpd.engine.distillers.print_log', lambda line, **_: lines.append(line))
    model._count('neck', 3, 3)
    assert not lines
    model._count('neck:*', 4, 3)
    model._count('neck:*', 4, 3)
    assert lines == ["tap 'neck:*': the student has 4 outputs, the teacher 3; the first of each are compared"]
