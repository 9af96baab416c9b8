"""The whole chain without training runs on the device of the model, and computes there what it computes on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.prune import normalize, score, select
from mmcpd.refit import absorb_, refit
from mmcpd.rotate import rotate_
from mmcpd.slim import slim
from mmcpd.slim.compare import compare
from tests.helpers import CONTROL, EXACT, gap, randomise_, sample


class Net(nn.Module):
    """Convolutions with norms around a sum, a depthwise and a transposed one, attention, and a table of positions."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv1, self.bn1 = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.depth, self.conv2 = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 16, 1, bias=False)
        self.bn2, self.up = nn.BatchNorm2d(16), nn.ConvTranspose2d(16, 16, 2, 2)
        self.table = nn.Parameter(torch.zeros(1, 64, 16))
        self.norm, self.attention = nn.LayerNorm(16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = self.bn0(self.stem(x)).relu()
        x = x + self.bn2(self.conv2(self.depth(self.bn1(self.conv1(x)).relu()).relu()))
        x = self.up(nn.functional.max_pool2d(x, 2)).flatten(2).mT + self.table
        y = self.norm(x)
        return self.fc((x + self.attention(y, y, y, need_weights=False)[0]).mean(1))


def pruned(device):
    """Return what each step of the chain gives on a device, on the CPU."""
    torch.manual_seed(0)
    model, batches = randomise_(Net()).to(device), [x.to(device) for x in sample((8, 3, 8, 8)).split(4)]
    dense = copy.deepcopy(model)
    coupling = comb(model, batches[0][:1])
    rotations = rotate_(model, batches[0][:1])
    assert rotations.heads == 2 and gap(dense(batches[0]), model(batches[0])) < EXACT
    scores = score(model, coupling, batches)
    # The score draws on the device, where random numbers are others: units are chosen by what does not depend on it.
    assert all(found.device.type == device and bool((found > 0).any()) for found in scores.values())
    even = normalize(score(model, coupling, batches, importance='magnitude'), coupling, coupling.keep(), by='macs')
    keep = select(even, coupling, coupling.keep(), {'macs': 0.5}, round_to=1)
    done = refit(model, coupling, keep, batches)
    assert done.report.refitted_distance < 0.5 * done.report.masked_distance and not done.report.undone
    out = done.model(batches[0])
    assert len(absorb_(done.model, batches).rewritten) == 3
    assert gap(out, done.model(batches[0])) < EXACT and gap(out, model(batches[0])) > CONTROL
    assert compare(done.model, coupling, keep) < EXACT
    small = slim(done.model, coupling, keep)
    assert all(tensor.device.type == device for tensor in small.state_dict().values())
    chosen = select(normalize(scores, coupling, coupling.keep(), by='macs'), coupling, coupling.keep(), {'macs': 0.5})
    assert not all(bool(kept.all()) for kept in chosen.values())
    return keep, small(batches[0]).detach().cpu()


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_the_chain_runs_on_a_device(device):
    keep, out = pruned(device)
    expected_keep, expected = pruned('cpu')
    assert all(torch.equal(kept, expected_keep[name]) for name, kept in keep.items())
    assert gap(expected, out) < 1e-6
