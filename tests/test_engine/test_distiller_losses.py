"""A distiller's losses in training: by softmax or sigmoid, checked at the start, and loud where they are 0."""

import logging

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample
from mmseg.structures import SegDataSample
from torch.utils.data import Dataset

from mmcpd.engine.distillers import Distiller

torch.set_num_threads(1)
SIZE, CLASSES = 32, 5
PREPROCESSOR = {'mean': [0.0] * 3, 'std': [1.0] * 3}


def classifier(head='LinearClsHead', classes=CLASSES, **options):
    return {
        'type': 'mmpretrain.ImageClassifier',
        'backbone': {'type': 'mmpretrain.ResNet', 'depth': 18, 'base_channels': 8, 'stem_channels': 8},
        'neck': {'type': 'mmpretrain.GlobalAveragePooling'},
        'head': {
            'type': f'mmpretrain.{head}',
            'num_classes': classes,
            'in_channels': 64,
            'loss': {'type': 'mmpretrain.CrossEntropyLoss'},
            **options,
        },
        'data_preprocessor': {'type': 'mmpretrain.ClsDataPreprocessor', 'num_classes': classes, **PREPROCESSOR},
    }


def several_labels():
    return classifier('MultiLabelLinearClsHead', loss={'type': 'mmpretrain.CrossEntropyLoss', 'use_sigmoid': True})


def binary():
    """A segmentor of one channel: building or not."""
    head = {
        'type': 'mmseg.FCNHead', 'in_channels': 16, 'channels': 8, 'in_index': 1, 'num_convs': 1,
        'concat_input': False, 'num_classes': 2, 'out_channels': 1, 'threshold': 0.3, 'norm_cfg': {'type': 'BN'},
        'loss_decode': {'type': 'mmseg.CrossEntropyLoss', 'use_sigmoid': True},
    }  # fmt: skip
    return {
        'type': 'mmseg.EncoderDecoder',
        'backbone': {'type': 'mmseg.ResNet', 'depth': 18, 'base_channels': 8, 'stem_channels': 8, 'num_stages': 2,
                     'strides': (1, 2), 'dilations': (1, 1), 'out_indices': (0, 1)},
        'decode_head': head,
        'auxiliary_head': {**head, 'in_channels': 8, 'in_index': 0},
        'data_preprocessor': {'type': 'mmseg.SegDataPreProcessor', 'size': (SIZE, SIZE), **PREPROCESSOR},
        'test_cfg': ConfigDict(mode='whole'),
    }  # fmt: skip


def samples_of(kind, n=4):
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(n):
        if kind is binary:
            sample = SegDataSample(metainfo={'img_shape': (SIZE, SIZE), 'ori_shape': (SIZE, SIZE)})
            sample.gt_sem_seg = PixelData(data=torch.randint(0, 2, (1, SIZE, SIZE), generator=g))
        elif kind is several_labels:
            sample = DataSample().set_gt_score((torch.rand(CLASSES, generator=g) > 0.5).float())
        else:
            sample = DataSample().set_gt_label(i % CLASSES)
        found.append(sample)
    return [torch.rand(3, SIZE, SIZE, generator=g) for _ in range(n)], found


def distiller(student, losses=({'type': 'KDLoss'},), **kwargs):
    torch.manual_seed(0)
    return Distiller(student(), losses=losses, **kwargs).train()


def batch(model, kind):
    inputs, samples = samples_of(kind)
    return model.data_preprocessor({'inputs': inputs, 'data_samples': samples}, True)


def shaken(model):
    for p in model.student.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    return model


@pytest.fixture
def logged(monkeypatch):
    """What a distiller logs: level and text."""
    found = []
    monkeypatch.setattr(
        'mmcpd.engine.distillers.print_log', lambda text, logger, level=logging.INFO: found.append((level, text))
    )
    return found


def bernoulli(student, teacher, tau):
    p, q = (teacher / tau).sigmoid(), (student / tau).sigmoid()
    rows = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1)  # (N,) or (N, H, W)
    return tau**2 * rows.mean()


# By softmax or sigmoid ----------------------------------------------------------------------------------------


