"""Compare recipes of pruning side by side: one data set, one training loop, one count of MACs, the same pictures seen.

    python benchmarks/accuracy.py resnet20                     # also resnet56, vit, camvid, camvid_seaformer: hours
    python benchmarks/accuracy.py resnet20 --budgets 0 40 --rows mmcpd 'Torch-Pruning Taylor' --seeds 0
    python benchmarks/accuracy.py resnet20 --choose-lr         # tries each rate on held-out training pictures
    python benchmarks/accuracy.py resnet20 --list              # the rows, and which are done
    python benchmarks/accuracy.py vit --latency                # the pruned models in ONNX Runtime, beside the dense one
    python benchmarks/accuracy.py resnet56 --device cuda --shares 0.47 --budgets 35100   # 100 epochs
    python benchmarks/accuracy.py report                       # into docs/results.md and README.md

Rows go to `benchmarks/results/accuracy_TABLE.json` as they come; a row that is there is not run again. CIFAR-10 is
looked for in class folders (`--data`), trained weights in `--weights`: resnet20_cifar10.pth, resnet56_cifar10.pth,
vit_cifar10.pth; mobilenet_v2_in1k.pth for CamVid, whose dense models are trained once, in some ten minutes each.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from mmengine.registry import DefaultScope

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import accuracy_report
from benchmarks.accuracy_camvid import CamVidTask
from benchmarks.accuracy_peers import PeerError
from benchmarks.accuracy_recipes import RECIPES, Pruned, Recipe
from benchmarks.accuracy_store import Case, Row, Store
from benchmarks.accuracy_tasks import Task, cifar_task, load_cifar
from benchmarks.accuracy_train import macs, reestimate_, train
from benchmarks.accuracy_variants import VARIANTS
from mmcpd.names import look_up

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results'
TABLES = ('resnet20', 'resnet56', 'vit', 'camvid', 'camvid_seaformer')
PACKAGES = ('torch', 'onedl-mmengine', 'onedl-mmpretrain', 'onedl-mmsegmentation', 'torch_pruning', 'numpy')
REESTIMATED_ON = 1000
EVERY = RECIPES | VARIANTS


class Runner:
    """Run the cases of one task; the model that a recipe prunes is kept for its other budgets."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.teacher = task.dense()
        self.device = task.example().device
        self.dense_macs = macs(self.teacher, task.example())
        self._pruned: tuple[Case, Pruned, float] | None = None

    def pruned(self, recipe: Recipe, case: Case) -> tuple[Pruned, float]:
        """Return the pruned model of a case, a copy, and the seconds that it took."""
        key = replace(case, iterations=0, rate=0.0)
        if self._pruned is None or self._pruned[0] != key:
            start = time.perf_counter()
            torch.manual_seed(case.seed)
            found = recipe.prune(self.task, case.share, case.seed)
            self._pruned = key, found, time.perf_counter() - start
        _, found, seconds = self._pruned
        return replace(found, model=copy.deepcopy(found.model)), seconds

    def run(self, recipe: Recipe, case: Case, *, held_out: bool = False) -> Row:
        """Prune, train and score; with `held_out`, on the held-out training pictures instead of the test pictures."""
        row: Row = {**asdict(case), 'learning': recipe.learning.words if case.iterations else ''}
        row |= circumstances(self.device)
        start = time.perf_counter()
        try:
            found, seconds = self.pruned(recipe, case)
        except PeerError as error:
            return row | {'error': str(error)}
        torch.manual_seed(case.seed)
        model = found.model
        if case.iterations:
            start = time.perf_counter()
            options = (case.iterations, case.rate, case.seed, recipe.learning, found.in_loop)
            model = train(model, self.teacher, self.task, *options)
            row['train_seconds'] = round(time.perf_counter() - start, 1)
        elif found.reestimated:
            reestimate_(model, self.task.augmented(REESTIMATED_ON, case.seed))
            row['reestimated'] = True
        name = 'held_out' if held_out else 'test'
        row |= {'prune_seconds': round(seconds, 1), 'pictures_to_prune': found.pictures}
        row |= {'pictures_trained': case.iterations * self.task.batch}
        row |= {'macs': macs(model, self.task.example()) / self.dense_macs}
        return row | {name: self.task.evaluate(model, held_out=held_out)}


