"""Values of a wrong kind, in every option of the hooks, the distiller and its losses: one sentence, before any work."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config

from mmcpd.cli.checks import check_hooks
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.loss_configs import LOSSES, LossConfig
from mmcpd.prune import IMPORTANCES, build_importance, check_importance
from tests.test_engine.tiny_runs import STUDENT

NAN, INF = float('nan'), float('inf')
# Option of PruneHook -> wrong values; {'at_once': True} goes with those of pruning at once.
WRONG = {
    'target': [0.5, '0.5', [], {}, None, True, {'macs': '0.5'}, {'macs': 1}, {'macs': NAN}, {'flops': 0.5}, {1: 0.5}],
    'begin': ['0.1', -1, 1.5, None, True, [0], NAN],
    'end': ['0.5', None, 1, True, NAN, INF, {'a': 1}],
    'interval': [2.5, '10', 0, -3, True, None, [10]],
    'curve': [1, None, ['cubic'], 'cubical', {'type': 'cubic'}],
    'at_once': ['True', 1, None, []],
    'rotate': ['no', 0, None],
    'importance': [
        1, True, ['hessian'], 'hesian', {}, '', 0, {'type': 1}, {'probes': 2}, {'type': ['hessian']},
        {'type': 'curvature', 'probes': '2'}, {'type': 'curvature', 'probes': True}, {'type': 'curvature', 'step': 'a'},
        {'type': 'curvature', 'step': NAN}, {'type': 'curvature', 'step': INF}, {'type': 'curvature', 'step': True},
        {'type': 'magnitude', 'p': '1'}, {'type': 'magnitude', 'p': True}, {'type': 'magnitude', 'p': [1]},
        {'type': 'magnitude', 'roles': 5}, {'type': 'magnitude', 'roles': None}, {'type': 'magnitude', 'roles': [1]},
        {'type': 'magnitude', 'roles': []}, {'type': 'magnitude', 'roles': 'outer'}, {'type': 'hessian', 'seed': 'a'},
        {'type': 'random', 'seed': -1}, {'type': 'hessian', 'groups': []},
    ],
    'normalize': [1, 'mac', ['macs'], True, {}, '', 0],
    'round_to': ['8', 0, 2.5, True, None],
    'min_units': ['8', 0, 2.5, True, None],
    'remain': [0.5, None, ['backbone.*'], {'backbone.*': 0}, {'backbone.*': 1.2}, {'backbone.*': '0.8'}, {1: 0.5}],
    'heads': [1, 'dims', None, ['dim']],
    'ignore': [1, [1], None, {'a': 1}, [['a']]],
    'seed': ['1', -1, 1.5, None, True],
    'input_shape': [3, '3,8,8', [3, 8], [3, '8', 8], [3, -8, 8]],
    'strict': ['no', 1, None],
    'unused': ['no', 1, None, ['leave']],
}  # fmt: skip
AT_ONCE = {
    'pictures': ['64', 0, 2.5, True, None],
    'refit': ['no', 0, None],
    'importance': [{'type': 'gauss_newton', 'draws': '1'}, {'type': 'gauss_newton', 'softmax': 'no'}, 'hessian', 7],
}
PAPER = {'units_per_event': ['8', 0, 2.5, True, None]}


def cases():
    for fixed, table in (({}, WRONG), ({'at_once': True}, AT_ONCE), ({'curve': 'paper'}, PAPER)):
        yield from ({**fixed, name: value} for name, values in table.items() for value in values)


def hooks(**options):
    return Config({'default_hooks': {'prune': {'type': 'mmcpd.PruneHook', **options}}})


@pytest.mark.parametrize('options', cases(), ids=str)
def test_a_wrong_value_of_the_hook_is_one_sentence(options):
    with pytest.raises(ValueError, match=r'^[^\n]{20,300}$') as error:
        check_hooks(hooks(**options))
    assert type(error.value) is ValueError


@pytest.mark.parametrize(
    'options',
    [
        {}, {'target': {'macs': 0.5}}, {'begin': 4, 'end': 0.5}, {'importance': {'type': 'magnitude', 'roles': 'out'}},
        {'importance': {'type': 'curvature', 'step': 1}}, {'at_once': True, 'pictures': 8, 'refit': False},
        {'importance': None, 'normalize': None}, {'curve': 'paper', 'units_per_event': 3},
    ],
    ids=str,
)  # fmt: skip
def test_a_right_one_is_taken(options):
    check_hooks(hooks(**options))


def test_a_name_where_a_list_is_meant_is_that_one():
    assert build_importance({'type': 'magnitude', 'roles': 'out'}, ()).roles == ('out',)
    for name in IMPORTANCES:
        check_importance({'type': name, 'seed': 3})


LOSS_VALUES = {'loss_weight': ['3', None, NAN, True, [1]], 'ignore_index': ['255', 2.5, True]}


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize(('option', 'value'), [(o, v) for o, values in LOSS_VALUES.items() for v in values], ids=str)
def test_a_wrong_value_of_a_loss_is_one_sentence(name, option, value):
    with pytest.raises(ValueError, match=rf'^losses: {name}: {option} is [^\n]*: got '):
        LossConfig.read({'type': name, option: value}).build(torch.nn.Linear(4, 2))


@pytest.mark.parametrize(
    ('loss', 'message'),
    [
        ({'type': 'KDLoss', 'tau': '4'}, "losses: KDLoss: tau is a finite number: got '4'"),
        ({'type': 'KDLoss', 'sigmoid': 'yes'}, "sigmoid is True or False or None: got 'yes'"),
        ({'type': 'CIRKDLoss', 'pixel_queue': 2.5}, 'pixel_queue is an integer: got 2.5'),
        ({'type': 'KDLoss', 'temp': 4}, "unexpected keyword argument 'temp'"),
        ({'type': 5}, 'has no type'),
        ({'type': ''}, 'has no type'),
        ({'tau': 4}, 'has no type'),
        ({'type': 'KDLoss', 'tap': 3}, 'tap of KDLoss is a name or a list of names: got 3'),
        (
            {'type': 'KDLoss', 'teacher_tap': ['fc', 3]},
            r"teacher_tap of KDLoss is a name or a list of names: got \['fc', 3\]",
        ),
        ({'type': 'KDLoss', 'name': 7}, 'name of KDLoss is a name: got 7'),
        (5, 'losses: 5 is no loss; write losses='),
        (None, 'losses: None is no loss; write losses='),
    ],
    ids=str,
)
def test_a_wrong_loss_is_one_sentence(loss, message):
    with pytest.raises(ValueError, match=message):
        LossConfig.read(loss).build(torch.nn.Linear(4, 2))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'teacher': 123}, 'teacher must be .*: 123'),
        ({'teacher': 'other'}, 'teacher must be'),
        ({'teacher': ['self']}, 'teacher must be'),
        ({'teacher': {}}, 'teacher needs config and checkpoint'),
        ({'losses': 5}, 'losses is a list of dicts, got 5; write'),
        ({'losses': [5]}, 'losses: 5 is no loss'),
        ({'losses': {'tau': 4}}, 'has no type'),
        ({'losses': 'KDLos'}, "no loss is called 'KDLos'; near: KDLoss"),
        ({'task_weight': '1'}, "task_weight is a number, 0 or more: got '1'"),
        ({'task_weight': True}, 'task_weight is a number'),
        ({'task_weight': NAN}, 'task_weight is a number'),
        ({'task_weight': None}, 'task_weight is a number'),
        ({'student': 5}, 'student is the config of a model, .*: got 5'),
        ({'student': 'ResNet'}, "student is the config of a model, .*: got 'ResNet'"),
        ({'student': None}, 'student is the config of a model'),
    ],
    ids=str,
)
def test_a_wrong_option_of_the_distiller_is_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        Distiller(**{'student': student(), **options})


def student():
    config = copy.deepcopy(STUDENT)
    config['type'] = 'mmpretrain.ImageClassifier'
    return {**config, '_scope_': 'mmpretrain'}


@pytest.mark.parametrize(
    'losses', ['mmcpd.KDLoss', {'type': 'mmcpd.KDLoss'}, ['KDLoss'], [{'type': 'KDLoss'}]], ids=str
)
def test_one_loss_need_not_be_a_list(losses):
    assert list(Distiller(student(), losses=losses).loss_configs) == ['kd']


def test_no_losses_are_none():
    assert Distiller(student(), losses=None).loss_configs == {}
