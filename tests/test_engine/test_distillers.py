"""The distiller: what it adds to a student's training, and that it is the student in everything else."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint
from torch import nn

from mmcpd.engine.distillers import Distiller
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

# What it adds -----------------------------------------------------------------------------------------------


def test_self_teaches_from_the_snapshot_on():
    model = distiller().train()
    assert model.teacher is None and list(losses_of(model, pictures())) == ['loss']
    model.begin_distillation()
    snapshot = copy.deepcopy(model.teacher.state_dict())
    for p in model.parameters():
        p.data.add_(0.1)
    model.begin_distillation()  # taken once
    model(**model.data_preprocessor(pictures(), True), mode='loss')
    assert all(torch.equal(v, snapshot[k]) for k, v in model.teacher.state_dict().items())


def test_loss_is_the_formula_on_both_models_outputs():
    model = distiller(student=classifier()).train()
    teacher = MODELS.build(classifier())
    model.set_teacher(teacher)
    data = model.data_preprocessor(pictures(), True)
    bare = copy.deepcopy(model.student)
    got = model(**data, mode='loss')
    task = bare(**data, mode='loss')
    torch.testing.assert_close(got['loss_task'], task['loss'])
    p = (teacher.eval()(data['inputs']) / 4).softmax(1)
    logits = copy.deepcopy(model.student)
    s = (logits.head.fc(logits.extract_feat(data['inputs'])[-1]) / 4).log_softmax(1)
    kl = 2.0 * 4**2 * (p * (p.log() - s)).sum(1).mean()
    torch.testing.assert_close(got['loss_distill_kd'], kl)
    total, log = model.parse_losses(got)
    torch.testing.assert_close(total, task['loss'] + kl)
    assert log['loss'] == total, "the log's loss is the total, not the student's own"


@pytest.mark.parametrize(('student', 'data'), [(classifier, pictures), (segmentor, scenes)])
def test_the_task_weight_is_a_factor_of_the_task_s_losses_alone(student, data):
    found, teacher = [], MODELS.build(student())
    for weight in (1.0, 0.25):
        model = distiller(student(), [{'type': 'KDLoss'}], teacher=teacher, task_weight=weight).train()
        torch.manual_seed(1)  # dropout
        found.append(losses_of(model, data()))
    whole, quarter = found
    assert whole.keys() == quarter.keys() and len(whole) > 1
    for name in whole:
        factor = 0.25 if 'loss' in name and 'distill' not in name else 1
        torch.testing.assert_close(quarter[name], whole[name] * factor)


@pytest.mark.parametrize(('student', 'data'), [(classifier, pictures), (segmentor, scenes)])
def test_without_the_task_no_label_is_needed_and_no_task_loss_computed(student, data):
    def unlabelled():
        found = data()
        found['data_samples'] = [type(sample)() for sample in found['data_samples']]
        return found

    def at_weight(weight):
        return distiller(student(), [{'type': 'KDLoss'}], teacher=teacher, task_weight=weight).train()

    teacher = MODELS.build(student())
    model = at_weight(0)
    torch.manual_seed(1)
    found = losses_of(model, unlabelled())
    assert list(found) == ['loss_distill_kd'] and model.student.training
    twin = at_weight(1)
    torch.manual_seed(1)
    assert torch.equal(found['loss_distill_kd'], losses_of(twin, data())['loss_distill_kd']), 'in train mode too'
    found['loss_distill_kd'].backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises((ValueError, AttributeError, KeyError)):
        losses_of(at_weight(1e-9), unlabelled())


def test_until_there_is_a_teacher_the_task_trains():
    model = distiller(task_weight=0).train()
    assert list(losses_of(model, pictures())) == ['loss']
    model.begin_distillation()
    assert list(losses_of(model, pictures())) == ['loss_distill_kd']


def test_gradient_reaches_the_student_only():
    model = distiller(teacher=MODELS.build(classifier())).train()
    losses_of(model, pictures())['loss_distill_kd'].backward()
    assert model.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None and not p.requires_grad for p in model.teacher.parameters())


def test_teacher_is_no_part_of_the_model():
    model = distiller(teacher=MODELS.build(classifier()))
    bare = MODELS.build(classifier())
    assert len(list(model.parameters())) == len(list(bare.parameters()))
    assert not set(map(id, model.modules())) & set(map(id, model.teacher.modules()))
    assert model.state_dict().keys() == bare.state_dict().keys()
    before = {k: v.clone() for k, v in model.teacher.state_dict().items()}
    model.train()
    losses_of(model, pictures())
    assert not any(m.training for m in model.teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.teacher.state_dict().items())  # batch norm too
    model.teacher = None
    assert model.teacher is None and 'teacher' not in dict(model.named_children())


def test_teacher_runs_once_in_inference_mode_no_further_than_its_taps():
    teacher = MODELS.build(classifier())
    model = distiller(
        losses=[{'type': 'FeatureLoss', 'tap': 'backbone.layer1', 'student_channels': 8}], teacher=teacher
    )
    calls = []
    teacher.backbone.layer1.register_forward_pre_hook(lambda *a: calls.append(torch.is_inference_mode_enabled()))
    teacher.backbone.layer2.register_forward_hook(lambda *a: calls.append('too far'))
    losses_of(model.train(), pictures())
    assert calls == [True, 'too far']  # how often a tap's module runs is known then
    losses_of(model, pictures())
    assert calls == [True, 'too far', True]


def test_teacher_follows_the_student():
    model = distiller(teacher=MODELS.build(classifier()))
    assert next(model.double().teacher.parameters()).dtype == torch.float64
    model.to('meta')
    assert next(model.teacher.parameters()).device.type == 'meta'


def test_under_autocast():
    model = distiller(teacher=MODELS.build(classifier())).train()
    with torch.autocast('cpu', torch.bfloat16):
        losses = losses_of(model, pictures())
    sum(losses.values()).backward()
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_parameters_of_losses_get_a_gradient_before_there_is_a_teacher():
    """Several processes wait for the gradient of every parameter."""
    hint = {
        'type': 'FeatureLoss',
        'tap': 'backbone.layer2',
        'teacher_tap': 'backbone.layer3',
        'student_channels': 16,
        'teacher_channels': 32,
    }
    model = distiller(losses=[hint]).train()
    losses = losses_of(model, pictures())
    assert losses['loss_distill_feature'] == 0
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_segmentation_with_labels():
    losses = [{'type': 'CWDLoss', 'tap': 'decode_head.conv_seg'}, {'type': 'KDLoss', 'ignore_index': 255}, CIRKD]
    model = distiller(segmentor(), losses).train()
    model.begin_distillation()
    for p in model.student.parameters():
        p.data.add_(0.02)
    data = scenes()
    data['data_samples'][0].gt_sem_seg.data[:] = 255
    found = losses_of(model, data)
    assert all(found[f'loss_distill_{n}'] > 0 for n in ('cwd', 'kd', 'cirkd'))
    assert model.distill['cirkd'].region_written.sum() == CLASSES  # of the second picture alone


# What it leaves alone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(('config', 'data'), [(classifier, pictures), (segmentor, scenes)])
def test_predicts_as_the_bare_student(config, data):
    torch.manual_seed(0)
    model = Distiller(config(), 'self', [{'type': 'KDLoss'}]).eval()
    model.begin_distillation()
    bare = MODELS.build(config()).eval()
    bare.load_state_dict(model.state_dict())
    batch = bare.data_preprocessor(data(), False)
    torch.testing.assert_close(model(batch['inputs']), bare(batch['inputs']))
    for step in ('val_step', 'test_step'):
        ours, theirs = (getattr(m, step)(data()) for m in (model, bare))
        scores = [s.pred_score if 'pred_score' in s else s.seg_logits.data for s in [*ours, *theirs]]
        for a, b in zip(scores[: len(ours)], scores[len(ours) :], strict=True):
            torch.testing.assert_close(a, b)
    assert model.with_neck == bare.with_neck and model.data_preprocessor is model.student.data_preprocessor
    with pytest.raises(AttributeError, match='nonsense'):
        _ = model.nonsense


@pytest.mark.parametrize('save', [lambda m: m.state_dict(), get_state_dict])
def test_state_dict_is_the_bare_students(save):
    model = distiller()
    bare, ours = save(model.student), save(model)
    assert list(ours) == list(bare)
    assert all(ours[k].data_ptr() == bare[k].data_ptr() for k in bare)
    assert ours._metadata == bare._metadata
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in model.student.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in model.student.named_buffers()]


def test_loads_a_bare_students_weights_and_back(tmp_path, caplog):
    bare, model = MODELS.build(segmentor()), distiller(segmentor(), [CIRKD])
    state = bare.state_dict()
    versions = dict(state._metadata)
    assert not any(model.load_state_dict(state))  # strict, though there is no distill.* in it
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert state._metadata == versions and list(state) == list(bare.state_dict())

    torch.save({'state_dict': {k: v + 1 if v.is_floating_point() else v for k, v in state.items()}}, tmp_path / 'a.pth')
    with caplog.at_level(logging.WARNING):
        load_checkpoint(model, str(tmp_path / 'a.pth'), strict=True, logger=logging.getLogger('x'))
    assert not caplog.records
    torch.testing.assert_close(model.student.decode_head.conv_seg.weight, bare.decode_head.conv_seg.weight + 1)
    mine = {k: v for k, v in model.state_dict().items() if not k.startswith('distill.')}
    bare.load_state_dict(mine)


def test_versions_reach_the_students_modules():
    """Modules convert weights by the version that they were saved with."""
    seen = []

    class Versioned(nn.Conv2d):
        _version = 3

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            seen.append((prefix, local_metadata.get('version')))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    model = distiller()
    model.student.backbone.conv1 = Versioned(3, 8, 7, bias=False)
    model.load_state_dict(model.state_dict())
    assert seen == [('student.backbone.conv1.', 3)]


def test_state_of_losses_is_saved_and_loaded():
    model, other = distiller(segmentor(), [CIRKD]), distiller(segmentor(), [CIRKD])
    model.begin_distillation()
    losses_of(model.train(), scenes())
    state = model.state_dict()
    assert state['distill.cirkd.pixel_written'].sum() > 0
    other.load_state_dict(state)
    assert torch.equal(other.distill['cirkd'].pixel_queue, model.distill['cirkd'].pixel_queue)


def test_what_does_not_fit_is_named_as_in_the_bare_student():
    model = distiller()
    state = dict(model.state_dict())
    del state['head.fc.bias']
    state['backbone.conv1.weight'] = torch.zeros(1)
    state['tail.weight'] = torch.zeros(1)
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state)
    for part in ('"head.fc.bias"', '"tail.weight"', 'size mismatch for backbone.conv1.weight'):
        assert part in str(error.value)
    assert 'student.' not in str(error.value)


def test_inside_another_model():
    model = distiller(segmentor(), [CIRKD])
    model.begin_distillation()
    ema = ExponentialMovingAverage(model)
    assert ema.module.teacher is model.teacher  # shared, not copied
    bare = {f'module.{k}' for k in model.state_dict()}
    assert {k for k in ema.state_dict() if k != 'steps'} == bare
    ema.load_state_dict(ema.state_dict())
    wrapped = nn.DataParallel(model)
    assert set(get_state_dict(wrapped)) == set(model.state_dict())


def test_queues_are_not_broadcast():
    model = distiller(segmentor(), [CIRKD])
    ignored = set(model._ddp_params_and_buffers_to_ignore)
    own = {f'distill.cirkd.{b}' for b in ('pixel_queue', 'region_queue', 'pixel_written', 'region_written')}
    assert ignored == own and own <= model.state_dict().keys()