@pytest.mark.parametrize('weight', [0, 1])
@pytest.mark.parametrize(('student', 'tap'), [(several_labels, 'head.fc'), (binary, 'decode_head.conv_seg')])
@pytest.mark.parametrize('named', [True, False])
def test_sigmoid_heads_are_taught_class_by_class(student, tap, named, weight):
    losses = [{'type': 'KDLoss', 'tau': 2.0} | ({'tap': tap} if named else {})]
    model = distiller(student, losses, teacher=MODELS.build(student()), task_weight=weight)
    data, seen = batch(model, student), {}
    for name, net in (('student', model.student), ('teacher', model.teacher)):
        net.get_submodule(tap).register_forward_hook(lambda m, i, out, name=name: seen.__setitem__(name, out))
    torch.manual_seed(1)
    found = model(**data, mode='loss')['loss_distill_kd']
    with torch.no_grad():
        model.teacher(data['inputs'])
    torch.testing.assert_close(found, bernoulli(seen['student'], seen['teacher'], 2.0))
    assert found > 1e-3


def test_an_option_says_otherwise():
    values = []
    teacher = MODELS.build(several_labels())
    for sigmoid in (None, True, False):
        model = distiller(several_labels, [{'type': 'KDLoss', 'sigmoid': sigmoid}], teacher=teacher)
        values.append(model(**batch(model, several_labels), mode='loss')['loss_distill_kd'].item())
    assert values[0] == values[1] != values[2]
    with pytest.raises(ValueError, match="sigmoid is True or False or None: got 'yes'"):
        distiller(several_labels, [{'type': 'KDLoss', 'sigmoid': 'yes'}])


def test_what_is_compared_is_logged(logged):
    model = distiller(binary, [{'type': 'KDLoss'}, {'type': 'CWDLoss', 'tap': 'backbone.layer1'}])
    for _ in range(2):
        model(**batch(model, binary), mode='loss')
    [(level, text)] = logged
    assert level == logging.INFO and text.splitlines() == [
        "distillation: KDLoss 'kd' compares decode_head.conv_seg by sigmoid",
        "distillation: CWDLoss 'cwd' compares backbone.layer1",
    ]


def test_a_teacher_of_another_kind_has_its_own_logits():
    stacked = MODELS.build(classifier('StackedLinearClsHead', mid_channels=[7]))
    model = distiller(classifier, teacher=stacked)
    model(**batch(model, classifier), mode='loss')
    [pair] = model._comparisons['kd']
    assert (pair.tap, pair.teacher_tap, pair.loss.sigmoid) == ('head.fc', 'head.layers.1.fc', False)


# At the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('student', 'loss', 'says'),
    [
        (classifier, {'type': 'KDLoss', 'tap': 'head.loss_module'}, "did not call 'head.loss_module'"),
        (classifier, {'type': 'FeatureLoss', 'tap': 'backbone:7', 'student_channels': 64}, 'gives 1 outputs'),
        (classifier, {'type': 'CWDLoss'}, r'CWDLoss compares maps \(N, C, H, W\), got \(4, 5\)'),
        (classifier, {'type': 'KDLoss', 'teacher_tap': 'backbone.layer1'}, 'do not fit'),
        (binary, {'type': 'KDLoss', 'tap': 'auxiliary_head.conv_seg'}, r"did not call 'auxiliary_head.conv_seg'"),
        (binary, {'type': 'KDLoss', 'tap': 'backbone.layer1', 'teacher_tap': 'logits'}, 'do not fit'),
    ],
)
def test_wrong_taps_fail_in_the_first_iteration(student, loss, says):
    model = distiller(student, [loss])
    for _ in range(2):  # the check is not skipped the next time
        with pytest.raises(ValueError, match=says):
            model(**batch(model, student), mode='loss')


def test_a_head_is_a_tap_too():
    model = distiller(binary, [{'type': 'KDLoss', 'tap': 'decode_head'}, {'type': 'KDLoss', 'name': 'found'}])
    model.begin_distillation()
    found = shaken(model)(**batch(model, binary), mode='loss')
    assert found['loss_distill_kd'] == found['loss_distill_found'] > 0


