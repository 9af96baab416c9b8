"""What is not finite is named, stops pruning before anything is masked, and is told from what is merely skipped."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune import Pruner, Schedule, score
from mmcpd.prune.finite import FiniteWatch, broken_tensor
from tests.test_prune.test_pruner import batch, built, net, train


def spoilt(model, name, value=torch.nan):
    with torch.no_grad():
        dict([*model.named_parameters(), *model.named_buffers()])[name].view(-1)[0] = value
    return model


@pytest.mark.parametrize('importance', ['hessian', 'magnitude', 'random', 'gauss_newton'])
@pytest.mark.parametrize(
    ('name', 'value'), [('3.weight', torch.nan), ('0.bias', torch.inf), ('1.running_var', torch.nan)]
)
def test_pruning_does_not_begin_on_weights_that_are_not_finite(importance, name, value):
    model, optimizer, pruner = built(importance=importance, begin=2)
    train(model, optimizer, pruner, 0, 1)
    spoilt(model, name, value)
    with pytest.raises(
        PruneError, match=rf'^{name} is not finite after 2 iterations, and no unit .*: lower the learning'
    ):
        train_without_step(pruner)
    assert all(bool(kept.all()) for kept in pruner.keep.values())
    with pytest.raises(PruneError, match=rf'^{name} is not finite, and no unit'):
        built(model=spoilt(net(), name, value), importance=importance, begin=0)


def train_without_step(pruner):
    pruner.step()


def test_buffers_may_hold_infinities_on_purpose():
    model = net()
    model.register_buffer('mask', torch.full((2, 2), -torch.inf))
    assert broken_tensor(model) is None
    model.mask[0, 0] = torch.nan
    assert broken_tensor(model) == 'mask'


def test_the_first_interval_that_is_skipped_is_said_with_iteration_and_tensor():
    model, optimizer, pruner = built(begin=0)
    train(model, optimizer, pruner, 0, 2)
    assert pruner.waits == '' and pruner.left()['macs'] < 1
    left, said = pruner.left(), []
    for iteration in range(2, 8):
        optimizer.zero_grad()
        x, y = batch(iteration)
        F.cross_entropy(model(x), y).backward()
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        if iteration < 6:
            model.get_parameter('3.weight').grad[1] = torch.nan
        optimizer.step()
        if iteration < 6:
            model.load_state_dict(before[0])  # a step that a user takes back
            optimizer.load_state_dict(before[1])
        pruner.step()
        said.append(pruner.waits)
        if iteration < 6:
            assert pruner.left() == left
    expected = (
        'no unit is removed at iteration 4, and nothing was scored since 2: the gradient of 3.weight is not finite.'
    )
    assert said[0] == '' and said[1].startswith(expected) and said[1:4] == [said[1]] * 3
    assert said[4:] == ['', ''] and pruner.left() != left


def test_steps_that_mixed_precision_skips_are_said_otherwise():
    model, optimizer, pruner = built(begin=0)
    train(model, optimizer, pruner, 0, 2)
    pruner.step()
    pruner.step()
    assert 'nothing was scored since 2: no step was taken, as where mixed precision finds' in pruner.waits
    train(model, optimizer, pruner, 4, 5)
    assert pruner.waits == ''


def test_a_score_of_weights_that_are_not_finite_names_the_weight():
    model, _, pruner = built(begin=0, importance='magnitude')
    spoilt(model, '3.weight')
    pruner.step()
    pruner.step()
    assert '3.weight is not finite' in pruner.waits


def test_since_when_the_losses_are_not_finite():
    watch, nan = FiniteWatch(), torch.tensor(torch.nan)
    assert watch.since is None
    for iteration, loss in enumerate([1.0, torch.nan, 2.0, torch.inf, torch.nan], 1):
        watch.see(iteration, {'loss': torch.tensor(loss), 'name': 'x', 'count': torch.tensor(3)})
        assert watch.since == {1: None, 2: 2, 3: None, 4: 4, 5: 4}[iteration]
    watch.see(6, None)
    watch.see(7, {})
    assert watch.since == 4
    watch.see(8, {'loss': torch.tensor(1.0), 'other': nan})
    assert watch.since == 4


class Branches(nn.Module):
    """A branch that is used, and one that takes no part in the outputs' gradient in one of several ways."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.used = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1))
        self.spare = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))
        self.gamma = nn.Parameter(torch.zeros(1) if how == 'starts at zero' else torch.ones(1))
        if how == 'dead':
            nn.init.constant_(self.spare[0].bias, -100.0)

    def forward(self, x):
        return self.used(x) + self.gamma * self.spare(x)


@pytest.mark.parametrize('how', ['dead', 'starts at zero'])
@pytest.mark.parametrize('importance', ['hessian', 'curvature', 'gauss_newton'])
def test_a_group_without_a_gradient_throughout_keeps_its_units_and_is_named(how, importance):
    def run(how):
        model = Branches(how).double()
        model.gamma.requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        coupling = comb(model, batch(0)[0][:1])
        pruner = Pruner(model, coupling, optimizer, Schedule({'units': 0.7}, 0, 8, 2), importance=importance)

        def outputs():
            return [model(batch(iteration)[0])]

        def again():
            optimizer.zero_grad()
            x, y = batch(iteration)
            F.cross_entropy(model(x).mean((2, 3)), y).backward()

        pruner.closure = outputs if importance == 'gauss_newton' else again
        for iteration in range(8):  # noqa: B007 - the closures read it
            again()
            optimizer.step()
            pruner.step()
        return pruner

    pruner = run(how)
    silent = {'gauss_newton': 'no output depends on it'}.get(importance, 'no gradient arrived')
    assert pruner.left_alone == {'spare.0': silent}
    assert bool(pruner.keep['spare.0'].all()) and pruner.left()['units'] <= 0.7
    assert not bool(run('alive').keep['spare.0'].all())


def test_one_unit_without_a_gradient_among_others_goes_first():
    model = Branches('alive').double()
    nn.init.constant_(model.spare[0].bias[2:3], -100.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, comb(model, batch(0)[0][:1]), optimizer, Schedule({'units': 0.95}, 0, 2, 2))
    for iteration in range(2):
        optimizer.zero_grad()
        x, y = batch(iteration)
        F.cross_entropy(model(x).mean((2, 3)), y).backward()
        optimizer.step()
        pruner.step()
    assert pruner.left_alone == {} and not bool(pruner.keep['spare.0'][2])


def test_pictures_and_weights_that_are_not_finite_are_refused_at_once():
    model, pictures = net().eval(), [torch.rand(4, 3, 8, 8).double() for _ in range(3)]
    coupling = comb(model, pictures[0][:1])
    score(model, coupling, pictures)
    pictures[1][2, 0, 3, 3] = torch.nan
    with pytest.raises(PruneError, match=r'^picture 2 of batch 1 \(from 0\) is not finite'):
        score(model, coupling, pictures)
    with pytest.raises(PruneError, match=r'^3\.weight is not finite'):
        score(spoilt(model, '3.weight'), coupling, pictures[:1], importance='magnitude')
