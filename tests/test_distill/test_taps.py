"""Taps: what they capture, how a user names them, and what they say about a wrong name."""

import pytest
import torch
from torch import nn

from mmcpd.distill import Taps, expanded


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
    assert torch.equal(taps['head.fc'][0], out) and torch.equal(taps['backbone'][0], last)
    assert torch.equal(taps['backbone:0'][0], one) and torch.equal(taps['backbone:-2'][0], one)
    assert torch.equal(taps['head.fc:in'][0], last)
    assert {len(taps[name]) for name in taps.taps} == {1}


def test_gradient_flows_through_a_tap():
    net = Net()
    with Taps(net, ['backbone']) as taps:
        net(torch.randn(2, 3))
    taps['backbone'][0].sum().backward()
    assert net.backbone.two.weight.grad is not None and net.head['fc'].weight.grad is None


def test_what_works_in_place_afterwards_does_not_change_what_was_seen():
    net, x = Net(), torch.randn(8, 3)
    with Taps(net, ['backbone.two']) as taps:
        net(x)
    [seen] = taps['backbone.two']
    assert seen.min() < 0
    assert torch.equal(seen, net.backbone.two(net.backbone.one(x)))


def test_run_goes_no_further_than_to_the_outputs_that_are_known():
    net = Net()
    calls = []
    net.head['fc'].register_forward_pre_hook(lambda *a: calls.append(1))
    Taps(net, ['backbone:0']).run(torch.randn(2, 3))
    assert calls == [1], 'the module may run again'
    seen = Taps(net, ['backbone:0']).run(torch.randn(2, 3), outputs={'backbone:0': 1})
    assert seen['backbone:0'][0].shape == (2, 4) and calls == [1]
    Taps(net, ['backbone:0', 'head.fc']).run(torch.randn(2, 3), outputs={'backbone:0': 1, 'head.fc': 1})
    assert calls == [1, 1]


def test_what_fails_after_the_taps_is_a_warning_and_before_it_an_error(caplog):
    net = Net()
    net.head['fc'].weight = None
    assert Taps(net, ['backbone']).run(torch.randn(2, 3))['backbone'][0].shape == (2, 3)
    assert 'Net fails after its taps backbone (x1), what they have seen is taken: TypeError: ' in caplog.text
    with pytest.raises(TypeError):
        Taps(net, ['backbone', 'head.fc']).run(torch.randn(2, 3))


def test_no_memory_left_is_an_error_wherever_it_is(monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError('no memory')

    net = Net()
    monkeypatch.setattr(net.head['fc'], 'forward', full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        Taps(net, ['backbone']).run(torch.randn(2, 3))


def test_hooks_are_gone_afterwards_also_after_an_error():
    net = Net()
    with pytest.raises(RuntimeError), Taps(net, ['head.fc', 'head.fc:in']):
        net(torch.randn(2, 7))
    Taps(net, ['backbone']).run(torch.randn(2, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


class Pyramid(nn.Module):
    """Give three maps of one width, each run through the same two layers."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 4, 3, 2**n, 1), nn.ReLU()) for n in range(3))
        self.shared, self.classes = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        maps = self.neck(x)
        return [self.classes(self.shared(each).relu()) for each in maps], maps

    def neck(self, x):
        return tuple(level(x) for level in self.levels)


def test_a_layer_that_runs_once_per_level_has_an_output_for_each_in_order():
    net, x = Pyramid(), torch.randn(1, 3, 8, 8)
    with Taps(net, ['classes', 'shared:in']) as taps:
        classes, maps = net(x)
    assert [tuple(seen.shape[2:]) for seen in taps['classes']] == [(8, 8), (4, 4), (2, 2)]
    assert all(torch.equal(a, b) for a, b in zip(taps['classes'], classes, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(taps['shared:in'], maps, strict=True))
    assert not torch.equal(taps['classes'][0], taps['shared:in'][0][:, :2])
    known = Taps(net, ['shared']).run(x, outputs={'shared': 2})
    assert len(known['shared']) == 2, 'it stops there'


def test_a_tap_takes_all_outputs_of_a_module_or_one():
    net, x = nn.Sequential(Pyramid()), torch.randn(1, 3, 8, 8)
    with Taps(net, ['0:*', '0:1']) as taps, pytest.raises(ValueError, match="'0' has no tensor there"):
        net(x)
    with Taps(net, ['0:*']) as taps:
        classes, maps = net(x)
    assert all(torch.equal(a, b) for a, b in zip(taps['0:*'], (*classes, *maps), strict=True))


def test_patterns_name_the_modules_of_one_depth_in_order():
    net = Pyramid()
    assert expanded('levels.*', net) == ['levels.0', 'levels.1', 'levels.2']
    assert expanded('levels.*.0:in', net) == ['levels.0.0:in', 'levels.1.0:in', 'levels.2.0:in']
    assert expanded('*s', net) == ['levels', 'classes'] and expanded('shared', net) == ['shared']
    with pytest.raises(ValueError, match=r'no module of Pyramid is like it; near: .*levels'):
        expanded('level.*', net)


@pytest.mark.parametrize(
    ('name', 'says'),
    [
        ('head.fcc', r"Net has no module 'head.fcc'; near: head.fc"),
        ('fc', 'near: head.fc'),
        ('', 'has no module'),
        ('backbone:x', "an index into its outputs, '\\*' or 'in'"),
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
