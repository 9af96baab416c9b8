"""Sweep the model zoo: comb, mask, slim, count and export one model of every architecture family.

    python benchmarks/zoo.py                        # everything, one process each, hours on one core
    python benchmarks/zoo.py --only resnet --only mmseg/unet
    python benchmarks/zoo.py --resume               # what the results file has not yet; --failed: what did not pass
    python benchmarks/zoo.py --list                 # the families, and the folders that are out, with the reason
    python benchmarks/zoo.py --rotate               # rotate alone, in families that the results file has
    python benchmarks/zoo.py --report               # the table from the results as they are

For each family (see `zoo_models.py`), with random weights and on one thread:

1. `comb`, timed against one forward pass, both medians, float32;
2. a random 70 % of each group stays;
3. the masked model against the slimmed one, float64: relative error at most 1e-9, while the same comparison with the
   keep rotated by one unit must fail (float32, 1e-4, where a forward has float32 written into it);
4. the same for another batch, another size, another keep, in training with gradients, in a fresh process (see
   `zoo_uses.py`); where the dense model does not run in one of these, the table says so;
5. `Coupling.cost` against torch's flop counter and a parameter count on the slimmed model: equal, to the last one;
6. ONNX export of the slimmed model, and parity in ONNX Runtime, float32;
7. `rotate_` on the model, float64: the outputs change by at most 1e-10, relative (float32, 1e-4, as above), while a
   change by a tenth of one weight that was written must show;
8. Torch-Pruning on the same model: 30 % by magnitude, local, the classifier left out; does it build its graph, does
   the pruned model still run, is the output's shape still the same.

The checks are in `zoo_checks.py`, `zoo_uses.py` and `zoo_peer.py`, verdicts and table in `zoo_report.py`. Results go to
`benchmarks/results/zoo.json` as they come, the table to `docs/zoo.md`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.zoo_checks import MARK, ROOT, Row, stage, sweep_onnx, sweep_ours, sweep_rotate
from benchmarks.zoo_family import Family, build
from benchmarks.zoo_models import FAMILIES, OUT, unlisted
from benchmarks.zoo_peer import sweep_peer
from benchmarks.zoo_report import complete, passed, report, verdict
from benchmarks.zoo_uses import reopen, sweep_uses

RESULTS = ROOT / 'benchmarks' / 'results' / 'zoo.json'
TABLE = ROOT / 'docs' / 'zoo.md'
PACKAGES = (
    'torch', 'torchvision', 'onedl-mmpretrain', 'onedl-mmsegmentation', 'onedl-mmdetection', 'onnx', 'onnxruntime',
    'torch_pruning',
)  # fmt: skip


def child(family: Family, seed: int, gigabytes: float, peer: bool) -> None:
    """Sweep one family and print each part of its row when it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')

    def tell(part: Row) -> None:
        print(MARK + json.dumps(part), flush=True)

    row: Row = {}
    with stage(row, 'build'):
        model, inputs = build(family, seed)
    if 'error' in row:
        tell({'build': row})
        return
    tell({'rotate': sweep_rotate(model, inputs)})
    ours, done = sweep_ours(model, inputs, seed)
    tell({'ours': ours})
    if done is not None:
        tell({'uses': sweep_uses(family, done, seed)})
        tell({'onnx': sweep_onnx(copy.deepcopy(model), done.small, inputs)})
    del done
    if peer:
        tell({'peer': sweep_peer(model, inputs)})


# -- the sweep ---------------------------------------------------------------------------------------------------------
def run_child(family: Family, seconds: float, gigabytes: float, seed: int, peer: Row | None = None) -> Row:
    """Run one family in its own process within limits; what it told before it died counts.

    `peer` is what an earlier sweep found for Torch-Pruning; None: run it.
    """
    command = [sys.executable, __file__, '--child', family.key, '--limit-gb', str(gigabytes), '--seed', str(seed)]
    command += ['--keep-peer'] if peer is not None else []
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    environment |= {'MALLOC_MMAP_THRESHOLD_': str(2**26)}  # large tensors that are freed go back
    start = time.perf_counter()
    row: Row = {'family': family.key, 'config': family.config, 'input': [family.batch, family.channels, *family.size]}
    died = None
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        out, err = process.communicate(timeout=seconds)
        if process.returncode:
            died = f'exit {process.returncode}: {err.strip().splitlines()[-1][:300] if err.strip() else "no message"}'
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        died = f'no end within {seconds:.0f} s'
    last = 'start'
    for line in out.splitlines():
        if line.startswith(MARK):
            part = json.loads(line.removeprefix(MARK))
            last = part.pop('stage', last)
            row |= part
    if peer is not None:
        row['peer'] = peer
    row['seconds'] = round(time.perf_counter() - start, 1)
    if died:
        row['died'] = f'{last}: {died}'
    return row | {'verdict': verdict(row)}


