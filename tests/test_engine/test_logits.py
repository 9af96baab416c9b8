"""The logits are found by observing, in every shipped head that runs without compiled ops and in users' own."""

import copy

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import PixelData
from mmpretrain.structures import DataSample, MultiTaskDataSample
from mmseg.structures import SegDataSample
from torch import nn
from torch.overrides import TorchFunctionMode

from benchmarks.zoo_configured import config_root, local
from benchmarks.zoo_models import FAMILIES, Predicting
from mmcpd.distill import Taps
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.logits import observe

torch.set_num_threads(1)
SIZE = (64, 64)
LOSSES = (F.cross_entropy, F.log_softmax, F.binary_cross_entropy_with_logits)


class LossInputs(TorchFunctionMode):
    """Keep what torch's losses are given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in LOSSES:
            self.seen.append(args[0])
        return func(*args, **(kwargs or {}))

    def has(self, tensor):
        """Say whether a loss was given this tensor, or it resized to the labels, or its rows in another layout."""
        for given in self.seen:
            like = [tensor]
            if given.ndim == tensor.ndim == 4:
                like += [
                    F.interpolate(tensor, given.shape[2:], mode='bilinear', align_corners=c) for c in (False, True)
                ]
            if any(each.shape == given.shape and torch.allclose(each, given, atol=1e-5) for each in like):
                return True
        return False


@pytest.fixture(autouse=True)
def scope():
    """Build models of mmpretrain, whatever scope an earlier runner left as the default."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def found_in(net, inputs, samples):
    """Return the taps that are found, after checking that a loss sees what each of them sees."""
    logits = observe(net, inputs, samples, labelled=True).logits()
    taps = [each.tap for each in logits]
    torch.manual_seed(1)
    with Taps(net, taps) as seen, LossInputs() as losses:
        net(inputs, samples, mode='loss')
    assert all(losses.has(seen[tap][0]) for tap in taps)
    assert not any(losses.has(seen[tap][0] * 1.01) for tap in taps), 'the check can fail'
    return {each.tap: each.sigmoid for each in logits}


# mmseg ------------------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """Give out maps of given widths, each of one convolution; `tokens` adds a class token to each."""

    def __init__(self, widths, strides, tokens=False):
        super().__init__()
        self.tokens = tokens
        self.stages = nn.ModuleList(nn.Conv2d(3, w, s, s) for w, s in zip(widths, strides, strict=True))

    def forward(self, x):
        maps = [stage(x) for stage in self.stages]
        return [(each, each.mean((2, 3))) for each in maps] if self.tokens else maps


def heads_of(model):
    decode = model['decode_head'] if isinstance(model['decode_head'], list) else [model['decode_head']]
    auxiliary = model.get('auxiliary_head') or []
    return [*decode, *(auxiliary if isinstance(auxiliary, list) else [auxiliary])]


def widths_for(model, count=5):
    widths = [4] * count
    for head in heads_of(model):
        head = head.get('kernel_generate_head', head)
        widths[0] = head.get('c1_in_channels', widths[0])
        index = head.get('in_index', -1)
        several = isinstance(index, list | tuple)
        channels = head.get('in_channels', 4) if several else [head.get('in_channels', 4)]
        for i, width in zip(index if several else [index], channels, strict=True):
            widths[i] = width
    return widths


def scenes(n=2, classes=10):
    samples = []
    for i in range(n):
        sample = SegDataSample(metainfo={'img_shape': SIZE, 'ori_shape': SIZE})
        g = torch.Generator().manual_seed(i)
        sample.gt_sem_seg = PixelData(data=torch.randint(0, classes, (1, *SIZE), generator=g))
        sample.gt_edge_map = PixelData(data=torch.randint(0, 2, (1, *SIZE), generator=g))
        samples.append(sample)
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(0)), samples