def circumstances(device: torch.device) -> Row:
    """Say under what a number was measured."""
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def cases(
    task: Task,
    store: Store,
    seeds: Sequence[int],
    names: Sequence[str],
    budgets: Sequence[int],
    shares: Sequence[float] = (),
) -> Iterator[Case]:
    """Yield the cases of a table recipe by recipe and seed by seed, so that budgets share a pruned model.

    Shares of the MACs that are given are all trained; of the task's own it says which one is.

    Raises:
        ValueError: a recipe that there is not.
    """
    for name in names:
        recipe = look_up(EVERY, name, 'recipe')
        if recipe.tables and task.name not in recipe.tables:
            continue
        for share in (shares or task.shares) if name != 'dense' else (1.0,):
            for seed in seeds if name != 'dense' else seeds[:1]:
                for iterations in budgets if name != 'dense' else (0,):
                    if iterations == 0 and (recipe.in_loop or recipe.learns_only):
                        continue
                    if iterations and share != task.trained_share and not shares:
                        continue
                    case = Case(task.name, name, share, iterations, seed, task.default_rate if iterations else 0.0)
                    rate = store.rate(case, task.tried_for(iterations)) if iterations else None
                    yield case if rate is None else replace(case, rate=rate)


def run_table(runner: Runner, store: Store, wanted: Sequence[Case]) -> None:
    """Run what is not there yet, and save each row."""
    for number, case in enumerate(wanted, 1):
        if store.has('rows', case):
            continue
        row = runner.run(EVERY[case.recipe], case)
        store.add('rows', row | {'rate_chosen': rate_is_chosen(runner.task, store, case)})
        print(f'[{number}/{len(wanted)}] {line(row)}', flush=True)


def rate_is_chosen(task: Task, store: Store, case: Case) -> bool:
    """Say whether a case trains at the rate that the trials so far would choose for it."""
    return case.iterations > 0 and store.rate(case, task.tried_for(case.iterations)) == case.rate


def choose_rates(runner: Runner, store: Store, wanted: Sequence[Case], rates: Sequence[float]) -> None:
    """Try each rate for each recipe, at one seed and the `task.tried` iterations, on held-out training pictures."""
    first = min((case.seed for case in wanted), default=0)
    for case in wanted:
        for rate in rates if case.iterations in runner.task.tried and case.seed == first else ():
            trial = replace(case, rate=rate)
            if not store.has('trials', trial):
                row = runner.run(EVERY[case.recipe], trial, held_out=True)
                if 'error' in row:
                    break
                store.add('trials', row)
                print(f'trial: {line(row)}', flush=True)
    for row in store.read('rows'):  # which may have run before these trials
        chosen = rate_is_chosen(runner.task, store, Case.of(row))
        if row.get('rate_chosen', False) != chosen:
            store.add('rows', row | {'rate_chosen': chosen})


def measure_latency(runner: Runner, store: Store, wanted: Sequence[Case], runs: int = 1000) -> None:
    """Time the pruned models of the first seed in ONNX Runtime, each in turns with the dense model, one thread."""
    from mmcpd.deploy import deploy

    for case in (case for case in wanted if case.iterations == 0 and not store.has('latency', case)):
        try:
            found, _ = runner.pruned(EVERY[case.recipe], case)
        except PeerError:
            continue
        models = {'dense': runner.teacher, 'pruned': found.model.eval()}
        with tempfile.TemporaryDirectory() as folder:
            report = deploy(models, [(runner.task.example(),)], folder, dynamic_batch=False, runs=runs, threads=1)
        row = {**asdict(case), **circumstances(runner.device), 'latency': [asdict(each) for each in report.latency]}
        store.add('latency', row)
        print(f'{case.recipe}: {report.latency[-1].ratio:.3f} of the dense latency', flush=True)