def meta(options: str) -> Row:
    """Describe the run: versions, machine, date, command."""
    return {
        'date': datetime.date.today().isoformat(),
        'command': f'python benchmarks/zoo.py {options}',
        'python': platform.python_version(),
        'machine': f'{platform.machine()}, {os.cpu_count()} cores, one thread',
        'versions': {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def save(path: Path, rows: dict[str, Row], about: Row) -> None:
    """Write the results in the order of the table, in one go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ordered = {f.key: rows[f.key] for f in FAMILIES if f.key in rows}
    new = path.with_suffix('.new')
    new.write_text(json.dumps({'about': about, 'out': OUT, 'families': ordered}, indent=1) + '\n')
    new.replace(path)


def choose(args: argparse.Namespace, rows: dict[str, Row]) -> list[Family]:
    """Choose the families to sweep.

    Raises:
        SystemExit: if a name given with --only is no family's.
    """
    names = {f.key for f in FAMILIES} | {f.name for f in FAMILIES}
    if unknown := set(args.only) - names:
        raise SystemExit(f'--only {", ".join(sorted(unknown))}: no such family; --list names them')
    chosen = [f for f in FAMILIES if not args.only or f.key in args.only or f.name in args.only]
    if args.resume:
        chosen = [f for f in chosen if f.key not in rows or not complete(rows[f.key])]
    if args.failed:
        chosen = [f for f in chosen if f.key not in rows or not passed(rows[f.key])]
    return chosen


def sweep(args: argparse.Namespace) -> dict[str, Row]:
    """Run the chosen families; save after each."""
    partial = args.resume or args.failed or args.only
    rows: dict[str, Row] = json.loads(args.out.read_text())['families'] if partial and args.out.exists() else {}
    families = choose(args, rows)
    about = meta(f'--jobs {args.jobs} --seed {args.seed}' + (' --keep-peer' if args.keep_peer else ''))
    earlier = json.loads(RESULTS.read_text())['families'] if args.keep_peer else {}
    start = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(run_child, f, args.limit_seconds, args.limit_gb, args.seed, earlier.get(f.key, {}).get('peer'))
            for f in families
        ]
        for done, job in enumerate(as_completed(jobs), 1):
            row = job.result()
            rows[row['family']] = row
            save(args.out, rows, about)
            left = (time.perf_counter() - start) / done * (len(jobs) - done) / 60
            print(f'[{done}/{len(jobs)}, {left:.0f} min left] {row["family"]}: {row["verdict"]}', flush=True)
    return rows


def sweep_rotations(args: argparse.Namespace) -> None:
    """Rotate the chosen families of the results file, in this process; the rest of their rows is kept."""
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    stored = json.loads(args.out.read_text())
    rows: dict[str, Row] = stored['families']
    families = [f for f in choose(args, rows) if f.key in rows]
    for done, family in enumerate(families, 1):
        row = rows[family.key]
        row['rotate'] = sweep_rotate(*build(family, args.seed))
        row['verdict'] = verdict(row)
        save(args.out, rows, stored['about'])
        heads = f'{row["rotate"].get("heads")} / {row["rotate"].get("found")} heads'
        print(f'[{done}/{len(families)}] {family.key}: {heads}, {row["verdict"]}', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', action='append', default=[], help='a family, as `resnet` or `mmseg/unet`; repeatable')
    parser.add_argument('--resume', action='store_true', help='sweep only what the results file has not')
    parser.add_argument('--failed', action='store_true', help='sweep again what did not pass')
    parser.add_argument('--rotate', action='store_true', help='only rotate, and fill that in where a row is there')
    parser.add_argument('--jobs', type=int, default=1, choices=(1, 2))
    parser.add_argument('--limit-seconds', type=float, default=900, help='per family')
    parser.add_argument('--limit-gb', type=float, default=14, help='address space per family')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--table', type=Path, default=TABLE)
    parser.add_argument('--list', action='store_true', help='print the families and what is out')
    parser.add_argument('--report', action='store_true', help='write the table from the results as they are')
    parser.add_argument(
        '--keep-peer',
        action='store_true',
        help="take Torch-Pruning's column from the results: it does not depend on mmcpd",
    )
    parser.add_argument('--child', help=argparse.SUPPRESS)
    parser.add_argument('--reopen', help=argparse.SUPPRESS)
    parser.add_argument('--file', type=Path, action='append', default=[], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(next(f for f in FAMILIES if f.key == args.child), args.seed, args.limit_gb, not args.keep_peer)
        return
    if args.reopen:
        reopen(next(f for f in FAMILIES if f.key == args.reopen), args.file)
        return
    if args.list:
        print('\n'.join(f'{f.key:32} {f.config or "written out"}' for f in FAMILIES))
        print('\n'.join(f'{key:32} out: {reason}' for key, reason in OUT.items()))
        print('\n'.join(f'{key:32} unknown: put it into FAMILIES or OUT' for key in unlisted()))
        return
    if args.rotate:
        sweep_rotations(args)
    elif not args.report:
        sweep(args)
    report(args.out, args.table)


if __name__ == '__main__':
    main()
