"""Combing, comparing and rotating leave a model as it was, whatever its forward writes."""

from __future__ import annotations

import copy
import random
from collections import Counter, OrderedDict, deque
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.example import Example
from mmcpd.random_state import random_state
from mmcpd.rotate import rotate_
from mmcpd.slim import slim
from mmcpd.slim.compare import compare, compare_gradients, gap_between
from mmcpd.slim.copying import copied, restored
from mmcpd.slim.kept_values import _Writes
from mmcpd.slim.trial import disagreement, random_keep

TOKENS = torch.rand(2, 5, 16, generator=torch.Generator().manual_seed(0))


class Writes(nn.Module):
    """An attention whose output depends on how often it ran; `what` names what its forward writes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.qkv, self.last = nn.Linear(16, 16), nn.Linear(16, 48), nn.Linear(16, 4)
        self.table = nn.Embedding(4, 4, max_norm=1e-3 if what == 'renormalised' else None)
        self.slow = nn.Linear(16, 4).requires_grad_(False)
        self.register_buffer('queue', torch.zeros(4, 6))
        self.register_buffer('pointer', torch.zeros(1, dtype=torch.long), persistent=False)
        self.norm, self.what, self.level, self.log = nn.BatchNorm1d(4), what, torch.zeros(4), deque(maxlen=2)
        self.count, self.counts, self.meter = 0, {'all': Counter()}, type('Meter', (), {'total': 0})()
        self.slow_parameters = self.slow.state_dict()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x).relu()).chunk(3, -1)
        y = self.last((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
        return y + self.write(x, y.detach().mean((0, 1)).float()).to(y.dtype)

    def write(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return getattr(self, self.what.replace(' ', '_'))(x, y)

    def queued(self, x: Tensor, y: Tensor) -> Tensor:
        self.queue[:, int(self.pointer)] = y
        self.pointer[0] = (self.pointer + 1) % 6
        return self.queue.sum(1)

    def rebound(self, x: Tensor, y: Tensor) -> Tensor:
        self.queue = torch.cat([self.queue[:, 1:], y[:, None] + 1], 1)
        self.pointer = self.pointer + 1
        return self.queue.sum(1)

    def grown_queue(self, x: Tensor, y: Tensor) -> Tensor:
        self.queue = torch.cat([self.queue, y[:, None] + 1], 1)
        return self.queue.sum(1)

    def another_memory(self, x: Tensor, y: Tensor) -> Tensor:
        self.queue.data = self.queue + 1
        self.slow.weight.data = self.slow.weight + 1
        return self.queue.sum(1) + self.slow.weight.sum(1)

    def statistics(self, x: Tensor, y: Tensor) -> Tensor:
        self.norm.train()(y.expand(3, 4) * torch.tensor([[1.0], [2.0], [3.0]]))
        return self.norm.running_mean

    def averaged(self, x: Tensor, y: Tensor) -> Tensor:
        self.slow.weight.data.mul_(0.5).add_(self.last.weight, alpha=0.5)
        self.slow.bias.lerp_(self.last.bias, 0.5)
        return self.slow(x[0, 0])

    def averaged_by_references(self, x: Tensor, y: Tensor) -> Tensor:
        torch._foreach_add_(list(self.slow_parameters.values()), 1.0)
        return self.slow(x[0, 0])

    def clipped(self, x: Tensor, y: Tensor) -> Tensor:
        self.last.weight.data.mul_(0.9)
        return y

    def renormalised(self, x: Tensor, y: Tensor) -> Tensor:
        return self.table(torch.arange(4)).sum(0)

    def plain(self, x: Tensor, y: Tensor) -> Tensor:
        self.level += 1
        return self.level

    def counted(self, x: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return y.new_full((4,), self.count)

    def counted_inside(self, x: Tensor, y: Tensor) -> Tensor:
        self.counts['all']['forward'] += 1
        self.meter.total += 1
        self.log.append(self.meter.total)
        return y.new_full((4,), self.meter.total)

    def drawn(self, x: Tensor, y: Tensor) -> Tensor:
        self.count += 1
        return torch.rand(4) + random.random() + np.random.rand() + self.count


WHAT = [
    'queued', 'rebound', 'grown queue', 'another memory', 'statistics', 'averaged', 'averaged by references', 'clipped',
    'renormalised', 'plain', 'counted', 'counted inside', 'drawn',
]  # fmt: skip


def built(what: str) -> Writes:
    torch.manual_seed(0)
    model = Writes(what)
    model.last.train()
    return model.train()


def state(model: Writes) -> list[object]:
    """Return everything that a forward could have changed, as plain values and identities."""
    tensors = {n: (id(t), t.tolist()) for n, t in (*model.named_parameters(), *model.named_buffers())}
    modes = [module.training for module in model.modules()]
    plain = [model.count, copy.deepcopy(model.counts), dict(vars(model.meter)), list(model.log), model.level.tolist()]
    numbers = random_state()
    draws = [numbers[0], numbers[1][1].tolist(), numbers[1][2], numbers[2].tolist()]
    memory = [t.data_ptr() for t in (*model.parameters(), *model.buffers())]
    return [tensors, modes, plain, draws, memory, set(vars(model))]


def combing(model: Writes) -> None:
    coupling = comb(model, TOKENS, unused='leave')
    assert 'first' in [group.name for group in coupling.groups] and not coupling.untried, str(coupling)


def comparing(model: Writes) -> None:
    coupling = comb(copy.deepcopy(model), TOKENS, unused='leave')
    before = state(model)
    keep = random_keep(coupling, 0.6, 0)
    small = slim(model, coupling, keep)
    for _ in range(2):  # all comparisons begin with the same values
        assert compare(model, coupling, keep, small) < 1e-6
    assert compare_gradients(model, coupling, keep) < 1e-4
    assert disagreement(model, coupling, lambda net, x: net(x)) is None
    assert state(model) == before


def rotating(model: Writes) -> None:
    twin = copy.deepcopy(model)
    rotations = rotate_(model, TOKENS)
    assert rotations.heads and not [skip for skip in rotations.skipped if 'differ' in skip.reason], str(rotations)
    for rotated, part in zip((model.qkv, model.last), (twin.qkv, twin.last), strict=True):
        with torch.no_grad():
            rotated.weight.copy_(part.weight)
            rotated.bias.copy_(part.bias)


@pytest.mark.parametrize('what', WHAT)
@pytest.mark.parametrize('use', [combing, comparing, rotating])
def test_a_model_is_left_as_it_was(use, what):
    model = built(what)
    before = state(model)
    use(model)
    assert state(model) == before
    model(TOKENS)
    assert state(model) != before


@pytest.mark.parametrize('what', WHAT)
def test_two_comparisons_begin_with_the_same_values(what):
    model = built(what).eval()
    example = Example((TOKENS,), lambda net, x: net(x))
    assert gap_between(model, copied(model), example) == 0.0
    other = copied(model)
    if what not in ('renormalised', 'clipped'):
        other(TOKENS)
        assert gap_between(model, other, example) > 0.0


def test_parameters_are_copied_only_where_they_are_written():
    for what, count in {'plain': 0, 'queued': 0, 'averaged': 2, 'renormalised': 1}.items():
        model = built(what)
        writes = _Writes(list(model.parameters()))
        with torch.no_grad(), writes:
            model(TOKENS)
        assert len(writes.saved) == count, what


class Grows(nn.Module):
    """Makes a layer in the first forward, and notes that it did."""

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.built, self.count = nn.ModuleList([nn.Linear(16, 8)]), False, 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        if not self.built:
            self.parts.append(nn.Linear(8, 4))
            self.built = True
        return self.parts[1](self.parts[0](x).relu())


def test_what_a_first_forward_makes_stays_with_its_note():
    model = Grows()
    with restored(model), torch.no_grad():
        out = model(TOKENS)
    assert model.built and torch.equal(model(TOKENS), out)
    count = model.count
    with restored(model):
        model(TOKENS)
    assert model.count == count


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode, nullcontext])
def test_values_are_put_back_in_each_mode_and_after_an_error(mode):
    model = built('queued')
    before = state(model)
    with pytest.raises(RuntimeError, match='stop'), mode(), restored(model):
        model(TOKENS)
        raise RuntimeError('stop')
    assert state(model) == before


class Frozen(OrderedDict):
    """Settings that cannot be changed."""

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise TypeError('these settings are frozen')

    __setitem__ = __delitem__ = __copy__ = clear = update = pop = setdefault = popitem = _refused

    def __deepcopy__(self, memo: dict[int, Any]) -> Frozen:
        twin = Frozen()
        for name, value in self.items():
            OrderedDict.__setitem__(twin, name, copy.deepcopy(value, memo))
        return twin


class Sealed(list):
    """A list of the same kind."""

    def _refused(self, *_: Any, **__: Any) -> Any:
        raise TypeError('this list is sealed')

    __setitem__ = __delitem__ = __copy__ = clear = extend = append = _refused

    def __deepcopy__(self, memo: dict[int, Any]) -> Sealed:
        return Sealed(copy.deepcopy(list(self), memo))


class Configured(nn.Module):
    def __init__(self, grows: bool) -> None:
        super().__init__()
        self.first, self.last, self.grows = nn.Linear(6, 8), nn.Linear(8, 3), grows
        self.settings, self.names = Frozen(), Sealed(['first'])
        OrderedDict.__setitem__(self.settings, 'width', 8)

    def forward(self, x: Tensor) -> Tensor:
        if self.grows:
            OrderedDict.__setitem__(self.settings, 'seen', x)
            list.append(self.names, 'seen')
        return self.last(self.first(x).softmax(-1))


@pytest.mark.parametrize('grows', [False, True])
def test_containers_that_refuse_to_be_changed_keep_what_they_hold(grows: bool) -> None:
    model, x = Configured(grows), torch.rand(2, 6)
    found = comb(model, x)
    assert [group.units for group in found.groups] == [8]
    for net in (model, slim(model, found, found.keep())):
        assert [*net.settings.items()] == [('width', 8)] and list(net.names) == ['first']


class Stack(list):
    """A list with a method of its own."""

    def push(self, value: Tensor) -> Tensor:
        self.append(value)
        return value


class Stacking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.stack = nn.Linear(6, 8), nn.Linear(8, 3), Stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stack.push(self.first(x)).softmax(-1))


def test_a_list_of_a_class_of_its_own_stays_one() -> None:
    model, x = Stacking(), torch.rand(2, 6)
    found = comb(model, x)
    assert [group.units for group in found.groups] == [8]
    small = slim(model, found, found.keep())
    assert type(small.stack) is type(model.stack) is Stack and not small.stack and not model.stack


class Odd(dict):
    """A dictionary that gives nothing out by name."""

    def __getitem__(self, name: str) -> Any:
        raise LookupError(name)


def test_a_dictionary_with_its_own_way_of_reading_is_read_past_it() -> None:
    model = Stacking()
    model.settings = Odd(width=8)
    with restored(model):
        dict.__setitem__(model.settings, 'seen', 1)
    assert dict.__len__(model.settings) == 1 and dict.get(model.settings, 'width') == 8
