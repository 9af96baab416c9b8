"""Pruning at once: from pictures alone, by a function and by the hook, in real, tiny runs."""

from __future__ import annotations

import copy
import os

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS, TRANSFORMS
from mmengine.runner import Runner
from torch import nn

from mmcpd.comb import comb
from mmcpd.engine.at_once import check_label_free, ends_in_softmax, prune_at_once, take_over_, with_softmax
from mmcpd.engine.begin import prune_at_once_in_training_
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.pictures import pictures
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import PruneError
from mmcpd.prune import shares
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from tests.helpers import EXACT, on_two_processes, randomise_, rotated
from tests.test_engine.distilled_models import classifier, segmentor
from tests.test_engine.tiny_runs import AT_ONCE, config, hook_of, train

torch.set_num_threads(1)


class Net(nn.Module):
    """A residual net with batch norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.one, self.middle = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.two, self.fc = nn.Conv2d(24, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.two(self.middle(self.one(x)).relu())
        return self.fc(x.relu().mean((2, 3)))


@pytest.fixture
def case():
    torch.manual_seed(0)
    model = randomise_(Net())
    batches = list(torch.rand(24, 3, 8, 8, dtype=torch.float64).split(8))
    return model, comb(model, batches[0][:1]), batches


@pytest.mark.parametrize('refit', [True, False])
def test_from_pictures_to_a_masked_model(case, refit):
    model, coupling, batches = case
    before = copy.deepcopy(model.state_dict())
    numbers = torch.get_rng_state()
    seen = []
    pruned = prune_at_once(
        model, coupling, batches, {'macs': 0.5, 'params': 0.7}, refit=refit, progress=lambda *at: seen.append(at)
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), (
        'the model is left alone'
    )
    assert torch.equal(numbers, torch.get_rng_state())
    assert pruned.left == shares(coupling, pruned.keep)
    assert pruned.left['macs'] <= 0.5 and pruned.left['params'] <= 0.7
    assert seen[:3] == [('score', n, 3) for n in (1, 2, 3)]
    assert (('refit', 3, 3) in seen) == ('refit' in pruned.seconds) == (pruned.refitted is not None) == refit
    assert 'chosen at once' in str(pruned) and 'score' in str(pruned)

    small = slim(pruned.model, coupling, pruned.keep)
    assert compare(pruned.model, coupling, pruned.keep, small) < EXACT
    name = next(name for name, kept in pruned.keep.items() if not kept.all())
    other = slim(pruned.model, coupling, rotated(coupling, name, pruned.keep))
    assert compare(pruned.model, coupling, pruned.keep, other) > 1e-5, 'the control'
    masked = copy.deepcopy(model)
    mask_(masked, coupling, pruned.keep)
    same = all(torch.equal(a, b) for a, b in zip(masked.parameters(), pruned.model.parameters(), strict=True))
    assert same != refit


def test_the_seed_decides(case):
    first, again, other = (prune_at_once(*case, {'macs': 0.5}, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.scores[name], again.scores[name]) for name in first.scores)
    assert not all(torch.equal(first.scores[name], other.scores[name]) for name in first.scores)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_a_target_out_of_reach_is_refused_before_anything_is_scored(case):
    with pytest.raises(PruneError, match='macs cannot go down'):
        prune_at_once(*case, {'macs': 0.001}, progress=lambda *_: pytest.fail('scored'))


def head(loss, **options):
    return {**classifier(), 'head': {**classifier()['head'], 'loss': loss, **options}}


def decode(*losses, **options):
    model = segmentor()
    model['decode_head'] = {**model['decode_head'], 'loss_decode': list(losses), **options}
    return model


CE = {'type': 'mmseg.CrossEntropyLoss'}
SIGMOID = {'type': 'mmseg.CrossEntropyLoss', 'use_sigmoid': True}


@pytest.mark.parametrize(
    ('model', 'softmax'),
    [
        (classifier(), True),
        (head({'type': 'mmpretrain.LabelSmoothLoss', 'label_smooth_val': 0.1, 'num_classes': 4}), True),
        (head({'type': 'mmpretrain.CrossEntropyLoss', 'use_sigmoid': True}), False),
        (head({'type': 'mmpretrain.LabelSmoothLoss', 'label_smooth_val': 0.1, 'mode': 'multi_label'}), False),
        (head({'type': 'mmpretrain.FocalLoss'}), False),
        (head({'type': 'mmpretrain.CrossEntropyLoss'}, num_classes=1), False),
        (segmentor(), True),
        (decode(CE, {'type': 'mmseg.LovaszLoss', 'reduction': 'none'}), True),
        (decode(CE, SIGMOID | {'loss_name': 'loss_two'}), False),
        (decode(SIGMOID), False),
        (decode(SIGMOID, num_classes=2, out_channels=1, threshold=0.3), False),
    ],
)
def test_the_models_loss_says_whether_a_softmax_follows(model, softmax):
    built = MODELS.build(model)
    assert ends_in_softmax(built) is softmax
    assert with_softmax('gauss_newton', built) == {'type': 'gauss_newton', 'softmax': softmax}
    assert with_softmax({'type': 'gauss_newton', 'softmax': not softmax}, built)['softmax'] is not softmax
    assert with_softmax('magnitude', built) == {'type': 'magnitude'}


@pytest.mark.parametrize('name', ['hessian', 'curvature', 'group_fisher'])
def test_scores_that_read_a_loss_are_refused(name):
    with pytest.raises(ValueError, match=f"'{name}' reads the gradients of a loss: .* gauss_newton, magnitude, random"):
        check_label_free({'type': name})
    for free in ('gauss_newton', {'type': 'magnitude', 'p': 2}, 'random'):
        check_label_free(free)


def test_the_optimizer_forgets_what_changed_and_nothing_else(case):
    model = case[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(case[2][0]).sum().backward()
    optimizer.step()
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.two.weight[0] += 1
        changed.norm.running_mean += 1
    take_over_(model, changed, optimizer)
    assert all(torch.equal(value, changed.state_dict()[name]) for name, value in model.state_dict().items())
    assert model.two.weight not in optimizer.state
    assert len(optimizer.state) == len(list(model.parameters())) - 1


# -- the hook ----------------------------------------------------------------------------------------------------------


@TRANSFORMS.register_module()
class DropLabel:
    """Take the label away, so that a loss that reads it fails."""

    def __call__(self, results):
        return {name: value for name, value in results.items() if name != 'gt_label'}


UNLABELLED = {
    'model.task_weight': 0,
    'train_dataloader.dataset.pipeline': [{'type': 'DropLabel'}, {'type': 'PackInputs'}],
}


@pytest.mark.parametrize('begin', [0, 4])
def test_a_run_that_prunes_at_once(runner_of, tmp_path, begin):
    change = {**AT_ONCE, 'prune.begin': begin, **(UNLABELLED if begin == 0 else {})}
    runner = runner_of(**change, epochs=3)
    watch = train(runner)
    work, hook = tmp_path / 'run', hook_of(runner)
    assert watch.left[:begin] == [1.0] * begin
    assert len(set(watch.left[begin:])) == 1 and 0.4 < watch.left[-1] <= 0.5, 'all units go at once'
    assert watch.taught == [False] * begin + [True] * (12 - begin)
    dense = torch.load(work / 'dense.pth', weights_only=True)['state_dict']
    teacher = runner.model.teacher.state_dict()
    assert all(torch.equal(dense[name], teacher[name]) for name in dense), 'the teacher is the dense model'

    content, x = read_slim(work / 'slim.pth'), torch.randn(3, 3, 32, 32)
    assert content['meta']['slim']['macs'] / content['meta']['dense']['macs'] == watch.left[-1]
    masked = bare_model(runner.model).eval()
    torch.testing.assert_close(load_slim(runner.cfg, work / 'slim.pth')(x), masked(x), rtol=1e-4, atol=1e-5)
    name = next(name for name, kept in hook.pruner.keep.items() if not kept.all())
    wrong = slim(masked, hook.pruner.coupling, rotated(hook.pruner.coupling, name, hook.pruner.keep))
    assert compare(masked, hook.pruner.coupling, hook.pruner.keep, wrong) > 1e-3, 'the control'
    log = next(work.glob('*/*.log')).read_text()
    for text in (
        f'iteration {begin} of 12, all at once, refitted on 32 training pictures, by GaussNewton / macs',
        'chosen at once: ',
        *(['no task loss, no labels'] if begin == 0 else []),
    ):
        assert text in log, text


def test_what_goes_is_what_the_function_chooses(runner_of, monkeypatch):
    """The hook looks at training pictures that are not augmented, and the loss decides about the softmax."""
    runner = runner_of(**AT_ONCE, epochs=1, **{'prune.seed': 3})
    found = []

    def watched(pruner, *args):
        model, coupling = copy.deepcopy(pruner.model), pruner.coupling
        said = prune_at_once_in_training_(pruner, *args)
        found.append((model, coupling, copy.deepcopy(pruner.keep), copy.deepcopy(pruner.model.state_dict())))
        return said

    monkeypatch.setattr('mmcpd.engine.hooks.prune_at_once_in_training_', watched)
    train(runner)
    ((model, coupling, keep, weights),) = found
    batches = pictures(runner.cfg, model, 32, seed=3)
    options = {'normalize_by': 'memory', 'round_to': 8, 'seed': 3}
    again = prune_at_once(model, coupling, batches, {'macs': 0.5}, **options)
    assert all(torch.equal(keep[name], again.keep[name]) for name in keep)
    assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())
    plain = {'importance': {'type': 'gauss_newton', 'softmax': False}, **options}
    other = prune_at_once(model, coupling, batches, {'macs': 0.5}, **plain)
    assert not all(torch.equal(other.scores[name], again.scores[name]) for name in keep), 'the control'


SGD, ADAM = {'type': 'SGD', 'lr': 0.02, 'momentum': 0.9}, {'type': 'AdamW', 'lr': 1e-3}


class Stop(Hook):
    priority = 'LOWEST'

    def __init__(self, epoch):
        self.epoch = epoch

    def after_train_epoch(self, runner):
        if runner.epoch + 1 == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ('begin', 'stop', 'optimizer'),
    [(4, 1, ADAM), *(pytest.param(b, s, SGD, marks=pytest.mark.slow) for b, s in ((0, 1), (4, 2)))],
)
def test_a_resumed_run_chooses_and_refits_once(runner_of, tmp_path, monkeypatch, begin, stop, optimizer):
    change = {**AT_ONCE, 'prune.begin': begin, 'epochs': 3}
    change['optim_wrapper.optimizer'] = {'_delete_': True, **optimizer}
    whole = runner_of('whole', **change)
    train(whole)
    first = runner_of('parts', **change)
    first.register_hook(Stop(stop))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    if begin < 4 * stop:
        monkeypatch.setattr('mmcpd.engine.begin.prune_at_once', lambda *_, **__: pytest.fail('pruned again'))
    checkpoint = str(tmp_path / 'parts' / f'epoch_{stop}.pth')
    second = runner_of('parts', **change, resume=True, load_from=checkpoint)
    watch = train(second)
    assert watch.taught == [True] * len(watch.taught) and watch.left[0] <= 0.5
    a, b = hook_of(whole), hook_of(second)
    assert all(torch.equal(a.pruner.keep[n], b.pruner.keep[n]) for n in a.pruner.keep)
    for (name, one), two in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


VIT = {
    'type': 'ImageClassifier',
    'backbone': {
        'type': 'VisionTransformer',
        'arch': {'embed_dims': 32, 'num_layers': 2, 'num_heads': 2, 'feedforward_channels': 64},
        'img_size': 32,
        'patch_size': 8,
        'out_type': 'avg_featmap',
        'with_cls_token': False,
    },
    'head': {
        'type': 'LinearClsHead',
        'num_classes': 10,
        'in_channels': 32,
        'loss': {'type': 'CrossEntropyLoss'},
        'topk': (1,),
    },
}


@pytest.mark.parametrize('at_once', [True, False])
def test_heads_are_rotated_before_the_teacher_is_taken(runner_of, tmp_path, at_once):
    student = {'_delete_': True, **VIT}
    options = {'begin': 4, 'rotate': True, **({'at_once': True, 'pictures': 32} if at_once else {'end': 8})}
    change = {'model.student': student, 'default_hooks.prune': {'type': 'mmcpd.PruneHook', '_delete_': True, **options}}

    class Look(Hook):
        """Keep the weights and the optimizer's state around the beginning."""

        priority = 'VERY_HIGH'
        trained, momentum = None, None

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            if runner.iter == 3:
                self.trained = copy.deepcopy(bare_model(runner.model)).eval()

    class After(Hook):
        priority = 'LOWEST'
        lacking = None

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            if runner.iter == 4:
                state = runner.optim_wrapper.optimizer.state
                named = bare_model(runner.model).named_parameters()
                self.lacking = {name for name, parameter in named if parameter not in state}

    look, after = Look(), After()
    runner = runner_of(**change, epochs=2)
    runner.register_hook(look)
    runner.register_hook(after)
    train(runner)
    teacher, x = runner.model.teacher, torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(teacher(x), look.trained(x), rtol=1e-4, atol=1e-5)
    changed = {
        name
        for (name, one), two in zip(teacher.named_parameters(), look.trained.parameters(), strict=True)
        if not torch.equal(one, two)
    }
    assert changed == {
        f'backbone.layers.{i}.attn.{n}' for i in (0, 1) for n in ('qkv.weight', 'qkv.bias', 'proj.weight')
    }
    assert after.lacking >= changed
    assert at_once or after.lacking == changed, 'nothing else is forgotten'
    assert 'rotated 4 heads of 2 attentions' in next((tmp_path / 'run').glob('*/*.log')).read_text()


