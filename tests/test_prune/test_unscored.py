"""Groups that get no gradient keep their units, and take part once they have gradients; nothing stops midway."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune.pruner import Pruner
from mmcpd.prune.schedule import Schedule
from mmcpd.slim.compare import compare
from tests.test_prune.test_pruner import batch, built, net, train

READ_GRADIENTS = ['hessian', 'curvature', 'group_fisher']


def freeze(model, name='3', needs=False):
    """Freeze the layer where the gates of group 0 are read."""
    model.get_submodule(name).weight.requires_grad_(needs)
    return model


def whole(pruner, name):
    return bool(pruner.keep[name].all())


@pytest.mark.parametrize('importance', READ_GRADIENTS)
def test_a_frozen_group_is_left_alone_and_the_others_meet_the_target(importance):
    model, optimizer, pruner = built(model=freeze(net()), importance=importance)
    assert pruner.left_alone == {'0': 'requires_grad=False on 3.weight'}
    train(model, optimizer, pruner, 0, 16)
    assert whole(pruner, '0') and not whole(pruner, '3') and pruner.left()['macs'] <= 0.5
    model.eval()
    assert compare(model, pruner.coupling, pruner.keep) < 1e-12
    free, optimizer, other = built(importance=importance)
    train(free, optimizer, other, 0, 16)
    assert other.left_alone == {} and not whole(other, '0')


@pytest.mark.parametrize('importance', ['magnitude', 'random', 'gauss_newton'])
def test_a_score_that_reads_no_gradient_of_a_weight_takes_frozen_groups_too(importance):
    model, optimizer, pruner = built(model=freeze(net()), importance=importance, target={'units': 0.3})
    train(model, optimizer, pruner, 0, 16)
    assert pruner.left_alone == {} and not whole(pruner, '0')


@pytest.mark.parametrize('importance', READ_GRADIENTS)
def test_what_frozen_groups_put_out_of_reach_is_refused_with_the_cure(importance):
    message = (
        r'macs cannot go down to 0\.0500 of the dense model, only to 0\.\d+: the groups 0 get no gradient '
        r"\(requires_grad=False on 3\.weight.*Raise the target, train these layers.*importance='magnitude'"
    )
    with pytest.raises(PruneError, match=message):
        built(model=freeze(net()), importance=importance, target={'macs': 0.05})
    with pytest.raises(PruneError, match=r'only to 1\.0000: the groups 0, 3 get no gradient'):
        built(model=freeze(freeze(net()), '7'), importance=importance)
    built(importance=importance, target={'macs': 0.05})  # nothing else is in the way


@pytest.mark.parametrize('importance', READ_GRADIENTS)
def test_a_group_that_is_unfrozen_later_joins_at_the_next_whole_interval(importance):
    model, optimizer, pruner = built(model=freeze(net()), importance=importance, begin=0)
    train(model, optimizer, pruner, 0, 3)
    freeze(model, needs=True)  # between the events at 2 and 4
    train(model, optimizer, pruner, 3, 4)
    assert whole(pruner, '0') and pruner.left_alone.keys() == {'0'}, 'scored over one of two iterations'
    train(model, optimizer, pruner, 4, 12)
    assert not whole(pruner, '0') and pruner.left_alone == {} and pruner.left()['macs'] <= 0.5


def test_what_is_unfrozen_before_pruning_begins_takes_part_from_the_start():
    model, optimizer, pruner = built(model=freeze(net()))
    freeze(model, needs=True)
    train(model, optimizer, pruner, 0, 4)
    assert pruner.left_alone == {} and not whole(pruner, '0')


@pytest.mark.parametrize('importance', READ_GRADIENTS)
def test_a_group_that_is_frozen_midway_keeps_what_it_has_and_the_rest_goes_as_far_as_it_can(importance):
    model, optimizer, pruner = built(importance=importance, begin=0, target={'macs': 0.05})
    train(model, optimizer, pruner, 0, 4)
    before = pruner.keep['0'].clone()
    assert not before.all()
    freeze(model)
    train(model, optimizer, pruner, 4, 12)
    assert torch.equal(pruner.keep['0'], before) and pruner.done and pruner.left_alone.keys() == {'0'}
    assert int(pruner.keep['3'].sum()) == 1 and pruner.left()['macs'] > 0.05
    freeze(freeze(model, '7'), '3')  # nothing is left to score
    train(model, optimizer, pruner, 12, 14)
    model.eval()
    assert compare(model, pruner.coupling, pruner.keep) < 1e-12


class Spare(nn.Module):
    """Two branches of which the loss may use one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.used = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 4, 1))
        self.spare = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1))

    def forward(self, x):
        return self.used(x), self.spare(x)


