"""The distiller in a Runner: its log, its checkpoints, training without labels and on two processes."""

from __future__ import annotations

import os

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmcpd.engine.distillers import Distiller
from tests.helpers import on_two_processes
from tests.test_engine.distilled_models import CIRKD, CLASSES, KD, classifier, pictures, scenes, segmentor


def test_runners_preprocessor_goes_to_a_student_without_one():
    bare = classifier()
    given = bare.pop('data_preprocessor')
    model = Distiller(bare, data_preprocessor=given)
    assert model.student.data_preprocessor.mean.flatten().tolist() == [0.5] * 3
    own = Distiller(classifier(), data_preprocessor=given | {'mean': [0.0] * 3})
    assert own.student.data_preprocessor.mean.flatten().tolist() == [0.5] * 3


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
