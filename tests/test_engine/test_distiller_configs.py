"""What a config gives the distiller: losses of any kind, teachers from files, and wrong values, which are named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

import mmcpd
from tests.test_engine.distilled_models import (
    CIRKD,
    CLASSES,
    classifier,
    distiller,
    losses_of,
    pictures,
    scenes,
    segmentor,
)

ROOT = Path(mmcpd.__file__).parents[1]


def test_unlike_teacher_with_its_own_taps():
    wide = classifier()
    wide['backbone'] = {'type': 'mmpretrain.ResNet', 'depth': 34, 'base_channels': 16, 'stem_channels': 16}
    wide['head']['in_channels'] = 128
    losses = [
        {'type': 'mmcpd.KDLoss'},
        {'type': 'DISTLoss', 'teacher_tap': 'head.fc'},
        {'type': 'KDLoss', 'tau': 4.0},
        {
            'type': 'FeatureLoss',
            'name': 'hint',
            'tap': 'backbone.layer2',
            'student_channels': 16,
            'teacher_channels': 32,
        },
    ]
    model = distiller(losses=losses, teacher=MODELS.build(wide)).train()
    found = losses_of(model, pictures())
    assert list(found) == ['loss_task', *(f'loss_distill_{n}' for n in ('kd', 'dist', 'kd_2', 'hint'))]
    found['loss_distill_hint'].backward()
    assert model.distill['hint'].projection.weight.grad.abs().sum() > 0
    assert any(p is model.distill['hint'].projection.weight for p in model.parameters())


@pytest.mark.parametrize(
    ('config', 'student', 'names'),
    [
        ('resnet50_prune', classifier, ['kd']),
        ('seaformer_prune_kd', segmentor, ['kd']),
        ('seaformer_prune', segmentor, ['cwd']),
        ('seaformer_prune_cirkd', segmentor, ['kd', 'cirkd']),
    ],
)
def test_the_losses_of_the_configs_fit_any_model(config, student, names):
    losses = Config.fromfile(ROOT / 'configs' / 'cpd' / f'{config}.py').model.losses
    model = MODELS.build({'type': 'mmcpd.Distiller', 'student': student(), 'losses': losses}).train()
    model.begin_distillation()
    found = losses_of(model, scenes() if student is segmentor else pictures())
    assert [k for k in found if 'distill' in k] == [f'loss_distill_{n}' for n in names]


def test_losses_know_the_students_sizes():
    taps = {'decode_head.conv_seg:in': 8, 'decode_head.conv_seg': CLASSES, 'decode_head.convs.0.bn': 8}
    losses = [{'type': 'FeatureLoss', 'tap': tap, 'name': f'at{i}'} for i, tap in enumerate(taps)]
    model = distiller(segmentor(), [*losses, {'type': 'CIRKDLoss', 'tap': 'decode_head.conv_seg:in', 'pixel_queue': 9}])
    assert [loss.student_channels for loss in list(model.distill.values())[:3]] == list(taps.values())
    assert model.distill['cirkd'].pixel_queue.shape == (CLASSES, 9, 8)
    assert (
        distiller(segmentor(), [{'type': 'FeatureLoss', 'tap': 'backbone'}]).distill['feature'].student_channels is None
    )
    with pytest.raises(ValueError, match=r'FeatureLoss: teacher_channels=9 is given, and student_channels is not'):
        distiller(segmentor(), [{'type': 'FeatureLoss', 'tap': 'backbone', 'teacher_channels': 9}])


def test_losses_that_a_user_registered():
    @MODELS.register_module(force=True)
    class ShoutLoss(nn.Module):
        def __init__(self, volume):
            super().__init__()
            self.volume = volume

        def forward(self, student, teacher):
            return self.volume * (student - teacher).abs().mean()

    model = distiller(
        losses=[{'type': 'ShoutLoss', 'tap': 'head.fc', 'volume': 3.0}], teacher=MODELS.build(classifier())
    )
    assert losses_of(model.train(), pictures())['loss_distill_shout'] > 0
    with pytest.raises(ValueError, match=r'ShoutLoss: .*volume'):
        distiller(losses=[{'type': 'ShoutLoss'}])


# Wrong configs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('losses', 'says'),
    [
        ([{'type': 'KDLoss', 'tap': 'head.fcc'}], r"no module 'head.fcc'; near: head.fc"),
        ([{'type': 'KDLos'}], "no loss is called 'KDLos'; near: KDLoss"),
        ([{'tap': 'head.fc'}], 'has no type'),
        ([{'type': 'KDLoss', 'tua': 2}], "KDLoss: .*'tua'"),
        ([{'type': 'KDLoss', 'name': 'a'}, {'type': 'DISTLoss', 'name': 'a'}], 'is taken'),
        ([{'type': 'KDLoss', 'name': 'a.b'}], 'cannot be the name'),
    ],
)
def test_wrong_losses(losses, says):
    with pytest.raises(ValueError, match=says):
        distiller(losses=losses)


def test_wrong_teacher_taps_and_outputs():
    with pytest.raises(ValueError, match=r"teacher: tap 'head.fcc'.*near: head.fc"):
        distiller(losses=[{'type': 'KDLoss', 'teacher_tap': 'head.fcc'}])
    model = distiller(losses=[{'type': 'FeatureLoss', 'tap': 'backbone:3', 'student_channels': 64}])
    with pytest.raises(ValueError, match=r'gives 1 outputs, there is no output 3'):
        losses_of(model, pictures())


def test_labels_that_are_not_there():
    model = distiller(losses=[{'type': 'KDLoss', 'ignore_index': 0}])
    model.begin_distillation()
    data = pictures()
    for sample in data['data_samples']:
        sample.set_gt_score([0.25] * CLASSES)
        del sample.gt_label
    with pytest.raises(ValueError, match="'kd' needs labels"):
        losses_of(model, data)


@pytest.mark.parametrize(
    ('kwargs', 'says'),
    [
        ({'teacher': 'other'}, "must be 'self'"),
        ({'teacher': {'config': 'x.py'}}, 'needs config and checkpoint'),
        ({'teacher': {'config': 'no/such.py', 'checkpoint': 'x.pth'}}, 'no config no/such.py'),
        ({'student': nn.Linear(1, 1)}, 'must be an MMEngine model'),
        ({'task_weight': -1}, 'task_weight is a number, 0 or more: got -1'),
        ({'task_weight': '1'}, "task_weight is a number, 0 or more: got '1'"),
        ({'task_weight': 0, 'losses': ()}, 'nothing to train by'),
        ({'task_weight': 0, 'teacher': None}, 'nothing to train by'),
    ],
)
def test_wrong_arguments(kwargs, says):
    with pytest.raises(ValueError, match=says):
        distiller(**kwargs)


def teacher_files(folder, model, state):
    (folder / 'teacher.py').write_text(f'model = {model!r}\ndefault_scope = "mmpretrain"\n')
    torch.save({'state_dict': state}, folder / 'teacher.pth')
    return {'config': str(folder / 'teacher.py'), 'checkpoint': str(folder / 'teacher.pth')}


def test_teacher_of_a_config_and_checkpoint(tmp_path):
    config = classifier(34)
    trained = MODELS.build(config)
    spec = teacher_files(tmp_path, config, trained.state_dict())
    model = distiller(teacher=spec)
    assert all(torch.equal(v, trained.state_dict()[k]) for k, v in model.teacher.state_dict().items())
    assert 'loss_distill_kd' in losses_of(model.train(), pictures())
    model.begin_distillation()
    assert len(model.teacher.backbone.layer1) == 3  # begin_distillation is about 'self'
    with pytest.raises(ValueError, match='of another model'):
        distiller(teacher=spec | {'cfg_options': {'model.backbone.depth': 18}})
    with pytest.raises(ValueError, match='no such checkpoint'):
        distiller(teacher=spec | {'checkpoint': str(tmp_path / 'none.pth')})
    (tmp_path / 'teacher.pth').write_bytes((tmp_path / 'teacher.pth').read_bytes()[:5000])
    with pytest.raises(ValueError, match='truncated'):
        distiller(teacher=spec)


def test_teacher_from_a_distillers_config_and_checkpoint(tmp_path):
    trained = distiller(segmentor(), [CIRKD])
    config = {'type': 'mmcpd.Distiller', 'student': segmentor(), 'losses': [CIRKD]}
    model = distiller(segmentor(), teacher=teacher_files(tmp_path, config, trained.state_dict()), losses=[CIRKD])
    assert type(model.teacher).__name__ == 'EncoderDecoder'
    assert torch.equal(model.teacher.decode_head.conv_seg.weight, trained.student.decode_head.conv_seg.weight)


def test_teacher_of_other_pictures_is_refused():
    other = classifier()
    other['data_preprocessor']['mean'] = [0.1] * 3
    with pytest.raises(ValueError, match=r'trained with mean \[0.1.*the student has \[0.5'):
        distiller(teacher=MODELS.build(other))