def shipped(name):
    """Build a shipped segmentor with all its heads, narrow ones too, on a backbone of one convolution a stage."""
    family = next(f for f in FAMILIES if f.key == name)
    config = Config.fromfile(str(config_root(family.package) / family.config))
    config.merge_from_dict(family.changes)
    model = local(config.model.to_dict())
    model = {key: value for key, value in model.items() if value is not None} | {'test_cfg': ConfigDict(mode='whole')}
    if name in ('mmseg/pidnet', 'mmseg/ddrnet'):  # their heads are one with the backbone
        with DefaultScope.overwrite_default_scope('mmseg'):
            return MODELS.build(model).train()
    model.pop('neck', None)
    with DefaultScope.overwrite_default_scope('mmseg'):
        net = MODELS.build(model | {'backbone': {'type': 'ResNet', 'depth': 18}})
    strides = STRIDES.get(name, [8] * 5)
    net.backbone = Pyramid(widths_for(model, len(strides)), strides)
    if name == 'mmseg/dpt':
        net.backbone = Pyramid([768] * 4, [16] * 4, tokens=True)
    return net.train()


# Heads that upsample by fixed factors, and one that pools 49x49 positions.
STRIDES = {key: [4, 8, 16, 32] for key in ('mmseg/sem_fpn', 'mmseg/poolformer', 'mmseg/twins', 'mmseg/setr')}
STRIDES |= {'mmseg/mobilenet_v3': [1] * 3}
SEGMENTORS = [family.key for family in FAMILIES if family.package == 'mmseg' and not isinstance(family, Predicting)]
OTHER_TAPS = {
    'mmseg/knet': 'decode_head.kernel_update_head.2:0',
    'mmseg/ocrnet': 'decode_head.1.conv_seg',
    'mmseg/segmenter': 'decode_head',
}


def one_of_each_head():
    chosen = {}
    for key in SEGMENTORS:
        family = next(f for f in FAMILIES if f.key == key)
        heads = heads_of(Config.fromfile(str(config_root('mmseg') / family.config)).model.to_dict())
        chosen.setdefault('+'.join(head['type'] for head in heads), key)
    return list(chosen.values())


@pytest.mark.parametrize('name', one_of_each_head())
def test_shipped_segmentors(name):
    net = shipped(name)
    inputs, samples = scenes()
    tap = OTHER_TAPS.get(name, 'decode_head.conv_seg')
    assert found_in(net, inputs, samples) == {tap: name == 'mmseg/fastscnn'}
    assert [each.tap for each in observe(net, inputs, samples, labelled=False).logits()] == [tap], 'without labels'


# mmpretrain -------------------------------------------------------------------------------------------------


class Vector(nn.Module):
    """Give out what a head of mmpretrain reads: by default one vector for each picture."""

    def __init__(self, width=6, give=lambda x: (x,)):
        super().__init__()
        self.conv, self.give = nn.Conv2d(3, width, 16, 16), give

    def forward(self, x):
        return self.give(self.conv(x).mean((2, 3)))


class Map(Vector):
    def forward(self, x):
        return (self.conv(x),)


CE = {'type': 'mmpretrain.CrossEntropyLoss'}
SIGMOID = CE | {'use_sigmoid': True}
MIXED = {'type': 'mmpretrain.LabelSmoothLoss', 'label_smooth_val': 0.1, 'num_classes': 4}


def twice(x):
    return ([x, x],)


CLASSIFIERS = {
    'LinearClsHead': ({'loss': CE}, Vector, {'head.fc': False}),
    'StackedLinearClsHead': ({'mid_channels': [5]}, Vector, {'head.layers.1.fc': False}),
    'VisionTransformerClsHead': ({'loss': MIXED}, Vector, {'head.layers.head': False}),
    'DeiTClsHead': ({}, lambda: Vector(give=lambda x: ((None, x, x),)), {'head': False}),
    'ConformerHead': (
        {'in_channels': [6, 6]}, lambda: Vector(give=twice),
        {'head.conv_cls_head': False, 'head.trans_cls_head': False},
    ),
    'LeViTClsHead': ({'distillation': False}, Vector, {'head.head.linear': False}),
    'EfficientFormerClsHead': ({'distillation': False}, Vector, {'head.head': False}),
    'ArcFaceClsHead': ({}, Vector, {'head.norm_product': False}),
    'VigClsHead': ({'hidden_dim': 5}, Vector, {'head.fc2': False}),
    'MultiLabelLinearClsHead': ({'loss': SIGMOID}, Vector, {'head.fc': True}),
    'MultiLabelClsHead': ({'loss': SIGMOID}, lambda: Vector(4), {'backbone:0': True}),
    'CSRAClsHead': ({'num_heads': 2, 'lam': 0.1, 'loss': SIGMOID}, Map, {'head': True}),
}  # fmt: skip


