"""Claims of the pruner's step that only one line holds up: each fails where that line is changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.prune import Pruner, Schedule, normalize, select

PLAN = Schedule({'macs': 0.5}, begin=0, end=8, interval=2, curve='linear')


def built(plan=PLAN, normalizer='memory', importance='hessian'):
    """Build a net in which a removed channel is not zero where a batch norm meets it, and its pruner."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.Sigmoid(), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 12, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    coupling = comb(model, torch.randn(1, 3, 8, 8, dtype=torch.float64))
    assert {group.name: group.units for group in coupling.groups} == {'0': 16, '4': 12}
    return model, optimizer, Pruner(model, coupling, optimizer, plan, importance=importance, normalize=normalizer)


def optimize(model, optimizer, iteration):
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(iteration), dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def removed(pruner) -> int:
    return sum(int((~kept).sum()) for kept in pruner.keep.values())


def test_scores_begin_anew_after_each_event():
    model, optimizer, pruner = built()
    seen = []
    for iteration in range(8):
        optimize(model, optimizer, iteration)
        seen.append((pruner.importance.iterations, pruner.step()))
    assert seen == [(1, False), (2, True)] * 4
    assert pruner.importance.iterations == 0
    assert not any(bool(score.any()) for score in pruner.importance.scores().values())


def test_nothing_is_scored_after_the_last_event():
    model, optimizer, pruner = built()
    for iteration in range(10):
        optimize(model, optimizer, iteration)
        pruner.step()
    assert pruner.done
    assert pruner.importance.iterations == 0


def test_scores_are_divided_by_what_was_asked_for():
    chosen = {}
    plan = replace(PLAN, end=2)  # one event, for all that has to go
    for normalizer in ('none', 'memory', 'macs'):
        model, optimizer, pruner = built(plan, normalizer)
        for iteration in range(2):
            optimize(model, optimizer, iteration)
            before = {name: score.clone() for name, score in pruner.importance.scores().items()}
            event = pruner.step()
        assert event
        coupling = pruner.coupling
        scores = normalize(before, coupling, coupling.keep(), by=normalizer)
        expected = select(scores, coupling, coupling.keep(), plan.ratios(2))
        assert all(torch.equal(pruner.keep[name], kept) for name, kept in expected.items())
        chosen[normalizer] = tuple(torch.cat(list(pruner.keep.values())).tolist())
    assert len(set(chosen.values())) > 1, 'all normalizers choose the same units here'


def test_the_scale_of_a_loss_changes_no_score():
    """Group Fisher sees gradients inside the backward pass, where they are scaled still."""
    found = []
    for scale in (1.0, 2.0**10):
        model, optimizer, pruner = built(importance='group_fisher')
        pruner.loss_scale = scale
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        (model(x).square().mean() * scale).backward()
        for parameter in model.parameters():
            parameter.grad /= scale
        optimizer.step()
        found.append(torch.cat(list(pruner.importance.scores().values())))
    assert found[0].all()
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=0)


def test_units_whose_removal_saves_nothing_score_infinitely():
    """The outputs of an embedding are no layer's, and a zero score divided by nothing would be removed first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    coupling = comb(model, torch.arange(10).reshape(2, 5))
    assert {group.name: group.units for group in coupling.groups} == {'0': 6, '1': 5}
    scores = {'0': torch.zeros(6), '1': torch.ones(5)}
    found = normalize(scores, coupling, coupling.keep(), by='memory')
    assert found['0'].tolist() == [torch.inf] * 6 and found['1'].isfinite().all()
    keep = select(found, coupling, coupling.keep(), {'units': 0.8})
    assert keep['0'].all() and int(keep['1'].sum()) == 2


def test_the_curve_of_the_paper_removes_its_number_at_each_event():
    plan = Schedule({'units': 0.5}, begin=0, end=10, interval=2, curve='paper', units_per_event=3)
    model, optimizer, pruner = built(plan)
    counts = []
    for iteration in range(10):
        optimize(model, optimizer, iteration)
        if pruner.step():
            counts.append(removed(pruner))
    assert counts == [3, 6, 9, 12, 14]  # of 28: the last three are more than it takes


def test_statistics_of_removed_channels_are_zero_after_each_step():
    model, optimizer, pruner = built()
    for iteration in range(4):
        optimize(model, optimizer, iteration)
        pruner.step()
    gone = ~pruner.keep['0']
    assert gone.any()
    norm = model[2]
    norm(torch.full((4, 16, 2, 2), 0.5, dtype=torch.float64))
    assert norm.running_mean[gone].any(), 'nothing to clear'
    optimize(model, optimizer, 4)
    assert not norm.running_mean[gone].any() and not norm.running_var[gone].any()
    assert norm.running_mean[~gone].all()


@pytest.mark.parametrize('resume', [False, True])
def test_an_event_without_evidence_waits_also_in_a_resumed_run(resume):
    model, optimizer, pruner = built()
    assert [pruner.step(), pruner.step()] == [False, False]  # the second is an event, and no step was taken
    if resume:
        state = pruner.state_dict()
        model, optimizer, pruner = built()
        pruner.load_state_dict(state)
    optimize(model, optimizer, 0)
    assert pruner.step(), 'the third iteration is none of the schedule, and the event of the second still waits'
    optimize(model, optimizer, 1)
    assert pruner.step()
    optimize(model, optimizer, 2)
    assert not pruner.step()
