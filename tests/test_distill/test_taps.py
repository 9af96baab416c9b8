"""Taps: what they capture, how a user names them, and what they say about a wrong name."""

import pytest
import torch
from torch import nn

from mmcpd.distill import Taps


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Stages()
        self.head = nn.ModuleDict({'fc': nn.Linear(3, 2)})
        self.idle = nn.Linear(1, 1)

    def forward(self, x):
        return self.head['fc'](self.backbone(x)[-1])


class Stages(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        one = self.one(x)
        return one, self.relu(self.two(one))


def test_outputs_inputs_and_one_of_several():
    net, x = Net(), torch.randn(2, 3)
    with Taps(net, ['head.fc', 'backbone', 'backbone:0', 'head.fc:in', 'backbone:-2']) as taps:
        out = net(x)
    one, last = net.backbone(x)
    assert torch.equal(taps['head.fc'], out) and torch.equal(taps['backbone'], last)
    assert torch.equal(taps['backbone:0'], one) and torch.equal(taps['backbone:-2'], one)
    assert torch.equal(taps['head.fc:in'], last)


def test_gradient_flows_through_a_tap():
    net = Net()
    with Taps(net, ['backbone']) as taps:
        net(torch.randn(2, 3))
    taps['backbone'].sum().backward()
    assert net.backbone.two.weight.grad is not None and net.head['fc'].weight.grad is None


def test_what_works_in_place_afterwards_does_not_change_what_was_seen():
    net, x = Net(), torch.randn(8, 3)
    with Taps(net, ['backbone.two']) as taps:
        net(x)
    assert taps['backbone.two'].min() < 0
    assert torch.equal(taps['backbone.two'], net.backbone.two(net.backbone.one(x)))


def test_run_goes_no_further_than_it_must():
    net = Net()
    calls = []
    net.head['fc'].register_forward_pre_hook(lambda *a: calls.append(1))
    seen = Taps(net, ['backbone:0']).run(torch.randn(2, 3))
    assert seen['backbone:0'].shape == (2, 4) and not calls
    Taps(net, ['backbone:0', 'head.fc']).run(torch.randn(2, 3))
    assert calls == [1]


def test_hooks_are_gone_afterwards_also_after_an_error():
    net = Net()
    with pytest.raises(RuntimeError), Taps(net, ['head.fc', 'head.fc:in']):
        net(torch.randn(2, 7))
    Taps(net, ['backbone']).run(torch.randn(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_of_several_calls_the_first_counts():
    net = nn.Sequential(nn.Linear(3, 3))
    net.append(net[0])
    x = torch.randn(2, 3)
    with Taps(net, ['0']) as taps:
        net(x)
    assert torch.equal(taps['0'], net[0](x))


@pytest.mark.parametrize(
    ('name', 'says'),
    [
        ('head.fcc', r"Net has no module 'head.fcc'; near: head.fc"),
        ('fc', 'near: head.fc'),
        ('', 'has no module'),
        ('backbone:x', "an index into its outputs, or 'in'"),
    ],
)
def test_unknown_names_list_the_near_ones(name, says):
    with pytest.raises(ValueError, match=says):
        Taps(Net(), [name])


@pytest.mark.parametrize(
    ('name', 'says'),
    [('backbone:2', 'gives 2 outputs, there is no output 2'), ('head.fc:0', 'gives one Tensor')],
)
def test_wrong_parts_are_named(name, says):
    with pytest.raises(ValueError, match=says):
        Taps(Net(), [name]).run(torch.randn(2, 3))


def test_a_module_that_does_not_run_is_named():
    with pytest.raises(ValueError, match="did not call 'idle'"):
        Taps(Net(), ['idle']).run(torch.randn(2, 3))


def test_an_output_without_a_tensor_is_named():
    class Dict(nn.Module):
        def forward(self, x):
            return {'x': x}

    with pytest.raises(ValueError, match='no tensor there, but dict'):
        Taps(nn.Sequential(Dict()), ['0']).run(torch.randn(2, 3))