def line(row: Row) -> str:
    """Say one row in one line."""
    head = f'{row["recipe"]}, {row["share"]:.0%} of the MACs, {row["iterations"]} iterations, seed {row["seed"]}'
    if 'error' in row:
        return f'{head}: {row["error"]}'
    value = row.get('test', row.get('held_out'))
    seconds = row['prune_seconds'] + row.get('train_seconds', 0)
    return f'{head}, lr {row["rate"]:g}: {value:.2f} at {row["macs"]:.1%}, {seconds:.0f} s'


def build_task(args: argparse.Namespace) -> Task:
    """Return the task of a table, its data loaded."""
    if args.table.startswith('camvid'):
        weights = args.weights / 'mobilenet_v2_in1k.pth' if args.table == 'camvid' else None
        return CamVidTask(args.table, args.data / 'camvid', weights, args.work_dir)
    data = load_cifar(args.data / 'cifar10', args.work_dir / 'cifar10.pt')
    return cifar_task(args.table, data.to(args.device), args.weights)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=(*TABLES, 'report'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument(
        '--rows',
        nargs='+',
        default=list(RECIPES),
        metavar='NAME',
        help='recipes, and variants by name; all recipes if left out',
    )
    parser.add_argument('--budgets', type=int, nargs='+', help="iterations; the table's own if left out")
    parser.add_argument('--shares', type=float, nargs='+', default=[], help="of the MACs; the table's own if left out")
    parser.add_argument('--device', default='cpu', help='where CIFAR-10 is trained on')
    parser.add_argument('--choose-lr', action='store_true', help='try learning rates on held-out pictures first')
    parser.add_argument('--rates', type=float, nargs='+', help="those to try; the table's own if left out")
    parser.add_argument('--rate', type=float, help='train at this rate, whatever was chosen')
    parser.add_argument('--latency', action='store_true', help='only time the pruned models')
    parser.add_argument('--list', action='store_true', help='only list the rows')
    parser.add_argument('--data', type=Path, default=Path('data'))
    parser.add_argument('--weights', type=Path, default=Path('checkpoints'))
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/accuracy'))
    parser.add_argument('--results', type=Path, default=RESULTS, help='folder of the JSON files')
    args = parser.parse_args(arguments)
    if args.device != 'cpu' and args.table.startswith('camvid'):
        parser.error('--device is for CIFAR-10; CamVid is trained on the CPU')
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    if args.table == 'report':
        stores = {name: Store(args.results / f'accuracy_{name}.json') for name in TABLES}
        accuracy_report.write_between(ROOT / 'docs' / 'results.md', accuracy_report.report(stores))
        accuracy_report.write_between(ROOT / 'README.md', accuracy_report.summary(stores))
        return
    warnings.filterwarnings('ignore')  # torch and OpenMMLab about each other
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
    store = Store(args.results / f'accuracy_{args.table}.json')
    task = build_task(args)
    chosen = task, store, args.seeds, args.rows, args.budgets or task.budgets, args.shares
    if args.list:
        for case in cases(*chosen):
            print('done' if store.has('rows', case) else '    ', case)
        return
    runner = Runner(task)
    with DefaultScope.overwrite_default_scope('mmseg' if args.table.startswith('camvid') else 'mmpretrain'):
        if args.choose_lr:
            wanted = list(cases(*chosen))
            choose_rates(runner, store, wanted, args.rates or task.rates)
        wanted = list(cases(*chosen))
        if args.latency:
            measure_latency(runner, store, [case for case in wanted if case.seed == args.seeds[0]])
        else:
            forced = [replace(case, rate=args.rate if case.iterations else 0.0) for case in wanted]
            run_table(runner, store, wanted if args.rate is None else forced)


if __name__ == '__main__':
    main()