def classifier(name, options, backbone):
    head = {'type': f'mmpretrain.{name}', 'num_classes': 4, 'in_channels': 6, 'loss': CE, **options}
    if name == 'MultiLabelClsHead':
        del head['num_classes'], head['in_channels']
    net = MODELS.build({'type': 'mmpretrain.ImageClassifier', 'backbone': {'type': 'mmpretrain.LeNet5'}, 'head': head})
    net.backbone = backbone()
    return net.train()


def pictures(n=4, several=False):
    samples = [DataSample().set_gt_label([i % 4, 3] if several else i % 4) for i in range(n)]
    for sample in samples:
        sample.set_field(4, 'num_classes', field_type='metainfo')
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(0)), samples


@pytest.mark.parametrize('name', CLASSIFIERS)
def test_shipped_classifiers(name):
    options, backbone, taps = CLASSIFIERS[name]
    net = classifier(name, options, backbone)
    inputs, samples = pictures(several=options.get('loss') is SIGMOID)
    if name in ('DeiTClsHead', 'ArcFaceClsHead'):  # not trained by mmpretrain; the loss sees it with a margin
        found = observe(net, inputs, samples, labelled=name != 'DeiTClsHead').logits()
        assert {each.tap: each.sigmoid for each in found} == taps
    else:
        assert found_in(net, inputs, samples) == taps


class Embedding(nn.Module):
    """A user's classifier inside another class, as timm's and Hugging Face's are in mmpretrain's wrappers."""

    def __init__(self):
        super().__init__()
        self.stem, self.classifier = Vector(), nn.Sequential(nn.Dropout(0.0), nn.Linear(6, 4))

    def forward(self, x):
        return self.classifier(self.stem(x)[0])


class Wrapped(BaseModel):
    def __init__(self):
        super().__init__()
        self.model, self.loss_module = Embedding(), MODELS.build(CE)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'tensor':
            return self.model(inputs)
        return {'loss': self.loss_module(self.model(inputs), torch.cat([s.gt_label for s in data_samples]))}


class Tutorial(BaseModel):
    """As in MMEngine's tutorial: no default for the labels, and nothing in mode 'tensor'."""

    def __init__(self):
        super().__init__()
        self.net = Embedding()

    def forward(self, imgs, labels, mode):
        x = self.net(imgs)
        if mode == 'loss':
            return {'loss': F.cross_entropy(x, labels)}
        if mode == 'predict':
            return x, labels
        return None


class TwoWays(BaseModel):
    """Logits made by arithmetic of two layers in a method that is no module's forward; or in a head's."""

    def __init__(self, head):
        super().__init__()
        self.stem, self.a, self.b, self.num_classes = Vector(), nn.Linear(6, 4), nn.Linear(6, 4), 4
        self.aux, self.sum = nn.Linear(6, 4), Sum() if head else None

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.stem(inputs)[0]
        logits = self.a(x) + self.b(x) if self.sum is None else self.sum.forward(self.a(x), self.b(x))
        if mode != 'loss':
            return logits
        target = torch.eye(4)[torch.arange(len(x)) % 4]
        squares = ((logits.sigmoid() - target) ** 2).mean()  # a loss by hand
        return {'loss': squares, 'loss_aux': F.cross_entropy(self.aux(x), target)}


class Sum(nn.Module):
    def forward(self, a, b):
        return a + b


def test_models_in_models_and_mmengines_tutorial():
    inputs, samples = pictures()
    assert found_in(Wrapped(), inputs, samples) == {'model.classifier.1': False}
    assert found_in(Tutorial(), inputs, torch.arange(4)) == {'net.classifier.1': False}


