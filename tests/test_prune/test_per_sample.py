"""Gradients sample by sample: the calls they are read at, and the sums."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmcpd.prune.importance import build_importance
from mmcpd.prune.per_sample import sample_dot
from tests.test_prune.gate_nets import ConvBNReLU, assert_close, built, ones
from tests.test_prune.layer_nets import LAYERS


def test_group_fisher_reads_the_same_calls():
    for cls in LAYERS:
        net, coupling, x, target = built(cls)
        gates = ones(net, len(x))
        loss = F.cross_entropy(net(x, gates), target)
        expected = torch.autograd.grad(loss, list(gates.values()))
        found = build_importance('group_fisher', coupling.groups)
        found.check(net, coupling.example)
        found.attach(net)
        F.cross_entropy(net(x, {}), target).backward()
        found.accumulate(net)
        found.detach()
        assert_close(found.scores(), {n: g.square().sum(0) for n, g in zip(gates, expected, strict=True)})


def test_a_checkpointed_part_is_seen_when_it_runs_again():
    from torch.utils.checkpoint import checkpoint

    net, coupling, x, target = built(ConvBNReLU)
    net.eval()
    found = []
    for reentrant in (None, False, True):
        score_ = build_importance('group_fisher', coupling.groups)
        score_.attach(net)
        y = x.clone().requires_grad_()
        call = (lambda x: net(x, {})) if reentrant is None else (
            lambda x, reentrant=reentrant: checkpoint(net, x, {}, use_reentrant=reentrant))  # fmt: skip
        F.cross_entropy(call(y), target).backward()
        score_.accumulate(net)
        score_.detach()
        found.append(score_.scores())
    assert_close(found[1], found[0])
    assert_close(found[2], found[0])


@pytest.mark.parametrize('shape', [(3, 4), (3, 5, 4), (3, 4, 5, 6), (2, 3, 4, 5, 6)])
def test_sample_dot(shape, monkeypatch):
    monkeypatch.setattr('mmcpd.prune.per_sample._CHUNK', 30)
    torch.manual_seed(0)
    x, g = torch.randn(shape), torch.randn(shape)
    for sample in range(len(shape)):
        for channel in set(range(len(shape))) - {sample}:
            expected = (x * g).movedim((sample, channel), (0, 1)).flatten(2).sum(2) if len(shape) > 2 else (
                x * g if sample == 0 else (x * g).T)  # fmt: skip
            torch.testing.assert_close(sample_dot(x, g, sample, channel), expected)
            torch.testing.assert_close(sample_dot(x, g, None, channel), expected.sum(0, keepdim=True))
    assert sample_dot(x.half(), g.half(), 0, 1).dtype == torch.float32
