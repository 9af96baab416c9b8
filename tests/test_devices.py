"""Combing, masking and slimming on another device: emulated where there is none, and with mixed precision on CUDA."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from mmcpd.comb import comb
from mmcpd.prune import Pruner, Schedule, normalize, score, select
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from mmcpd.slim.mask import MaskedForward
from mmcpd.slim.trial import in_double, random_keep
from tests.fake_device import DEVICE, Device, OnDevice, moved
from tests.helpers import CONTROL, EXACT, check_equal, gap, randomise_

emulated = pytest.mark.skipif(
    not hasattr(torch._C, '_ensureCUDADeviceGuardSet'), reason='torch 2.4 asks CUDA for the device that is emulated'
)


class Positions(nn.Module):
    """Tokens with a table of positions that an index picks from, a gathered order, a mask, and norms over channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.q, self.groups, self.fc2 = nn.Linear(8, 12), nn.GroupNorm(1, 12), nn.Linear(12, 5)
        self.table = nn.Parameter(torch.randn(9, 8))
        self.register_buffer('index', torch.randint(9, (2, 2)))
        self.register_buffer('order', torch.tensor([2, 0, 3, 1]))
        self.register_buffer('off', torch.tensor([False, True, False, False]))

    def forward(self, x):
        x = self.fc1(x) + self.table[self.index.view(-1)].view(2, 2, 8).flatten(0, 1)
        x = self.norm(x.index_select(1, self.order)).masked_fill(self.off[:, None], 0.0)
        x = self.groups(self.q(x).relu().mT).mT
        return self.fc2(x[:, self.order[:2]]).mean(1)