def test_gauss_newton_scores_while_the_model_trains(runner_of):
    watch = train(runner_of(epochs=3, **{'prune.importance': 'gauss_newton', 'prune.end': 10}))
    assert len(set(watch.left)) > 3 and watch.left[-1] <= 0.5


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (
            {'at_once': True, 'end': 0.5, 'interval': 5},
            'at_once=True removes all units at begin: leave out end, interval',
        ),
        ({'at_once': True, 'curve': 'linear'}, 'leave out curve'),
        ({'at_once': True, 'importance': 'hessian'}, 'reads the gradients of a loss'),
        ({'at_once': True, 'importance': 'gauss_newtn'}, 'did you mean gauss_newton'),
        ({'at_once': True, 'pictures': 0}, 'pictures counts training pictures'),
        ({'at_once': 1}, 'at_once is True or False'),
        ({'rotate': 'yes'}, 'rotate is True or False'),
        ({'pictures': 100}, 'pictures belong to at_once=True'),
        ({'refit': False}, 'refit belong to at_once=True'),
    ],
)
def test_options_of_the_other_way_are_refused_when_the_hook_is_built(options, message):
    with pytest.raises(ValueError, match=message):
        HOOKS.build({'type': 'mmcpd.PruneHook', **options})


def _train_on(rank, folder):
    """Train on one of two processes, for the test below."""
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE='2')
    cfg = config(folder, **AT_ONCE, epochs=1)
    cfg.launcher = 'pytorch'
    cfg.model_wrapper_cfg = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}
    runner = Runner.from_cfg(cfg)
    train_on = hook_of(runner)
    runner.train()
    state = {'model': bare_model(runner.model).state_dict(), 'keep': train_on.pruner.keep}
    torch.save(state, f'{folder}/{rank}.pth')


def test_two_processes_choose_and_refit_alike(tmp_path):
    on_two_processes(_train_on, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in range(2))
    assert all(torch.equal(kept, second['keep'][name]) for name, kept in first['keep'].items())
    assert not all(bool(kept.all()) for kept in first['keep'].values())
    learnt = {name: value for name, value in first['model'].items() if 'running' not in name}
    assert all(torch.equal(value, second['model'][name]) for name, value in learnt.items())