@pytest.mark.parametrize('how', ['no gradient', 'a gradient of zeros'])
def test_a_group_that_takes_no_part_in_the_loss_is_left_alone(how):
    model = Spare().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    coupling = comb(model, batch(0)[0][:1])
    pruner = Pruner(model, coupling, optimizer, Schedule({'units': 0.6}, begin=0, end=8, interval=2))
    for iteration in range(8):
        optimizer.zero_grad()
        (x, y), spare = batch(iteration), 0.0 if how == 'a gradient of zeros' else None
        used, other = model(x)
        loss = F.cross_entropy(used.mean((2, 3)), y)
        (loss if spare is None else loss + spare * other.sum()).backward()
        optimizer.step()
        pruner.step()
    assert pruner.left_alone == {'spare.0': 'no gradient arrived'}
    assert whole(pruner, 'spare.0') and pruner.left()['units'] <= 0.6


def test_a_resumed_run_leaves_alone_what_the_whole_run_did():
    def run(stop):
        model, optimizer, pruner = built(model=freeze(net()), begin=0)
        train(model, optimizer, pruner, 0, 3)
        if stop:  # between two events: what was frozen in this interval is part of the state
            states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, pruner)]
            freeze(model, needs=True)
            model, optimizer, pruner = built(model=net(), begin=0)
            for part, state in zip((model, optimizer, pruner), states, strict=True):
                part.load_state_dict(state)
        freeze(model, needs=True)
        train(model, optimizer, pruner, 3, 4)
        return pruner

    assert run(True).left_alone.keys() == run(False).left_alone.keys() == {'0'}


def test_a_copy_that_is_no_copy_is_refused_and_one_is_masked_at_each_event():
    model, optimizer, pruner = built()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=r'Linear is no copy of the model that is pruned: 0\.weight does not fit'):
        pruner.also_mask(nn.Linear(2, 2))
    pruner.also_mask(twin)
    train(model, optimizer, pruner, 0, 8)
    twin.eval()
    assert not whole(pruner, '0') and compare(twin, pruner.coupling, pruner.keep) < 1e-12
    stranger = net().eval()
    assert compare(stranger, pruner.coupling, pruner.keep) > 1e-6 or stranger[0].weight[~pruner.keep['0']].any()


def test_buffers_and_parameters_that_were_replaced_are_masked():
    model, optimizer, pruner = built()
    train(model, optimizer, pruner, 0, 6)
    gone = ~pruner.keep['0']
    assert gone.any()
    model[1].running_mean = torch.ones_like(model[1].running_mean)  # as hooks that recompute statistics do
    model[1].running_var = torch.ones_like(model[1].running_var)
    model[1].weight = nn.Parameter(torch.ones_like(model[1].weight))
    pruner.mask_()
    assert not model[1].running_mean[gone].any() and not model[1].running_var[gone].any()
    assert not model[1].weight[gone].any() and model[1].weight[~gone].all() and model[1].running_mean[~gone].all()
    model[1].running_mean = torch.ones_like(model[1].running_mean)
    pruner.step()
    assert not model[1].running_mean[gone].any(), 'at the end of each iteration'