class Attends(nn.Module):
    """A forward that divides by the square root of its own width, so that slimming scales rows of the queries."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj, self.fc = nn.Linear(6, 24), nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.fc(x.mean(1))


class Gated(nn.Module):
    """Convolutions with norms of batches and of groups, a gate per channel, a weight norm, and a packed attention."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv1d(4, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.gate, self.groups = nn.Conv1d(12, 12, 1), nn.GroupNorm(3, 12)
        self.depth = nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.back = weight_norm(nn.Conv1d(12, 8, 1))
        self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.conv(x)).relu()
        x = self.groups(self.depth(x * self.gate(x.mean(2, keepdim=True)).sigmoid()))
        x = self.back(x).mT
        return self.fc((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def inputs():
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@emulated
def test_devices_may_not_meet_in_the_emulation():
    with Device(), pytest.raises(RuntimeError, match='on the same device: add'):
        OnDevice(torch.ones(2)) + torch.ones(2)
    with Device() as device:
        assert (OnDevice(torch.ones(2)) + torch.ones(2).to(DEVICE)).device == DEVICE
    assert device.copies == 1


@emulated
def test_a_model_whose_index_is_on_another_device_is_combed_there_as_on_the_cpu():
    model, x = randomise_(Positions()), inputs()
    coupling = comb(model, x)
    check_equal(model, coupling)
    with Device():
        there, y = moved(copy.deepcopy(model)), OnDevice(x)
        found = comb(there, y)
        assert [(g.name, g.units) for g in found.groups] == [(g.name, g.units) for g in coupling.groups] != []
        for ours, theirs in zip(coupling.groups, found.groups, strict=True):
            assert [(m.tensor, m.dim) for m in ours.members] == [(m.tensor, m.dim) for m in theirs.members]
            assert all(torch.equal(a.index, b.index) for a, b in zip(ours.members, theirs.members, strict=True))
        keep = random_keep(coupling, 0.5, 0)
        assert compare(there, found, keep) < EXACT
        mask_(there, found, keep)
        assert all(tensor.device == DEVICE for tensor in slim(there, found, keep).state_dict().values())
        out = there(y).inner
        scores = score(there, found, [y], importance='magnitude')
        chosen = select(normalize(scores, found, found.keep(), by='macs'), found, found.keep(), {'macs': 0.5})
    assert not all(bool(kept.all()) for kept in chosen.values())
    mask_(model, coupling, keep)
    assert gap(model(x), out) < EXACT


@emulated
@pytest.mark.parametrize('net', [Attends, Gated])
def test_nothing_of_ours_stays_on_the_cpu(net):
    model, x = randomise_(net()), inputs()
    coupling = comb(model, x)
    assert coupling.groups
    keep = random_keep(coupling, 0.5, 0)
    with Device():
        there, y = moved(copy.deepcopy(model)), OnDevice(x)
        found = comb(there, y)
        assert [(g.name, g.units) for g in found.groups] == [(g.name, g.units) for g in coupling.groups]
        assert not [frozen for frozen in found.frozen if 'trial' in frozen.reason]
        assert compare(there, found, keep) < EXACT
        turned = {name: kept.roll(1) for name, kept in keep.items()}
        assert compare(there, found, keep, slim(there, found, turned)) > CONTROL


@emulated
def test_the_index_of_a_masked_norm_is_copied_once_and_follows_the_model():
    model, x = randomise_(Positions()), inputs()
    coupling = comb(model, x)
    keep = random_keep(coupling, 0.5, 0)
    mask_(model, coupling, keep)
    assert isinstance(vars(model.norm)['forward'], MaskedForward) and not any('kept' in n for n in model.state_dict())
    expected = model(x)
    with Device() as device:
        moved(model)
        assert gap(expected, model(OnDevice(x)).inner) < EXACT
        first = device.copies
        for _ in range(3):
            model(OnDevice(x))
        assert first == 2 and device.copies == first, 'one copy for each of the two norms'


class NoDouble(torch.Tensor):
    """A tensor of a device without float64."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.double:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func is torch.Tensor.cpu else out


def test_scores_of_a_device_without_float64_are_widened_on_the_cpu():
    coupling = comb(randomise_(Positions()), inputs())
    raw = {group.name: torch.rand(group.units) for group in coupling.groups}
    there = {name: each.as_subclass(NoDouble) for name, each in raw.items()}
    with pytest.raises(TypeError, match='MPS'):
        next(iter(there.values())).double()
    for by in ('macs', 'none'):
        ours, theirs = (normalize(scores, coupling, coupling.keep(), by=by) for scores in (raw, there))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (select(scores, coupling, coupling.keep(), {'macs': 0.5}) for scores in (raw, there))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# -- with a CUDA device ------------------------------------------------------------------------------------------------
@pytest.mark.cuda
def test_combing_masking_and_slimming_on_cuda():
    model, x = randomise_(Positions()).cuda(), inputs().cuda()
    coupling = comb(model, x)
    check_equal(model, coupling)


@pytest.mark.cuda
@pytest.mark.parametrize('importance', ['hessian', 'curvature', 'group_fisher', 'magnitude'])
def test_pruning_with_mixed_precision_on_cuda(importance):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    ).cuda()  # fmt: skip
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), torch.amp.GradScaler('cuda')
    coupling = comb(model, torch.rand(1, 3, 8, 8).cuda())
    pruner = Pruner(model, coupling, optimizer, Schedule({'macs': 0.5}, 0, 12, 2), importance=importance)

    def loss(iteration):
        x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(iteration)).cuda()
        with torch.autocast('cuda'):
            return F.cross_entropy(model(x), torch.arange(8).cuda() % 4)

    for iteration in range(14):
        optimizer.zero_grad()
        scaler.scale(loss(iteration)).backward()
        scaler.unscale_(optimizer)
        pruner.loss_scale = scaler.get_scale()
        pruner.closure = lambda iteration=iteration: loss(iteration).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
    assert pruner.left()['macs'] <= 0.5
    twin, example = in_double(model, coupling.example)
    assert compare(twin, replace(coupling, example=example), pruner.keep) < EXACT


@pytest.mark.cuda
def test_one_process_with_nccl(tmp_path):
    torch.distributed.init_process_group('nccl', init_method=f'file://{tmp_path}/meet', rank=0, world_size=1)
    try:
        model, x = randomise_(Positions()).cuda(), inputs().cuda()
        scores = score(model, comb(model, x), [x])
        assert all(bool(torch.isfinite(each).all()) for each in scores.values())
    finally:
        torch.distributed.destroy_process_group()
