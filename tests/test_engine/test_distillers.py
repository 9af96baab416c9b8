"""The distiller: what it adds to a student's training, and that it is the student in everything else."""

import copy
import logging
import os
from pathlib import Path

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import get_state_dict, load_checkpoint
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch import nn
from torch.utils.data import Dataset

import mmcpd
from mmcpd.engine.distillers import Distiller
from tests.helpers import on_two_processes

torch.set_num_threads(1)
CLASSES = 4
ROOT = Path(mmcpd.__file__).parents[1]


def classifier(depth=18, **kwargs):
    return {
        'type': 'mmpretrain.ImageClassifier',
        'backbone': {'type': 'mmpretrain.ResNet', 'depth': depth, 'base_channels': 8, 'stem_channels': 8}
        | ({'in_channels': 3}),
        'neck': {'type': 'mmpretrain.GlobalAveragePooling'},
        'head': {
            'type': 'mmpretrain.LinearClsHead',
            'num_classes': CLASSES,
            'in_channels': 64,
            'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
        },
        'data_preprocessor': {
            'type': 'mmpretrain.ClsDataPreprocessor',
            'mean': [0.5, 0.5, 0.5],
            'std': [0.2, 0.2, 0.2],
            'num_classes': CLASSES,
        },
        **kwargs,
    }


def segmentor():
    return {
        'type': 'mmseg.EncoderDecoder',
        'backbone': {
            'type': 'mmseg.MobileNetV2',
            'widen_factor': 0.25,
            'strides': (1, 2, 2, 1, 1, 1, 1),
            'out_indices': (5, 6),
        },
        'decode_head': {
            'type': 'mmseg.FCNHead',
            'in_channels': 80,
            'channels': 8,
            'in_index': 1,
            'num_convs': 1,
            'concat_input': False,
            'num_classes': CLASSES,
            'norm_cfg': {'type': 'BN'},
            'loss_decode': {'type': 'mmseg.CrossEntropyLoss'},
        },
        'data_preprocessor': {
            'type': 'mmseg.SegDataPreProcessor',
            'mean': [0.0] * 3,
            'std': [1.0] * 3,
            'size': (32, 32),
        },
        'test_cfg': ConfigDict(mode='whole'),
    }


KD = {'type': 'KDLoss', 'tap': 'head.fc', 'loss_weight': 2.0}
CIRKD = {
    'type': 'CIRKDLoss',
    'tap': 'decode_head.conv_seg:in',
    'num_classes': CLASSES,
    'student_channels': 8,
    'pixel_queue': 32,
    'region_queue': 8,
}


def distiller(student=None, losses=(KD,), **kwargs):
    torch.manual_seed(0)
    return Distiller(student or classifier(), losses=losses, **kwargs)


def pictures(n=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        'inputs': [torch.randn(3, 32, 32, generator=g) for _ in range(n)],
        'data_samples': [DataSample().set_gt_label(i % CLASSES) for i in range(n)],
    }


def scenes(n=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(n):
        sample = SegDataSample(metainfo={'img_shape': (32, 32), 'ori_shape': (32, 32)})
        sample.gt_sem_seg = PixelData(data=torch.randint(0, CLASSES, (1, 32, 32), generator=g))
        samples.append(sample)
    return {'inputs': [torch.rand(3, 32, 32, generator=g) for _ in range(n)], 'data_samples': samples}


def losses_of(model, data):
    return model(**model.data_preprocessor(copy.deepcopy(data), training=True), mode='loss')


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


def test_runners_preprocessor_goes_to_a_student_without_one():
    bare = classifier()
    given = bare.pop('data_preprocessor')
    model = Distiller(bare, data_preprocessor=given)
    assert model.student.data_preprocessor.mean.flatten().tolist() == [0.5] * 3
    own = Distiller(classifier(), data_preprocessor=given | {'mean': [0.0] * 3})
    assert own.student.data_preprocessor.mean.flatten().tolist() == [0.5] * 3


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


# In a Runner ------------------------------------------------------------------------------------------------


@DATASETS.register_module()
class InMemory(Dataset):
    def __init__(self, scene, labels=True):
        self.data = (scenes if scene else pictures)(8)
        if not labels:
            self.data['data_samples'] = [type(sample)() for sample in self.data['data_samples']]

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.data.items()}


def run(folder, student, losses, data, **kwargs):
    cfg = Config(
        {
            'model': {'type': 'mmcpd.Distiller', 'student': student, 'losses': list(losses), **kwargs.pop('model', {})},
            'work_dir': str(folder),
            'train_dataloader': {
                'batch_size': 4,
                'num_workers': 0,
                'dataset': {'type': 'InMemory', 'scene': data is scenes},
                'sampler': {'type': 'DefaultSampler', 'shuffle': False},
                'collate_fn': {'type': 'pseudo_collate'},
            },
            'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': 3},
            'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.01, 'momentum': 0.9}},
            'default_hooks': {
                'logger': {'type': 'LoggerHook', 'interval': 1},
                'checkpoint': {'type': 'CheckpointHook', 'interval': 3, 'by_epoch': False},
            },
            'log_processor': {'by_epoch': False},
            'experiment_name': f'distil-{folder.name}',
            'randomness': {'seed': 0},
            **kwargs,
        }
    )
    return Runner.from_cfg(cfg)


