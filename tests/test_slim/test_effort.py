"""Masking, slimming and comparing do nothing twice."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from mmcpd import nested
from mmcpd.comb import comb
from mmcpd.example import Example
from mmcpd.slim import mask_, slim, slimming
from mmcpd.slim.call_sites import Rewrite, rewrite_, rewrites_of
from mmcpd.slim.compare import compare, gap_between
from mmcpd.slim.copying import copied, restored
from mmcpd.slim.kept_values import values_kept
from mmcpd.slim.mask import Masker
from mmcpd.slim.trial import random_keep, randomised

TOKENS = torch.rand(2, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
DEPTHS: list[int] = []  # how many modes saw each forward


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 3, C // 3).permute(2, 0, 3, 1, 4)
        return x + self.proj(((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = nn.Linear(4, 12), Attend(), Attend(), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(self.a(self.stem(x))))


class Writes(nn.Module):
    """It gives out the buffer that it writes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, dtype=torch.float64)
        self.register_buffer('queue', torch.zeros(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        DEPTHS.append(len(_get_current_dispatch_mode_stack()))
        return self.queue.add_(self.fc(x).detach().mean((0, 1)))


class Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func._schema.name.removeprefix('aten::')] += 1
        return func(*args, **(kwargs or {}))


def pruned():
    torch.manual_seed(0)
    model = Blocks().double().eval()
    found = comb(model, TOKENS)
    return model, found, random_keep(found, 0.5, 0, awkward=True)


def test_a_mask_writes_each_row_once():
    model, found, keep = pruned()
    with Counted() as counted:
        mask_(model, found, keep)
    assert counted.calls['index_fill_'] and not counted.calls['mul_']
    masker = Masker(model, found)
    for fills, products in ((True, False), (False, True)):  # a keep that is not new is a product
        with Counted() as counted, torch.no_grad():
            masker.fill_(keep) if fills else masker.apply_(keep)
        assert bool(counted.calls['index_fill_']) == fills and bool(counted.calls['mul_']) == products


def test_only_what_was_written_is_put_back():
    layer = nn.Linear(3, 3)
    layer.weight.data = torch.full((3, 3), float('nan'))  # equal to nothing
    before = layer.weight._version
    with values_kept(layer):
        layer(torch.rand(2, 3))
    assert layer.weight._version == before
    with values_kept(layer):
        layer.weight.detach().zero_()
    assert layer.weight._version > before and bool(layer.weight.isnan().all())


def test_blocks_with_the_same_sizes_in_their_source_share_a_class():
    model, found, keep = pruned()
    small = slim(model, found, keep)
    assert type(small.a) is type(small.b) is not Attend
    assert compare(model, found, keep, small) < 1e-12
    assert type(slim(model, found, found.keep()).a) is Attend
    shared = rewrites_of(small.b)
    other = Rewrite('forward', shared[0].text, 2, shared[0].count, 3)
    rewrite_(small.a, [other])
    assert other in rewrites_of(small.a) and rewrites_of(small.b) == shared


def test_each_of_two_models_runs_under_its_own_modes():
    model, example = Writes().eval(), Example((TOKENS,), lambda net, x: net(x))
    DEPTHS.clear()
    gap_between(model, copied(model), example)
    assert DEPTHS == [1, 1]
    with restored(model):
        gap_between(model, copied(model), example)
    assert DEPTHS == [1, 1, 2, 2]


def test_an_output_is_compared_as_it_was_before_the_buffer_it_lies_in_was_put_back():
    model, example = Writes().eval(), Example((TOKENS,), lambda net, x: net(x))
    twin = copied(model)
    assert gap_between(model, twin, example) == 0.0
    nn.init.ones_(twin.fc.weight)
    assert gap_between(model, twin, example) > 0.0
    assert not model.queue.any() and not twin.queue.any()


def test_random_weights_do_not_depend_on_the_order_in_memory():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    last = copied(model).to(memory_format=torch.channels_last)
    plain, other = randomised(model), randomised(last)
    assert plain[0].weight.stride() != other[0].weight.stride()
    assert torch.equal(plain[0].weight, other[0].weight) and not torch.equal(plain[0].weight, model[0].weight)


class Configured(Blocks):
    """Each of its modules keeps the configuration of the whole, as models of some libraries do, and a long table."""

    def __init__(self) -> None:
        super().__init__()
        config = SimpleNamespace(labels={number: str(number) for number in range(5000)})
        for module in self.modules():
            module.config, module.table = config, list(range(5000))


def test_what_modules_keep_beside_tensors_is_not_looked_through_entry_by_entry(monkeypatch):
    seen: Counter[str] = Counter()

    def counted(name: str, function):
        def call(*args):
            seen[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(nested, '_visit', counted('entries', nested._visit))
    monkeypatch.setattr(slimming, 'followed', counted('integers', slimming.followed))
    model = Configured().double().eval()
    found = comb(model, TOKENS)
    slim(model, found, random_keep(found, 0.5, 0))
    assert 0 < seen['entries'] < 5000 and seen['integers'] < 100, seen
    monkeypatch.setattr(nested, '_PLAIN', ())
    comb(model, TOKENS)
    assert seen['entries'] > 100_000, 'the control'
