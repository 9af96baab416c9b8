"""Scoring leaves no trace, serves a pruner, and is the same for all processes."""

from __future__ import annotations

import copy
import json

import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.prune import Pruner, Schedule, score
from mmcpd.slim.compare import compare
from tests.helpers import on_two_processes
from tests.test_prune.gate_nets import ConvBNReLU, assert_close, built


def test_scoring_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(), nn.Conv2d(8, 4, 3))
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[4].weight.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8)
    net.train()(x).sum().backward()
    net[1].eval()
    coupling = comb(net, x)
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    grads = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in net.named_parameters()}
    modes = [m.training for m in net.modules()]
    assert float(score(net, coupling, [x])['0'].min()) > 0, 'frozen weights hinder nothing'
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and modes == [m.training for m in net.modules()]
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True, False, True]
    for name, parameter in net.named_parameters():
        grad, value = grads[name]
        assert parameter.grad is grad and (grad is None or torch.equal(grad, value))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def pruned(rank=0, iterations=8):
    """Train with gauss_newton, each process on batches of its own; yield its scores, and what it keeps."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(1),
                        nn.Linear(8 * 4, 4)).double()  # fmt: skip
    coupling = comb(net, torch.randn(1, 3, 6, 6).double())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    pruner = Pruner(net, coupling, optimizer, Schedule({'macs': 0.5}, begin=0, end=6, interval=3),
                    importance='gauss_newton', normalize='macs')  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    for iteration in range(iterations):
        x = torch.randn(4, 3, 6, 6, generator=generator).double()
        pruner.closure = lambda x=x: (net(part) for part in x.split(2))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        if torch.distributed.is_initialized():  # as a data-parallel wrapper does it
            for parameter in net.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
        if iteration == 1:
            yield pruner.importance.scores()['0'].tolist()
        pruner.step()
    yield {name: keep.tolist() for name, keep in pruner.keep.items()}
    assert pruner.done and pruner.left()['macs'] <= 0.5 and compare(net, coupling, pruner.keep) < 1e-9


def test_a_pruner_takes_it_like_any_other():
    scores, keep = pruned()
    assert any(scores) and not all(keep['0'])


def on_one_of_two(rank, folder):
    net, coupling, x, _ = built(ConvBNReLU)
    alone = score(net, coupling, [(x + rank, {})])
    (folder / f'{rank}.json').write_text(json.dumps([*pruned(rank), {n: s.tolist() for n, s in alone.items()}]))


def test_processes_choose_the_same_units(tmp_path):
    on_two_processes(on_one_of_two, tmp_path)
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    assert first[0] != second[0], 'samples differ'
    assert first[1] == second[1] and not all(first[1]['0'])
    assert first[2] == second[2]
    net, coupling, x, _ = built(ConvBNReLU)
    parts = [score(net, coupling, [(x + rank, {})]) for rank in range(2)]
    assert_close({n: torch.tensor(s).double() for n, s in first[2].items()},
                 {n: (parts[0][n] + parts[1][n]) / 2 for n in parts[0]})  # fmt: skip