def test_the_check_changes_nothing():
    cirkd = {'type': 'CIRKDLoss', 'tap': 'decode_head.conv_seg:in', 'student_channels': 8, 'num_classes': 2,
             'pixel_queue': 32, 'region_queue': 8}  # fmt: skip
    model, bare = distiller(binary, [cirkd, {'type': 'KDLoss'}]), distiller(binary, [])
    ours, theirs = [], []
    for found, net in ((ours, model), (theirs, bare)):
        torch.manual_seed(3)
        for _ in range(2):
            found.append(net(**batch(net, binary), mode='loss')['decode.loss_ce'])
    assert torch.equal(torch.stack(ours), torch.stack(theirs)), 'dropout and batch norm'
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in bare.state_dict().items())
    assert state['distill.cirkd.pixel_written'].sum() == 0 and all(m.training for m in model.modules())


# Losses that are 0 ------------------------------------------------------------------------------------------------


def zeros_of(model, student, logged, iterations=120):
    data = batch(model, student)
    with torch.no_grad():
        for _ in range(iterations):
            model(**data, mode='loss')
    return [text for level, text in logged if level == logging.WARNING]


def test_a_loss_that_stays_0_says_so(logged):
    model = distiller(binary, [{'type': 'KDLoss', 'sigmoid': False}, {'type': 'CWDLoss'}])
    model.begin_distillation()
    said = zeros_of(shaken(model), binary, logged)
    assert len(said) == 1 and said[0].startswith('loss_distill_kd was exactly 0 for 50 iterations')
    assert 'softmax over one channel' in said[0] and 'sigmoid=True' in said[0] and 'decode_head.conv_seg' in said[0]


def test_a_student_that_still_is_its_teacher_is_no_reason_to_warn(logged):
    model = distiller(binary, [{'type': 'KDLoss', 'tap': 'backbone.conv1'}])
    model.begin_distillation()  # the first layer of both sees the same
    model.student.eval()
    assert zeros_of(model, binary, logged) == []
    model.student.decode_head.conv_seg.weight.data.zero_()
    assert len(zeros_of(model, binary, logged)) == 1


# In a Runner --------------------------------------------------------------------------------------------------------


@DATASETS.register_module()
class Kept(Dataset):
    def __init__(self, kind):
        self.inputs, self.samples = samples_of({'binary': binary, 'several': several_labels}[kind], 8)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {'inputs': self.inputs[i], 'data_samples': self.samples[i]}


def runner(folder, kind, student, losses, iterations=4, **model):
    return Runner.from_cfg(Config({
        'model': {'type': 'mmcpd.Distiller', 'student': student, 'losses': losses, **model},
        'work_dir': str(folder),
        'train_dataloader': {
            'batch_size': 4, 'num_workers': 0, 'dataset': {'type': 'Kept', 'kind': kind},
            'sampler': {'type': 'DefaultSampler', 'shuffle': False}, 'collate_fn': {'type': 'pseudo_collate'},
        },
        'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': iterations},
        'optim_wrapper': {'optimizer': {'type': 'SGD', 'lr': 0.05}},
        'default_hooks': {'logger': {'type': 'LoggerHook', 'interval': 1}},
        'log_processor': {'by_epoch': False},
        'experiment_name': f'losses-{folder.name}',
        'randomness': {'seed': 0},
    }))  # fmt: skip


@pytest.mark.parametrize(('kind', 'student'), [('binary', binary), ('several', several_labels)])
def test_a_runner_teaches_sigmoid_heads_without_a_tap(tmp_path, kind, student):
    trained = runner(tmp_path, kind, student(), [{'type': 'mmcpd.KDLoss'}])
    call_hook = trained.call_hook

    def call(name, **kwargs):
        if name == 'after_train_iter' and trained.iter == 0:
            trained.model.begin_distillation()
        return call_hook(name, **kwargs)

    trained.call_hook = call
    trained.train()
    history = trained.message_hub.log_scalars['train/loss_distill_kd'].data[0]
    assert len(history) == 3 and (history > 0).all()
    log = next(tmp_path.rglob('*.log')).read_text()
    assert log.count('distillation: KDLoss') == 1 and 'by sigmoid' in log


def test_a_runner_with_a_wrong_tap_stops_in_its_first_iteration(tmp_path):
    wrong = runner(tmp_path, 'binary', binary(), [{'type': 'mmcpd.KDLoss', 'tap': 'auxiliary_head.conv_seg'}])
    with pytest.raises(ValueError, match=r"did not call 'auxiliary_head\.conv_seg'"):
        wrong.train()
    assert wrong.iter == 0
