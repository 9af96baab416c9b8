"""Pruning inside a plain training loop: masks hold, the curve is met, a resumed run chooses the same units."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune.importance import IMPORTANCES
from mmcpd.prune.pruner import Pruner, check_options
from mmcpd.slim import slim
from tests.helpers import on_two_processes

OPTIONS = {'begin': 2, 'end': 12, 'interval': 2, 'target': 0.5}


def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)).double()


def optimizer_of(model, kind='sgd'):
    if kind == 'adam':
        return torch.optim.AdamW(model.parameters(), lr=1e-2)
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def batch(iteration):
    generator = torch.Generator().manual_seed(iteration)
    x = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (8,), generator=generator)


def backward(model, iteration, scale=1.0):
    x, y = batch(iteration)
    (F.cross_entropy(model(x), y) * scale).backward()


def train(model, optimizer, pruner, begin, end):
    for iteration in range(begin, end):
        if iteration == pruner.schedule.begin:
            pruner.start()
        optimizer.zero_grad()

        def closure(iteration=iteration):
            backward(model, iteration)

        pruner.closure = closure
        closure()
        optimizer.step()
        pruner.after(iteration + 1)


def built(kind='sgd', iterations=16, **options):
    model = net()
    optimizer = optimizer_of(model, kind)
    c = comb(model, batch(0)[0][:1])
    return model, optimizer, Pruner(model, c, optimizer, iterations, **{**OPTIONS, **options})


@pytest.mark.parametrize('kind', ['sgd', 'adam'])
def test_the_target_is_met_and_masks_hold_through_momentum(kind):
    model, optimizer, pruner = built(kind)
    train(model, optimizer, pruner, 0, 16)
    assert pruner.done and pruner.left()['macs'] <= 0.5 < 1.1 * pruner.left()['macs']
    gone = ~pruner.keep['0']
    assert gone.any()
    assert not model[0].weight[gone].any() and not model[1].weight[gone].any() and not model[3].weight[:, gone].any()
    for value in optimizer.state[model[0].weight].values():
        assert value.shape != model[0].weight.shape or not value[gone].any()
    model.eval()
    x = batch(99)[0]
    torch.testing.assert_close(slim(model, pruner.comb, pruner.keep)(x), model(x), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('kind', ['sgd', 'adam', 'rmsprop'])
def test_no_step_revives_a_removed_row(kind):
    """Where an activation of zero is not zero, the columns that read it have gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.double()
    kinds = {'sgd': torch.optim.SGD, 'adam': torch.optim.AdamW, 'rmsprop': torch.optim.RMSprop}
    optimizer = kinds[kind](
        model.parameters(), lr=0.01, weight_decay=0.1, **({} if kind == 'adam' else {'momentum': 0.9})
    )
    pruner = Pruner(model, comb(model, batch(0)[0][:1]), optimizer, 16, **{**OPTIONS, 'begin': 0})
    pruner.start()
    leaked = 0
    for iteration in range(16):
        optimizer.zero_grad()
        backward(model, iteration)
        gone = ~pruner.keep['0']
        leaked += bool(model[2].weight.grad[:, gone].any())
        optimizer.step()
        rows = [(model[0].weight, 0), (model[0].bias, 0), (model[2].weight, 1)]
        for tensor, dim in rows:
            for value in (tensor, *(v for v in optimizer.state[tensor].values() if v.shape == tensor.shape)):
                assert not value.transpose(0, dim)[gone].any()
        pruner.after(iteration + 1)
    assert pruner.left()['macs'] <= 0.5 and leaked > 5


def test_without_the_hook_momentum_revives_weights():
    model, optimizer, pruner = built()
    train(model, optimizer, pruner, 0, 3)
    pruner.stop()
    pruner.keep['0'][:4] = False
    pruner.masker.apply_(pruner.keep)
    assert not model[0].weight[:4].any()
    optimizer.step()
    assert model[0].weight[:4].any(), 'nothing to guard against'


@pytest.mark.parametrize('importance', sorted(IMPORTANCES))
@pytest.mark.parametrize('stop', [1, 5, 14])
def test_a_resumed_run_chooses_the_same_units(importance, stop):
    model, optimizer, pruner = built(importance=importance)
    train(model, optimizer, pruner, 0, stop)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(model, optimizer, pruner, stop, 16)

    again, second, resumed = built(importance=importance, seed=7)  # its random numbers come from the state
    again.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    if stop > pruner.schedule.begin:
        resumed.start()
    train(again, second, resumed, stop, 16)
    assert all(torch.equal(pruner.keep[n], resumed.keep[n]) for n in pruner.keep)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_scores_are_the_same_with_a_scaled_loss():
    found = []
    for scale in (1.0, 2.0**13):
        model, optimizer, pruner = built()
        pruner.start()
        scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        optimizer.zero_grad()
        x, y = batch(0)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        found.append(pruner.importance.scores()['0'])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_a_step_that_the_scaler_skips_enters_no_score():
    model, optimizer, pruner = built()
    pruner.start()
    scaler = torch.amp.GradScaler('cpu')
    backward(model, 0, scale=torch.inf)
    scaler.scale(torch.ones(()))  # it has to have scaled something
    scaler.step(optimizer)
    assert (pruner.importance.iterations, pruner.importance.skipped) == (0, 0)


