"""Plain attributes that refer to a model's tensors or modules refer to those of the slim one."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.compare import compare
from mmcpd.slim.references import Replaced, refer_
from mmcpd.slim.trial import doubled, random_keep

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Pair = namedtuple('Pair', 'name tensor')


@dataclass(frozen=True)
class Held:
    tensor: Tensor


@dataclass(frozen=True, slots=True)
class HeldInASlot:
    tensor: Tensor


class Teacher(nn.Module):
    """A network, and a slow copy of it whose average is taken through plain references to both."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4))
        self.slow = copy.deepcopy(self.net).requires_grad_(False)
        nn.init.normal_(self.slow[0].weight)
        self.refer()

    def refer(self) -> None:
        self.fast_parameters = dict(self.net.named_parameters())
        self.slow_parameters = self.slow.state_dict()  # detached: other objects, the same memory

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def average_(self) -> None:
        for name, slow in self.slow_parameters.items():
            slow.mul_(0.5).add_(self.fast_parameters[name].detach(), alpha=0.5)


class Deep(Teacher):
    """All kinds of places, one inside another."""

    def refer(self) -> None:
        fast, slow = self.net[0].weight, self.slow[0].weight
        self.tree = OrderedDict(a=[(1, {'b': Pair('c', fast)}), {slow}])
        self.by_tensor, self.held, self.slot = {fast: 'group'}, Held(slow), HeldInASlot(fast)
        self.tree['itself'], self.log = self.tree, type('Log', (), {})()
        self.log.pair = (fast, self.net[2].bias)
        self.other = torch.ones(3)

    def average_(self) -> None:
        with torch.no_grad():
            fast, slow = self.tree['a'][0][1]['b'].tensor, self.held.tensor
            assert next(iter(self.tree['a'][1])) is slow and next(iter(self.by_tensor)) is fast is self.slot.tensor
            assert self.log.pair[0] is fast and self.tree['itself'] is self.tree
            slow.mul_(0.5).add_(fast, alpha=0.5)


def both(model: Teacher, x: Tensor) -> list[Tensor]:
    return [model.net(x), model.slow(x)]


@pytest.fixture(params=[Teacher, Deep])
def pair(request):
    torch.manual_seed(0)
    dense = request.param().eval()
    coupling = comb(dense, IMAGES, forward=both)
    assert 'net.0' in [group.name for group in coupling.groups]
    small = slim(dense, coupling, random_keep(coupling, 0.6, 0))
    return dense, small, restructure_(request.param(), structure(dense, small))


def follows(model: Teacher) -> bool:
    """Say whether the slow network takes half of the fast one by the references."""
    fast, slow = (part[0].weight.detach().clone() for part in (model.net, model.slow))
    model.average_()
    return torch.equal(model.slow[0].weight, (slow + fast) / 2) and fast.shape == slow.shape


def test_references_are_to_the_new_tensors(pair):
    dense, small, reloaded = pair
    assert small.net[0].weight.shape < dense.net[0].weight.shape
    assert follows(small) and follows(reloaded) and follows(doubled(dense)) and follows(dense)
    reloaded.load_state_dict(small.state_dict())
    assert torch.equal(reloaded.eval()(IMAGES), small(IMAGES))


def test_a_reference_to_before_would_not_follow(pair):
    *_, reloaded = pair
    stale = type(reloaded)().slow[0].weight.data
    if type(reloaded) is Teacher:
        reloaded.slow_parameters['0.weight'] = stale
        with pytest.raises(RuntimeError, match='size'):
            follows(reloaded)
    else:
        object.__setattr__(reloaded.held, 'tensor', stale)
        with pytest.raises(AssertionError):
            follows(reloaded)


def test_what_does_not_refer_stays_the_same_object(pair):
    model = pair[-1]
    model.plain = (1, [2], {'a': (3,)})
    before = dict(vars(model))
    old = model.net[0].bias
    new = model.net[0].bias = nn.Parameter(old.detach() + 1)
    model.fresh = before['fresh'] = (old, 5)
    refer_(model, [Replaced(old, new)])
    changed = [name for name, value in vars(model).items() if value is not before.get(name)]
    assert changed == ['fresh'] and model.fresh[0] is new


class Attends(nn.Module):
    """Keeps a plain list of its layers, one of which slimming replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)
        self.order = [(self.attention, 'first'), (self.fc, 'second')]

    def forward(self, x: Tensor) -> Tensor:
        for layer, _ in self.order:
            x = layer(x, x, x)[0] if layer is self.attention else layer(x)
        return x


class Recurrent(nn.Module):
    """torch's recurrent layers keep a plain list of their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.cell, self.fc = nn.Linear(5, 10), nn.LSTM(10, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.cell(self.first(x).relu())[0])


@pytest.mark.parametrize(('build', 'width'), [(Attends, 16), (Recurrent, 5)])
def test_lists_of_layers_and_of_weights(build, width):
    x = torch.rand(2, 7, width, dtype=torch.float64)
    dense = build().double().eval()
    coupling = comb(dense, x)
    keep = random_keep(coupling, 0.6, 0)
    small = slim(dense, coupling, keep)
    assert compare(dense, coupling, keep, small) < 1e-12
    twin = restructure_(build().double(), structure(dense, small)).eval()
    twin.load_state_dict(small.state_dict())
    assert torch.equal(twin(x), small(x))
    assert sum(p.numel() for p in twin.parameters()) < sum(p.numel() for p in dense.parameters())
