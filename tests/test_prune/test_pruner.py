"""Pruning inside a plain training loop: masks hold, the curve is met, a resumed run chooses the same units."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from mmcpd.comb import comb
from mmcpd.errors import PruneError
from mmcpd.prune.importance import IMPORTANCES
from mmcpd.prune.pruner import Pruner
from mmcpd.prune.schedule import Schedule
from mmcpd.slim import slim
from tests.helpers import on_two_processes

SCHEDULE = Schedule({'macs': 0.5}, begin=2, end=12, interval=2)


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
        optimizer.zero_grad()

        def closure(iteration=iteration):
            backward(model, iteration)

        def outputs(iteration=iteration):
            yield model(batch(iteration)[0])

        pruner.closure = outputs if pruner.importance.needs_outputs else closure
        closure()
        optimizer.step()
        assert pruner.iteration == iteration
        pruner.step()


def built(kind='sgd', ignore=(), model=None, importance='hessian', seed=0, **schedule):
    model = model or net()
    optimizer = optimizer_of(model, kind)
    coupling = comb(model, batch(0)[0][:1], ignore=ignore)
    plan = replace(SCHEDULE, **schedule)
    return model, optimizer, Pruner(model, coupling, optimizer, plan, importance=importance, seed=seed)


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
    torch.testing.assert_close(slim(model, pruner.coupling, pruner.keep)(x), model(x), rtol=1e-9, atol=1e-12)


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
    pruner = Pruner(model, comb(model, batch(0)[0][:1]), optimizer, replace(SCHEDULE, begin=0))
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
        pruner.step()
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
@pytest.mark.parametrize(('begin', 'stop'), [(2, 1), (2, 2), (2, 5), (2, 14), (0, 1), (0, 5)])
def test_a_resumed_run_is_the_same_bit_for_bit(importance, begin, stop):
    model, optimizer, pruner = built(importance=importance, begin=begin)
    train(model, optimizer, pruner, 0, stop)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict(), pruner.state_dict()), file)
    train(model, optimizer, pruner, stop, 16)

    again, second, resumed = built(importance=importance, begin=begin, seed=7)  # random numbers come from the state
    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    for part, state in zip((again, second, resumed), saved, strict=True):
        part.load_state_dict(state)
    train(again, second, resumed, stop, 16)
    assert not all(bool(kept.all()) for kept in pruner.keep.values()) and pruner.done
    assert_same(pruner.state_dict(), resumed.state_dict())
    assert_same(model.state_dict(), again.state_dict())
    assert_same(optimizer.state_dict()['state'], second.state_dict()['state'])


def assert_same(left, right):
    """Compare nested states bit for bit."""
    if isinstance(left, Mapping):
        assert left.keys() == right.keys()
        for key in left:
            assert_same(left[key], right[key])
    else:
        assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize('importance', ['hessian', 'group_fisher'])
@pytest.mark.parametrize('begin', [0, 3])
def test_the_pruner_begins_by_itself_after_exactly_so_many_iterations(importance, begin):
    model, optimizer, pruner = built(importance=importance, begin=begin)
    fed = []
    for iteration in range(begin + 4):
        assert pruner.begun == (iteration >= begin)
        assert bool(model[3]._forward_pre_hooks) == (pruner.begun and importance == 'group_fisher')
        train(model, optimizer, pruner, iteration, iteration + 1)
        fed.append(pruner.importance.iterations)
    assert fed == [0] * begin + [1, 0, 1, 0], 'scored from the first iteration on, and reset at each event'


def test_step_removes_units_when_the_schedule_says():
    model, optimizer, pruner = built(begin=2, end=9, interval=3)
    chosen, scores = [], []
    for iteration in range(12):
        optimizer.zero_grad()
        backward(model, iteration)
        optimizer.step()
        before, scored = pruner.keep, pruner.importance.iterations
        if pruner.step():
            chosen.append(iteration + 1)
            scores.append(scored)
            assert pruner.left()['macs'] <= pruner.schedule.ratios(iteration + 1)['macs']
        else:
            assert pruner.keep is before
    assert chosen == [5, 8, 9] and scores == [3, 3, 1]


def test_every_target_holds_at_the_end():
    targets = {'macs': 0.7, 'params': 0.5, 'memory': 0.8, 'units': 0.9}
    model, optimizer, pruner = built(target=targets)
    train(model, optimizer, pruner, 0, 16)
    left = pruner.left()
    assert pruner.done and all(left[quantity] <= target for quantity, target in targets.items())
    assert left['params'] > 0.4, 'the one that binds is met, and not more'


def test_large_groups_keep_multiples_of_eight_unless_told_otherwise():
    def sizes(**options):
        model = nn.Sequential(nn.Conv2d(3, 80, 1), nn.ReLU(), nn.Conv2d(80, 20, 1), nn.AdaptiveAvgPool2d(1))
        model = nn.Sequential(*model, nn.Flatten(), nn.Linear(20, 4)).double()
        optimizer = optimizer_of(model)
        pruner = Pruner(model, comb(model, batch(0)[0][:1]), optimizer, SCHEDULE, **options)
        found = set()
        for iteration in range(12):
            train(model, optimizer, pruner, iteration, iteration + 1)
            found.add(int(pruner.keep['0'].sum()))
        return found

    assert all(size % 8 == 0 for size in sizes()) and any(size % 8 for size in sizes(round_to=1))


def test_a_stopped_pruner_counts_and_does_nothing_until_started():
    model, optimizer, pruner = built(importance='group_fisher')
    train(model, optimizer, pruner, 0, 5)
    gone = ~pruner.keep['0']
    assert gone.any()
    pruner.stop()
    keep, fed = pruner.keep, pruner.importance.iterations
    train(model, optimizer, pruner, 5, 9)
    assert pruner.keep is keep and pruner.importance.iterations == fed and pruner.iteration == 9
    model[0].weight.data[gone] = 1.0
    pruner.start()
    assert not model[0].weight[gone].any()
    train(model, optimizer, pruner, 9, 16)
    assert pruner.done and pruner.left()['macs'] <= 0.5


def test_a_run_that_was_not_pruned_yet_goes_on_from_its_iteration():
    for iteration in (1, 2):
        model, optimizer, pruner = built(importance='group_fisher')
        pruner.skip_to(iteration)
        assert pruner.begun == (iteration == 2)
        train(model, optimizer, pruner, iteration, 16)
        assert pruner.done
    with pytest.raises(ValueError, match=r'3 iterations are finished and there is no pruning state.*begins at 2'):
        built()[2].skip_to(3)


def test_scores_are_the_same_with_a_scaled_loss():
    found = []
    for scale in (1.0, 2.0**13):
        model, optimizer, pruner = built(begin=0)
        scaler = torch.amp.GradScaler('cpu', init_scale=scale)
        optimizer.zero_grad()
        x, y = batch(0)
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
        found.append(pruner.importance.scores()['0'])
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=0)


def test_a_step_that_the_scaler_skips_enters_no_score():
    model, optimizer, pruner = built(begin=0)
    scaler = torch.amp.GradScaler('cpu')
    backward(model, 0, scale=torch.inf)
    scaler.scale(torch.ones(()))  # it has to have scaled something
    scaler.step(optimizer)
    assert (pruner.importance.iterations, pruner.importance.skipped) == (0, 0)


def test_fused_optimizers_that_see_scaled_gradients_are_refused():
    model, optimizer, _ = built(begin=0)
    optimizer.grad_scale = torch.ones(())
    backward(model, 0)
    with pytest.raises(ValueError, match='fused=False'):
        optimizer.step()


def test_units_wait_for_evidence():
    model, optimizer, pruner = built()
    assert [pruner.step() for _ in range(6)] == [False] * 6  # no optimizer step at all
    assert all(kept.all() for kept in pruner.keep.values())
    backward(model, 0)
    optimizer.step()
    assert pruner.step(), 'between two events, as soon as something is known'
    assert pruner.left()['macs'] <= pruner.schedule.ratios(7)['macs']
    assert [pruner.step() for _ in range(3)] == [False] * 3


def test_what_cannot_be_pruned_is_refused_at_once():
    with pytest.raises(PruneError, match=r'macs cannot go down to 0\.0010 of the dense model, only to 0\.0'):
        built(target={'macs': 0.001})
    with pytest.raises(ValueError, match=r'end=0\.6 hold a share of the run: call schedule\.resolve\(iterations\)'):
        built(end=0.6)
    with pytest.raises(ValueError, match="unknown importance 'taylor'"):
        built(importance='taylor')
    model, optimizer, pruner = built()
    for change, message in (
        ({'normalize': 'flops'}, "unknown normalizer 'flops'"),
        ({'min_units': 0}, 'min_units counts units, at least 1: got 0'),
        ({'round_to': 0}, 'round_to counts units, at least 1: got 0'),
    ):
        with pytest.raises(ValueError, match=message):
            Pruner(model, pruner.coupling, optimizer, SCHEDULE, **change)


def test_groups_that_comb_ignores_stay_whole():
    model = net()
    model[3].weight.requires_grad_(False)
    model, optimizer, pruner = built(model=model, ignore=['0'])
    train(model, optimizer, pruner, 0, 16)
    assert model[0].weight.flatten(1).any(1).all() and pruner.left()['macs'] <= 0.5
    x = batch(99)[0]
    model.eval()
    torch.testing.assert_close(slim(model, pruner.coupling, pruner.keep)(x), model(x), rtol=1e-9, atol=1e-12)


def test_a_state_of_another_model_is_refused():
    _, _, pruner = built()
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="keep has no entry for group '3'"):
        pruner.load_state_dict({**state, 'keep': {'0': state['keep']['0']}})


def on_one_of_two(rank, folder):
    """Prune on one of two processes in three ways; write what was scored first, when units went, and what was kept."""
    results = {name: list(train_in_parallel(rank, name)) for name in ('hessian', 'group_fisher')}
    results['one scores'] = list(train_where_only_one_scores(rank))
    (folder / f'{rank}.json').write_text(json.dumps(results))


def train_in_parallel(rank, importance):
    """Train data-parallel, each process with batches of its own."""
    model, optimizer, pruner = built(importance=importance)
    wrapped = DistributedDataParallel(model)
    for iteration in range(16):
        optimizer.zero_grad()
        x, y = batch(100 * rank + iteration)
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        if iteration == 3:
            yield pruner.importance.scores()['0'].tolist()
        pruner.step()
    yield {name: keep.tolist() for name, keep in pruner.keep.items()}


def train_where_only_one_scores(rank):
    """Train alone; the optimizer steps once, on the first process."""
    model, optimizer, pruner = built(begin=0, end=3, interval=1)
    for iteration in range(3):
        backward(model, iteration)
        if rank == 0 and iteration == 1:
            optimizer.step()
        yield pruner.step()
    yield {name: keep.tolist() for name, keep in pruner.keep.items()}


def test_processes_choose_the_same_units(tmp_path):
    on_two_processes(on_one_of_two, tmp_path)
    first, second = (json.loads((tmp_path / f'{rank}.json').read_text()) for rank in range(2))
    for importance in ('hessian', 'group_fisher'):
        (score, keep), (other_score, other_keep) = first[importance], second[importance]
        assert keep == other_keep and not all(keep['0'])
        assert (score == other_score) == (importance == 'hessian'), 'samples differ, averaged gradients do not'
    assert first['one scores'] == second['one scores']
    assert first['one scores'][:3] == [False, True, False] and not all(first['one scores'][3]['0'])