def test_fused_optimizers_that_see_scaled_gradients_are_refused():
    model, optimizer, pruner = built()
    pruner.start()
    optimizer.grad_scale = torch.ones(())
    backward(model, 0)
    with pytest.raises(ValueError, match='fused=False'):
        optimizer.step()


def test_units_wait_for_evidence():
    model, optimizer, pruner = built()
    pruner.start()
    assert [pruner.after(i) for i in range(1, 6)] == [False] * 5  # no optimizer step at all
    assert all(k.all() for k in pruner.keep.values())
    backward(model, 0)
    optimizer.step()
    assert pruner.after(7), 'between two events, as soon as something is known'
    assert pruner.left()['macs'] <= pruner.schedule.ratio(7)
    assert not pruner.after(9) and not pruner.after(10)


def test_what_cannot_be_reached_is_refused_at_once():
    with pytest.raises(PruneError, match=r'target=0\.001 of macs cannot be reached, only 0\.0'):
        built(target=0.001)
    with pytest.raises(ValueError, match='does not fit into a run of 10'):
        built(iterations=10)
    with pytest.raises(ValueError, match=r"ignore pattern 'backbone\.\*' fits no group: near are 0, 3"):
        built(ignore=['backbone.*'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'target': 1.5}, 'between 0 and 1: got 1.5'),
        ({'targt': 0.5}, "no option 'targt': did you mean target"),
        ({'importance': 'taylor'}, "unknown importance 'taylor'"),
        ({'importance': {'type': 'curvature', 'probe': 2}}, "no option 'probe': did you mean probes"),
        ({'normalize': 'flops'}, "unknown normalizer 'flops'"),
        ({'min_units': 0}, 'min_units is at least 1'),
        ({'round_to': 0}, 'round_to is at least 1'),
        ({'interval': 0}, 'interval counts iterations'),
    ],
)
def test_options_are_checked_before_there_is_a_model(change, message):
    check_options(OPTIONS)
    with pytest.raises(ValueError, match=message):
        check_options({**OPTIONS, **change})


@pytest.mark.parametrize('importance', ['hessian', 'curvature', 'group_fisher'])
def test_frozen_stages_are_refused_before_training_unless_they_are_left_alone(importance):
    model = net()
    model[3].weight.requires_grad_(False)  # where the gates of group 0 are read
    c, options = comb(model, batch(0)[0][:1]), {**OPTIONS, 'importance': importance}
    with pytest.raises(ValueError, match=r"groups \['0'\] cannot be scored.*requires_grad=False on 3\.weight"):
        Pruner(model, c, optimizer_of(model), 16, **options)
    pruner = Pruner(model, c, optimizer_of(model), 16, **options, ignore=['0'])
    assert pruner.importance.gates.slices.keys() == {'3'}
    assert Pruner(model, c, optimizer_of(model), 16, **{**options, 'importance': 'magnitude'}).keep.keys() == {'0', '3'}


def test_what_is_left_alone_stays_whole():
    model = net()
    model[3].weight.requires_grad_(False)
    c, optimizer = comb(model, batch(0)[0][:1]), optimizer_of(model)
    pruner = Pruner(model, c, optimizer, 16, **OPTIONS, ignore=['0'])
    pruner.start()
    for iteration in range(16):
        optimizer.zero_grad()
        x, y = batch(iteration)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        pruner.after(iteration + 1)
    assert pruner.keep['0'].all() and pruner.left()['macs'] <= 0.5
    assert torch.allclose(slim(model, c, pruner.keep)(x), model(x))


def test_a_missing_option_is_named():
    with pytest.raises(ValueError, match='pruning needs interval, target'):
        check_options({'begin': 0, 'end': 10})


def test_a_state_of_another_model_is_refused():
    _, _, pruner = built()
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="keep has no entry for group '3'"):
        pruner.load_state_dict({**state, 'keep': {'0': state['keep']['0']}})


def train_on(rank, folder, importance):
    """Prune on one of two processes, each with batches of its own; write what was scored and what was kept."""
    model = net()
    optimizer = optimizer_of(model)
    pruner = Pruner(model, comb(model, batch(0)[0][:1]), optimizer, 16, **OPTIONS, importance=importance)
    wrapped = DistributedDataParallel(model)
    own = []
    for iteration in range(16):
        if iteration == 2:
            pruner.start()
        optimizer.zero_grad()
        x, y = batch(100 * rank + iteration)
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        if iteration == 3:
            own = pruner.importance.scores()['0'].tolist()
        pruner.after(iteration + 1)
    keep = {name: keep.tolist() for name, keep in pruner.keep.items()}
    (folder / f'{rank}.json').write_text(json.dumps([own, keep]))


@pytest.mark.parametrize('importance', ['hessian', 'group_fisher'])
def test_processes_with_different_batches_choose_the_same_units(importance, tmp_path):
    on_two_processes(train_on, tmp_path, importance)
    results = [json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2)]
    (first, keep), (second, other) = results
    assert keep == other and not all(keep['0'])
    assert (first == second) == (importance != 'group_fisher'), 'samples differ, averaged gradients do not'