def test_a_head_of_a_user_with_a_loss_by_hand():
    inputs, samples = pictures()
    [found] = observe(TwoWays(head=True), inputs, samples, labelled=True).logits()
    assert (found.tap, found.sigmoid, found.channels) == ('sum', True, 4)


def test_what_cannot_be_told_names_the_candidates():
    inputs, samples = pictures()
    observed = observe(TwoWays(head=False), inputs, samples, labelled=True)
    with pytest.raises(ValueError, match=r"TwoWays: it cannot be told .* set tap='\.\.\.' to the .* of a, b"):
        observed.logits()


def tasks(n=4, labelled=('colour', 'marks')):
    samples = []
    for i in range(n):
        sample = MultiTaskDataSample()
        if 'colour' in labelled and i != 1:  # not every picture has it
            sample.set_field(DataSample().set_gt_label(i % 3), 'colour')
        if 'marks' in labelled:
            sample.set_field(DataSample().set_gt_score(torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])), 'marks')
        samples.append(sample)
    return torch.randn(n, 3, *SIZE, generator=torch.Generator().manual_seed(0)), samples


def several_tasks():
    heads = {
        'colour': {'type': 'mmpretrain.LinearClsHead', 'num_classes': 3, 'in_channels': 6, 'loss': CE},
        'marks': {'type': 'mmpretrain.MultiLabelLinearClsHead', 'num_classes': 5, 'in_channels': 6, 'loss': SIGMOID},
    }
    net = MODELS.build(
        {
            'type': 'mmpretrain.ImageClassifier',
            'backbone': {'type': 'mmpretrain.LeNet5'},
            'head': {'type': 'mmpretrain.MultiTaskHead', 'task_heads': heads},
        }
    )
    net.backbone = Vector()
    return net.train()


BOTH = {'head.task_heads.colour.fc': False, 'head.task_heads.marks.fc': True}


@pytest.mark.parametrize('labelled', [('colour', 'marks'), ('marks',), ()])
def test_each_of_several_tasks_has_its_logits(labelled):
    inputs, samples = tasks(labelled=labelled)
    found = observe(several_tasks(), inputs, samples, labelled=bool(labelled)).logits()
    assert {each.tap: each.sigmoid for each in found} == BOTH


def test_each_task_is_taught_on_the_samples_that_it_has():
    torch.manual_seed(0)
    model = Distiller(several_tasks(), losses=[{'type': 'KDLoss', 'tau': 1.0}]).train()
    inputs, samples = tasks()
    model(inputs, samples, mode='loss')
    model.begin_distillation()
    for p in model.student.head.parameters():
        p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    found = model(inputs, samples, mode='loss')['loss_distill_kd']
    net, teacher, some = model.student, model.teacher, torch.tensor([0, 2, 3])
    student, taught = net(inputs), teacher(inputs)
    colour = F.kl_div(student['colour'][some].log_softmax(1), taught['colour'][some].softmax(1), reduction='batchmean')
    p, q = taught['marks'].sigmoid(), student['marks'].sigmoid()
    marks = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).sum(1).mean()
    torch.testing.assert_close(found, colour + marks)
    assert marks > 1e-3 and colour > 1e-3
    model(*tasks(labelled=('marks',)), mode='loss')  # a task without a label in this batch


def test_observing_leaves_everything_as_it_was():
    net = classifier('LinearClsHead', {}, Vector)
    net.neck = nn.Sequential(nn.Identity())
    net.backbone = nn.Sequential(Vector(give=lambda x: x), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Unflatten(1, (1, 6)))
    net.head.pre_logits = lambda feats: feats[:, 0]
    inputs, samples = pictures()
    before, seed = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    [found] = observe(net, inputs, samples, labelled=True).logits()
    assert found.tap == 'head.fc' and all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), seed) and not hasattr(net.head.fc, '__wrapped__')
    assert not any('forward' in module.__dict__ for module in net.modules()) and 'pred_score' not in samples[0]
    net(inputs, samples, mode='loss')
    assert not torch.equal(net.state_dict()['backbone.1.running_mean'], before['backbone.1.running_mean'])
