"""What a teacher adds to a training iteration, measured in pairs: none, and the unpruned model itself.

    OMP_NUM_THREADS=1 python benchmarks/teacher_cost.py
    python benchmarks/teacher_cost.py --only seaformer --rounds 15
    python benchmarks/teacher_cost.py --report      # the table again, from the results

In each round both modes do one iteration (teacher, student, losses, backward, optimizer) on the same batch with the
same student, in an order that changes; its time is divided by that of the mode without a teacher in the same round.
Reported: medians of times and of ratios. Results go to `benchmarks/results/teacher_cost.json`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.study_report import write_table
from mmcpd.engine.build import build_dense

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'teacher_cost.json'
CONFIGS = {'seaformer': 'seaformer_prune_cwd.py', 'resnet50': 'resnet50_prune.py'}
MODES = ('none', 'self')
Row = dict[str, Any]


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', choices=CONFIGS, nargs='+', default=list(CONFIGS))
    parser.add_argument('--rounds', type=int, default=9)
    parser.add_argument('--warm-up', type=int, default=2, metavar='ROUNDS')
    parser.add_argument('--batch', type=int, help="default: the config's")
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--docs', type=Path, default=ROOT / 'docs' / 'distillation.md')
    parser.add_argument('--report', action='store_true', help='only write the table from the results')
    return parser.parse_args(arguments)


def iterations(cfg: Config) -> dict[str, Callable[[], None]]:
    """Return a training iteration for each mode, all of one student on one batch."""
    torch.manual_seed(0)
    student = build_dense(cfg)
    student.init_weights()
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-4, momentum=0.9)
    result = {}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
        data = student.data_preprocessor(batch, training=True)
        for mode in MODES:
            teacher = None if mode == 'none' else copy.deepcopy(student)
            wrapped = {**cfg.model, 'student': student, 'teacher': teacher}
            model = MODELS.build(wrapped).train()

            def iterate(model: torch.nn.Module = model) -> None:
                optimizer.zero_grad()
                losses = model(**data, mode='loss')
                model.parse_losses(losses)[0].backward()
                optimizer.step()

            result[mode] = iterate
    return result


def measure(name: str, args: argparse.Namespace) -> list[Row]:
    """Measure one config, and return a row for each mode."""
    cfg = Config.fromfile(ROOT / 'configs' / 'cpd' / CONFIGS[name])
    if args.batch:
        cfg.train_dataloader.batch_size = args.batch
    steps = iterations(cfg)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(args.warm_up + args.rounds):
        for mode in MODES if number % 2 else reversed(MODES):
            start = time.perf_counter()
            steps[mode]()
            times[mode].append(time.perf_counter() - start)
        print(name, number, *(f'{mode} {seconds[-1]:.3f} s' for mode, seconds in times.items()), flush=True)
    kept = {mode: seconds[args.warm_up :] for mode, seconds in times.items()}
    return [
        {
            'model': name,
            'mode': mode,
            'batch': cfg.train_dataloader.batch_size,
            'rounds': args.rounds,
            'seconds': statistics.median(seconds),
            'ratio': statistics.median(a / b for a, b in zip(seconds, kept['none'], strict=True)),
            'first_s': times[mode][0],
        }
        for mode, seconds in kept.items()
    ]


def table(report: Row) -> str:
    """Return the Markdown table of a report."""
    lines = [
        f'*One training iteration in pairs, medians of {report["results"][0]["rounds"]} rounds; torch '
        f'{report["torch"]}, {report["threads"]} thread(s), load {report["load_before"]:.1f} on {report["cores"]} '
        f'cores, {report["date"]}.*',
        '',
        '| model, batch | teacher | iteration | ratio to none | first iteration |',
        '| --- | --- | --- | --- | --- |',
    ]
    for row in report['results']:
        lines.append(
            f'| {row["model"]}, {row["batch"]} | {row["mode"]} | {row["seconds"]:.3f} s | {row["ratio"]:.2f} | '
            f'{row["first_s"]:.1f} s |'
        )
    return '\n'.join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, save, and write the table.

    Raises:
        ValueError: The document has no place for the table.
    """
    if not args.report:
        warnings.filterwarnings('ignore')  # torch and OpenMMLab about each other
        torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
        report = {
            'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            'torch': torch.__version__,
            'python': platform.python_version(),
            'threads': torch.get_num_threads(),
            'cores': os.cpu_count(),
            'load_before': os.getloadavg()[1],
            'results': [row for name in args.only for row in measure(name, args)],
        }
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(report, indent=1) + '\n')
    text = table(json.loads(args.results.read_text()))
    write_table(args.docs, 'teacher_cost', text)
    print(text)


if __name__ == '__main__':
    main(parse_args())