def test_runner_logs_by_name_and_saves_the_bare_student(tmp_path):
    runner = run(tmp_path, classifier(), [KD, {'type': 'DISTLoss'}], pictures)
    runner.call_hook = _beginning(runner, runner.call_hook)
    runner.train()
    scalars = runner.message_hub.log_scalars
    names = {'train/loss', 'train/loss_task', 'train/loss_distill_kd', 'train/loss_distill_dist'}
    assert names <= scalars.keys()
    parts = [scalars[name].current() for name in sorted(names)]
    assert parts[0] == pytest.approx(sum(parts[1:]), rel=1e-5), 'the total'
    assert next(tmp_path.rglob('*.log')).read_text().count('loss_distill_kd') >= 3
    checkpoint = torch.load(tmp_path / 'iter_3.pth', weights_only=False)
    bare = MODELS.build(classifier())
    assert list(checkpoint['state_dict']) == list(bare.state_dict())
    bare.load_state_dict(checkpoint['state_dict'])
    assert not torch.equal(bare.backbone.conv1.weight, runner.model.teacher.backbone.conv1.weight)
    assert len(checkpoint['optimizer']['param_groups'][0]['params']) == len(list(bare.parameters()))


@pytest.mark.parametrize(('student', 'data'), [(classifier, pictures), (segmentor, scenes)])
def test_a_runner_trains_without_labels(tmp_path, student, data):
    def unlabelled(folder, weight):
        runner = run(folder, student(), [{'type': 'KDLoss'}], data, model={'task_weight': weight})
        runner._train_dataloader['dataset']['labels'] = False
        runner.call_hook = _beginning(runner, runner.call_hook)
        return runner

    runner = unlabelled(tmp_path / 'a', 0)
    runner.train()
    scalars = runner.message_hub.log_scalars
    assert {name for name in scalars if 'loss' in name} == {'train/loss', 'train/loss_distill_kd'}
    with pytest.raises((ValueError, AttributeError, KeyError)):
        unlabelled(tmp_path / 'b', 1).train()


def _beginning(runner, call_hook):
    """Begin to distil before the first iteration, as a pruning hook does."""

    def call(name, **kwargs):
        if name == 'before_train':
            runner.model.begin_distillation()
        return call_hook(name, **kwargs)

    return call


def test_runner_loads_a_bare_checkpoint_and_goes_on_with_queues(tmp_path, capsys):
    bare = MODELS.build(segmentor())
    torch.save({'state_dict': bare.state_dict()}, tmp_path / 'bare.pth')
    first = run(tmp_path / 'a', segmentor(), [CIRKD], scenes, load_from=str(tmp_path / 'bare.pth'))
    first.call_hook = _beginning(first, first.call_hook)
    first.train()
    assert torch.equal(first.model.teacher.decode_head.conv_seg.weight, bare.decode_head.conv_seg.weight)
    assert 'do not match' not in capsys.readouterr().out + next((tmp_path / 'a').rglob('*.log')).read_text()

    again = run(tmp_path / 'b', segmentor(), [CIRKD], scenes, resume=True, load_from=str(tmp_path / 'a' / 'iter_3.pth'),
                train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 4})  # fmt: skip
    again.call_hook = _beginning(again, again.call_hook)
    again.train()
    assert again.iter == 4
    written = [r.model.distill['cirkd'].region_written.sum() for r in (first, again)]
    assert written[1] == written[0] + 4 * CLASSES


def test_runner_trains_with_layer_wise_learning_rates(tmp_path):
    config = {
        'type': 'mmpretrain.ImageClassifier',
        'backbone': {
            'type': 'mmpretrain.VisionTransformer',
            'arch': {'embed_dims': 16, 'num_layers': 2, 'num_heads': 2, 'feedforward_channels': 32},
            'img_size': 32,
            'patch_size': 16,
        },
        'head': {
            'type': 'mmpretrain.VisionTransformerClsHead',
            'num_classes': CLASSES,
            'in_channels': 16,
            'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
        },
        'data_preprocessor': classifier()['data_preprocessor'],
    }
    optim = {
        'optimizer': {'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.01},
        'constructor': 'mmpretrain.LearningRateDecayOptimWrapperConstructor',
        'paramwise_cfg': {'layer_decay_rate': 0.5},
    }
    runner = run(tmp_path, config, [{'type': 'KDLoss'}], pictures, optim_wrapper=optim)
    runner.train()
    assert len({group['lr'] for group in runner.optim_wrapper.param_groups}) > 2


def _train_on(rank, folder):
    """Train on one of two processes, for the test below."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE='2')
    hint = {
        'type': 'FeatureLoss',
        'tap': 'decode_head.conv_seg:in',
        'teacher_tap': 'decode_head.conv_seg',
        'student_channels': 8,
        'teacher_channels': CLASSES,
    }
    runner = run(
        folder, segmentor(), [CIRKD, hint], scenes,
        launcher='pytorch',
        model_wrapper_cfg={'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': True},
        train_cfg={'type': 'IterBasedTrainLoop', 'max_iters': 2},
    )  # fmt: skip
    call_hook = runner.call_hook

    def begin_at_the_second(name, **kwargs):
        if name == 'after_train_iter' and runner.iter == 0:
            runner.model.module.begin_distillation()
        return call_hook(name, **kwargs)

    runner.call_hook = begin_at_the_second
    runner.train()
    model = runner.model.module
    torch.save({'student': model.state_dict(), 'teacher': model.teacher.state_dict()}, f'{folder}/{rank}.pth')


def test_two_processes_agree(tmp_path):
    on_two_processes(_train_on, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    assert all(torch.equal(v, second['teacher'][k]) for k, v in first['teacher'].items())
    learnt = {k: v for k, v in first['student'].items() if 'running' not in k}  # each has its own statistics
    assert all(torch.equal(v, second['student'][k]) for k, v in learnt.items())
    assert first['student']['distill.cirkd.region_written'].sum() == 2 * 4 * CLASSES  # both processes' pictures
    assert {k for k in first['student'] if not k.startswith('distill.')} == first['teacher'].keys()
