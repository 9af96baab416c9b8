"""The accuracy tables in miniature: rows are resumed, rates chosen without the test set, peers and reports are true."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

pytest.importorskip('torch_pruning')
pytest.importorskip('mmseg')
pytest.importorskip('mmpretrain')

import torch_pruning as tp
from mmpretrain.models.utils import MultiheadAttention

from benchmarks import accuracy, accuracy_report
from benchmarks.accuracy_camvid import mean_iou
from benchmarks.accuracy_peers import Peer, PeerError, PeerInLoop, keep_of, prune_by_peer, split_attention
from benchmarks.accuracy_recipes import RECIPES, Pruned, Recipe
from benchmarks.accuracy_store import Case, Store
from benchmarks.accuracy_tasks import CifarTask, Pictures, Split, cropped_and_flipped
from benchmarks.accuracy_train import Learning, macs, reestimate_, train
from benchmarks.accuracy_variants import VARIANTS
from mmcpd.comb import comb
from mmcpd.slim import slim


class Tiny(nn.Module):
    """A stem, a residual block and a classifier, with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.inner, self.inner_norm = nn.Conv2d(16, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.outer = nn.Conv2d(12, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = x + self.outer(self.inner_norm(self.inner(x)).relu())
        return self.fc(x.relu().mean((2, 3)))


@dataclass(frozen=True)
class TinyTask(CifarTask):
    classifier: ClassVar[str] = 'fc'

    def dense(self):
        torch.manual_seed(0)
        model = Tiny()
        model.to(self.data.train.images.device)
        reestimate_(model, [batch.images for batch in self.plain(16, 0)])
        return model.eval()


def pictures(count, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8)
    return Pictures(images, torch.randint(4, (count,), generator=generator))


@pytest.fixture
def task(tmp_path):
    data = Split(pictures(32, 1), pictures(20, 2), pictures(24, 3))
    options = dict(shares=(0.5,), budgets=(0, 2), tried=(2,), rates=(0.01, 0.1), score_pictures=16, batch=8)
    return TinyTask('resnet20', data, tmp_path / 'none.pth', **options)


class Untouchable:
    """Pictures that nobody may read."""

    def __getattr__(self, name):
        raise AssertionError(f'the test pictures were read: {name}')


def recipe_cases(task, store, *names, budgets=(0, 2)):
    return list(accuracy.cases(task, store, [0, 1], names, budgets))


# -- rows --------------------------------------------------------------------------------------------------------------
def test_a_row_that_is_there_is_not_run_again(task, tmp_path, monkeypatch):
    store = Store(tmp_path / 'accuracy.json')
    wanted = recipe_cases(task, store, 'dense', 'magnitude at once')
    assert len(wanted) == 1 + 2 * 2
    runner = accuracy.Runner(task)
    accuracy.run_table(runner, store, wanted[:2])
    first = store.file.read_text()
    ran = []
    monkeypatch.setattr(runner, 'run', lambda recipe, case: ran.append(case) or {**first_row(store), **vars(case)})
    accuracy.run_table(runner, store, wanted)
    assert ran == wanted[2:]
    assert json.loads(first)['rows'] == store.read('rows')[:2]
    assert not list(tmp_path.glob('*.part'))


def first_row(store):
    return store.read('rows')[0]


def test_a_row_says_what_was_measured(task, tmp_path):
    store = Store(tmp_path / 'accuracy.json')
    case = recipe_cases(task, store, 'magnitude at once')[1]
    row = accuracy.Runner(task).run(RECIPES[case.recipe], case)
    assert case.matches(row) and not replace(case, seed=7).matches(row)
    assert row['pictures_trained'] == 2 * 8 and row['pictures_to_prune'] == 0
    assert 0.4 < row['macs'] <= 0.5 and 0 <= row['test'] <= 100
    assert row['versions']['torch_pruning'] and row['date'] and row['device'] == 'cpu' and 'held_out' not in row


def test_rows_of_two_writers_are_both_kept(tmp_path):
    ours, theirs = Store(tmp_path / 'a.json'), Store(tmp_path / 'a.json')
    case = Case('resnet20', 'mmcpd', 0.5, 0, 0, 0.0)
    for store, seed, value in ((ours, 0, 1), (theirs, 1, 2), (ours, 0, 3)):
        store.add('rows', {**vars(case), 'seed': seed, 'test': value})
    assert [(row['seed'], row['test']) for row in ours.read('rows')] == [(1, 2), (0, 3)]


def test_an_unknown_recipe_is_refused(task, tmp_path):
    with pytest.raises(ValueError, match="unknown recipe 'mmcdp': did you mean mmcpd"):
        recipe_cases(task, Store(tmp_path / 'a.json'), 'mmcdp')


# -- learning rates ----------------------------------------------------------------------------------------------------
def test_rates_are_chosen_without_the_test_pictures(task, tmp_path):
    store = Store(tmp_path / 'accuracy.json')
    blind = replace(task, data=replace(task.data, test=Untouchable()))
    wanted = recipe_cases(blind, store, 'magnitude at once')
    accuracy.choose_rates(accuracy.Runner(blind), store, wanted, blind.rates)
    trials = store.read('trials')
    assert [(row['rate'], row['seed'], row['iterations']) for row in trials] == [(0.01, 0, 2), (0.1, 0, 2)]
    assert all('held_out' in row and 'test' not in row for row in trials)
    best = max(trials, key=lambda row: row['held_out'])['rate']
    assert {case.rate for case in recipe_cases(blind, store, 'magnitude at once', budgets=[2])} == {best}
    with pytest.raises(AssertionError, match='the test pictures were read'):
        accuracy.run_table(accuracy.Runner(blind), store, wanted)


def test_without_a_trial_the_default_rate_is_used(task, tmp_path):
    case = recipe_cases(task, Store(tmp_path / 'a.json'), 'magnitude at once')[1]
    assert case.rate == task.default_rate


# -- the loop ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
@pytest.mark.parametrize('name', ['mmcpd', 'mmcpd in training', 'Torch-Pruning Taylor in our loop'])
def test_a_run_ends_at_the_target_where_its_pictures_are(task, name, device):
    there = replace(task, data=task.data.to(device))
    row = accuracy.Runner(there).run(RECIPES[name], Case('resnet20', name, 0.5, 48, 0, 0.01))
    assert 0.35 < row['macs'] <= 0.5 and 0 <= row['test'] <= 100
    assert row['device'] == ('cpu' if device == 'cpu' else torch.cuda.get_device_name())


def test_shares_that_are_asked_for_are_trained_all(task, tmp_path):
    store = Store(tmp_path / 'a.json')
    found = accuracy.cases(task, store, [0], ['magnitude at once'], [0, 2], [0.7, 0.3])
    assert [(case.share, case.iterations) for case in found] == [(0.7, 0), (0.7, 2), (0.3, 0), (0.3, 2)]


@pytest.mark.parametrize('learning', [Learning(), Learning(0, 4), Learning(1, 4)])
def test_training_is_repeatable_and_depends_on_the_seed(task, learning):
    first, again, other = (
        train(task.dense(), task.dense(), task, 3, 0.01, seed, learning).fc.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_without_labels_nothing_of_the_labels_is_read(task):
    wrong = replace(task.data.train, labels=task.data.train.labels.roll(1))
    other = replace(task, data=replace(task.data, train=wrong))
    alone, blended = (
        [train(t.dense(), task.dense(), t, 2, 0.01, 0, learning).fc.weight for t in (task, other)]
        for learning in (Learning(0, 4), Learning(1, 4))
    )
    assert torch.equal(*alone) and not torch.equal(*blended)


def test_crops_are_windows_of_the_padded_picture():
    images = torch.arange(1, 1 + 3 * 6 * 6, dtype=torch.uint8).view(1, 3, 6, 6).repeat(50, 1, 1, 1)
    crops = cropped_and_flipped(images, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(images[:1], (4, 4, 4, 4))
    windows = padded.unfold(2, 6, 1).unfold(3, 6, 1)[0].permute(1, 2, 0, 3, 4).reshape(-1, 3, 6, 6)
    known = {tuple(w.flatten().tolist()) for w in torch.cat([windows, windows.flip(3)])}
    assert all(tuple(crop.flatten().tolist()) in known for crop in crops)
    assert len({tuple(crop.flatten().tolist()) for crop in crops}) > 20


def test_mean_iou_by_hand():
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])  # the third class does not occur
    assert mean_iou(confusion) == pytest.approx(100 * (3 / 4 + 4 / 5) / 2)


# -- the peer ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('kind', ['group L2', 'Taylor', 'Hessian'])
def test_the_peers_choice_is_a_keep_of_ours(task, kind):
    peer = prune_by_peer(task, kind, 0.5, 0)
    dense = task.dense()
    coupling = comb(dense, task.example())
    keep = keep_of(coupling, peer.numbers())
    ours, x = slim(dense, coupling, keep).eval(), task.plain(8, 0)[0].images
    assert 0.3 < macs(ours, x[:1]) / macs(dense, x[:1]) <= 0.5
    assert torch.allclose(ours(x), peer.model(x), atol=1e-6)
    keep['inner'] = keep['inner'].roll(1)
    assert not torch.allclose(slim(dense, coupling, keep).eval()(x), peer.model(x), atol=1e-3)


def test_half_a_unit_is_refused(task):
    coupling = comb(task.dense(), task.example())
    numbers = Peer(task.dense(), tp.importance.GroupMagnitudeImportance(), task).numbers()
    assert all(bool(kept.all()) for kept in keep_of(coupling, numbers).values())
    with pytest.raises(PeerError, match="some rows of a unit of 'inner'"):
        keep_of(coupling, {**numbers, 'inner_norm.weight': numbers['inner_norm.weight'][1:]})


def test_the_peer_in_our_loop_keeps_momentum_and_meets_the_target(task):
    model = task.dense()
    optimizer = task.optimizer(model, 0.01)
    pruner = PeerInLoop(task, 0.5, model, 10)
    for images, labels in itertools.islice(task.stream(0), 10):
        optimizer.zero_grad()
        task.losses(model(images), labels).mean().backward()
        optimizer.step()
        before = {n: optimizer.state[p]['momentum_buffer'] for n, p in pruner.peer.model.named_parameters()}
        places, width = pruner.peer.numbers(), len(model.inner_norm.weight)
        optimizer = pruner.step(optimizer)
        if len(model.inner_norm.weight) < width:
            kept = torch.isin(places['inner_norm.weight'], pruner.peer.numbers()['inner_norm.weight'])
            carried = optimizer.state[model.inner_norm.weight]['momentum_buffer']
            assert torch.equal(carried, before['inner_norm.weight'][kept])
    assert len(model.inner_norm.weight) < 12
    assert macs(pruner.finish(), task.example()) <= 0.5 * pruner.peer.dense_macs


def test_what_the_peer_dies_of_is_in_its_row(task, tmp_path):
    case = Case('resnet20', 'Torch-Pruning OBDC', 0.5, 0, 0, 0.0)
    row = accuracy.Runner(task).run(RECIPES[case.recipe], case)
    assert 'NoneType' in row['error'] and 'test' not in row


def test_an_attention_for_the_peer_computes_what_its_own_does():
    torch.manual_seed(0)
    attention, x = MultiheadAttention(12, 3).eval(), torch.rand(2, 5, 12)
    assert torch.allclose(split_attention(attention, x), attention(x), atol=1e-6)
    attention.num_heads, attention.head_dims = 4, 3
    other = split_attention(attention, x)
    attention.num_heads, attention.head_dims = 3, 4
    assert not torch.allclose(other, attention(x), atol=1e-4)


# -- recipes and report ------------------------------------------------------------------------------------------------
def test_our_refit_puts_a_better_model_on_the_same_units(task):
    recipe = RECIPES['mmcpd'].prune
    plain = RECIPES['mmcpd, no refit'].prune(task, 0.5, 0)
    fitted, x = recipe(task, 0.5, 0), task.plain(16, 0)[0].images
    assert macs(plain.model, x[:1]) == macs(fitted.model, x[:1])
    gaps = [(task.dense()(x) - found.model.eval()(x)).square().mean().item() for found in (plain, fitted)]
    assert gaps[1] < gaps[0]


def test_the_default_in_our_loop_meets_the_target(task):
    found: Pruned = RECIPES['mmcpd in training'].prune(task, 0.5, 0)
    model = train(found.model, task.dense(), task, 10, 0.01, 0, Learning(1, 4), found.in_loop)
    assert macs(model, task.example()) <= 0.5 * macs(task.dense(), task.example())


@pytest.mark.parametrize('name', [name for name, recipe in VARIANTS.items() if recipe.in_loop])
def test_every_variant_meets_the_target_with_a_masked_model(task, name):
    found: Pruned = VARIANTS[name].prune(task, 0.5, 0)
    loops = []

    def watched(model, optimizer, iterations):
        loops.append(found.in_loop(model, optimizer, iterations))
        return loops[0]

    x = task.plain(16, 0)[0].images
    model = train(found.model, task.dense(), task, 50, 0.01, 0, Learning(1, 4), watched)
    assert 0.3 < macs(model, task.example()) / macs(task.dense(), task.example()) <= 0.5
    assert torch.allclose(found.model.eval()(x), model(x), atol=1e-4)


def rows_of(recipe, values, iterations=40, **more):
    case = Case('resnet20', recipe, 0.5, iterations, 0, 0.01)
    known = {'date': '2026-01-01', 'versions': {'torch': '2'}, **more}
    return [{**vars(case), 'seed': seed, **known, 'test': value} for seed, value in enumerate(values)]


def test_the_report_gives_means_and_what_was_lent(tmp_path):
    store = Store(tmp_path / 'accuracy_resnet20.json')
    rows = rows_of('mmcpd', [86.0, 87.0, 88.0]) + rows_of('Torch-Pruning Taylor', [80.0])
    rows += [{**row, 'share': 1.0} for row in rows_of('dense', [91.73], 0)]
    rows += [{k: v for k, v in rows_of('Torch-Pruning OBDC', [0])[0].items() if k != 'test'} | {'error': 'it fell'}]
    for row in rows:
        store.add('rows', row)
    text = accuracy_report.report({'resnet20': store})
    assert '| mmcpd | 87.00 ± 1.00 (3) | distillation (tau 4) |' in text
    assert '| Torch-Pruning Taylor | 80.00 | labels |' in text
    assert 'does not run: it fell' in text and 'dense 91.73' in text and '| 50%, 40 iterations |' in text
    assert 'It was lent: batch norm re-estimated' in text
    assert 'beside others: Torch-Pruning Taylor (resnet20: 0.01), mmcpd (resnet20: 0.01).' in text


def test_the_chosen_rate_counts_where_both_were_run():
    rows = rows_of('mmcpd', [80.0]) + rows_of('mmcpd', [85.0], rate_chosen=True)
    assert accuracy_report.cell(rows) == '85.00'
    assert accuracy_report.cell(rows[:1]) == '80.00'


def test_the_summary_is_of_what_nobody_trained_or_lent(tmp_path):
    store = Store(tmp_path / 'accuracy_resnet20.json')
    named = ('mmcpd', 0.5, 0, 86.0), ('mmcpd', 0.75, 0, 91.0), ('mmcpd', 0.5, 80, 88.0)
    lent = ('Torch-Pruning Taylor', 0.5, 0, 48.0), ('Torch-Pruning Taylor, our refit', 0.5, 0, 76.0)
    for recipe, share, iterations, test in (('dense', 1.0, 0, 91.7), *named, *lent):
        case = Case('resnet20', recipe, share, iterations, 0, 0.0)
        store.add('rows', {**asdict(case), 'test': test})
    text = accuracy_report.summary({'resnet20': store, 'vit': Store(tmp_path / 'none.json')})
    assert text.splitlines() == [
        '|  | ResNet-20 on CIFAR-10 |', '| --- | --- |', '| dense | 91.70 |', '| mmcpd | 86.00 |',
        '| Torch-Pruning Taylor | 48.00 |',
    ]  # fmt: skip


def test_the_report_goes_between_its_marks(tmp_path):
    file = tmp_path / 'README.md'
    file.write_text(f'above\n{accuracy_report.BEGIN}\nold\n{accuracy_report.END}\nbelow\n')
    accuracy_report.write_between(file, 'new\n')
    assert file.read_text() == f'above\n{accuracy_report.BEGIN}\nnew\n{accuracy_report.END}\nbelow\n'
    file.write_text('no place\n')
    with pytest.raises(ValueError, match='must have one place'):
        accuracy_report.write_between(file, 'new\n')


def test_latency_is_measured_once_beside_the_dense_model(task, tmp_path, monkeypatch):
    store = Store(tmp_path / 'accuracy_resnet20.json')
    wanted = recipe_cases(task, store, 'magnitude at once', budgets=[0])[:1]
    runner = accuracy.Runner(task)
    accuracy.measure_latency(runner, store, wanted, runs=5)
    monkeypatch.setattr(runner, 'pruned', lambda *_: pytest.fail('it is measured already'))
    accuracy.measure_latency(runner, store, wanted, runs=5)
    [row] = store.read('latency')
    assert [each['name'] for each in row['latency']] == ['dense', 'pruned'] and row['latency'][1]['ratio'] > 0
    assert '| magnitude at once | 50% |' in accuracy_report.latency_table('resnet20', [row])


def test_rows_at_rates_that_were_not_chosen_stand_below_the_table():
    chosen = rows_of('mmcpd', [86.0, 87.0], rate_chosen=True)
    others = [{**row, 'rate': 0.1} for row in rows_of('mmcpd', [80.0, 81.0], rate_chosen=False)]
    text = accuracy_report.table('resnet20', chosen + others)
    assert '| mmcpd | 86.50 ± 0.71 (2) |' in text
    assert text.endswith('At rates that were not chosen: mmcpd at 0.1, 40 iterations: 80.50 ± 0.71 (2).')
    assert 'not chosen' not in accuracy_report.table('resnet20', chosen)


def test_every_recipe_has_its_own_name():
    assert all(isinstance(recipe, Recipe) and name == recipe.name for name, recipe in accuracy.EVERY.items())
    assert len(accuracy.EVERY) == len(RECIPES) + len(VARIANTS)
    assert sum(recipe.peer for recipe in RECIPES.values()) == 7
