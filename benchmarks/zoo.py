"""Sweep the model zoo: comb, mask, slim, count and export one model of every architecture family.

    python benchmarks/zoo.py                        # everything, one process each, about an hour on one core
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
4. `Coupling.cost` against torch's flop counter and a parameter count on the slimmed model: equal, to the last one;
5. ONNX export of the slimmed model, and parity in ONNX Runtime, float32;
6. `rotate_` on the model, float64: the outputs change by at most 1e-10, relative (float32, 1e-4, as above), while a
   change by a tenth of one weight that was written must show;
7. Torch-Pruning on the same model: 30 % by magnitude, local, the classifier left out; does it build its graph, does
   the pruned model still run, is the output's shape still the same.

Results go to `benchmarks/results/zoo.json` as they come, the table to `docs/zoo.md`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import io
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.zoo_models import FAMILIES, OUT, Deployed, Family, build, unlisted

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'zoo.json'
TABLE = ROOT / 'docs' / 'zoo.md'
KEEP = 0.7
TOLERANCE = {'float64': 1e-9, 'float32': 1e-4}
ROTATED_TOLERANCE = {'float64': 1e-10, 'float32': 1e-4}
ONNX_TOLERANCE = 1e-3
PEER_SECONDS = 90
MARK = '@@zoo '
PACKAGES = ('torch', 'onedl-mmpretrain', 'onedl-mmsegmentation', 'onnx', 'onnxruntime', 'torch_pruning')
Row = dict[str, Any]


# -- one family, in its own process ------------------------------------------------------------------------------------
def relative(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> float:
    """Return the largest difference, relative to the largest value of `b`; infinite where shapes differ."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float('inf')
    gaps = [float((s - t).abs().max() / t.abs().max().clamp(min=1e-30)) for s, t in zip(a, b, strict=True)]
    return max(gap if gap == gap else float('inf') for gap in gaps)


def outputs(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Run a model; random numbers that it draws are the same each time."""
    from mmcpd.random_state import seeded

    with seeded(0):
        return model(x)


def timed(call: Callable[[], Any], most: int = 5, budget: float = 10.0) -> float:
    """Return the median of up to `most` calls in seconds; fewer once `budget` seconds are gone."""
    times: list[float] = []
    while len(times) < most and sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def random_keep(found: Any, seed: int) -> dict[str, Tensor]:
    """Keep a random 70 % of each group's units, at least one."""
    g = torch.Generator().manual_seed(seed)
    keep = found.keep()
    for mine in keep.values():
        mine[torch.randperm(len(mine), generator=g)[max(1, round(KEEP * len(mine))) :]] = False
    return keep


@contextmanager
def stage(row: Row, name: str) -> Iterator[None]:
    """Time a stage, and turn an exception into a result: its last frames say where."""
    print(MARK + json.dumps({'stage': name}), flush=True)
    start = time.perf_counter()
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a sweep reports whatever a model raises, and goes on
        row['error'] = f'{name}: {type(error).__name__}: {str(error)[:600]}'
        text = traceback.format_exc().replace(f'{sysconfig.get_path("purelib")}{os.sep}', '')
        row['traceback'] = text.replace(f'{ROOT}{os.sep}', '').splitlines()[-14:]
    row['seconds'] = round(row.get('seconds', 0) + time.perf_counter() - start, 2)


def sweep_ours(model: Deployed, x: Tensor, seed: int) -> tuple[Row, nn.Module | None]:
    """Comb, mask, slim, compare and count; return the row and the slimmed model."""
    from mmcpd.comb import comb
    from mmcpd.slim import mask_, slim

    row: Row = {}
    small = None
    with stage(row, 'comb'), torch.no_grad():
        model(x)
        row['forward_s'] = timed(lambda: model(x))
        found = comb(model, x)
        row['comb_s'] = timed(lambda: comb(model, x), most=3)
        prunable, total = found.prunable()
        reasons = found.reasons().most_common(4)
        row |= {'groups': len(found.groups), 'units': found.units, 'params': total, 'prunable': prunable / total}
        row['frozen'] = [f'{reason} ({rows} rows)' for reason, rows in reasons]
        row['unsupported'] = sorted({op for op, _ in found.unsupported})
    if 'error' in row:
        return row, None
    keep = random_keep(found, seed)
    with stage(row, 'slim'), torch.no_grad():
        double, z, row['dtype'] = in_double(model, x)
        small = slim(double, found, keep)
        masked = copy.deepcopy(double)
        mask_(masked, found, keep)
        row['error_masked_slim'] = relative(outputs(small, z), outputs(masked, z))
        turned = slim(double, found, {name: mine.roll(1) for name, mine in keep.items()})
        row['error_control'] = relative(outputs(turned, z), outputs(masked, z))
        row['params_slim'] = sum(p.numel() for p in small.parameters())
    if 'error' in row:
        return row, None
    with stage(row, 'cost'), torch.no_grad():
        cost = found.cost(keep)
        row |= {'macs_slim': count_macs(small, z), 'macs_cost': cost.macs, 'params_cost': cost.params}
        row['macs_dense'] = found.cost(found.keep()).macs
    return row, small


def in_double(model: Deployed, x: Tensor) -> tuple[Deployed, Tensor, str]:
    """Return a float64 copy and its input, or float32 ones where a forward has float32 written into it."""
    double = copy.deepcopy(model).double()
    try:
        if all(t.dtype == torch.float64 for t in double(x.double())):
            return double, x.double(), 'float64'
    except RuntimeError as error:
        if 'dtype' not in str(error) and 'type' not in str(error):
            raise
    return copy.deepcopy(model), x, 'float32'


@torch.no_grad()
def sweep_rotate(model: Deployed, x: Tensor) -> Row:
    """Rotate a copy, and compare its outputs; a control changes one weight that was written."""
    from mmcpd.rotate import rotate_

    row: Row = {}
    with stage(row, 'rotate'):
        double, z, row['dtype'] = in_double(model, x)
        before = outputs(double, z)
        done = rotate_(double, z)
        row |= {'heads': done.heads, 'found': done.found, 'gap': relative(outputs(double, z), before)}
        row['left_alone'] = str(done).splitlines()[1:]
        if done.rotated:
            double.get_parameter(done.rotated[-1].layers[-1]).mul_(1.1)
            row['gap_control'] = relative(outputs(double, z), before)
    return row


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Count multiply-accumulates with torch's own counter; attention as the matrix products it is."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x)
    return counter.get_total_flops() // 2


def sweep_onnx(dense: Deployed, small: nn.Module, x: Tensor) -> Row:
    """Export the slimmed model and compare it in ONNX Runtime; if it cannot, say whether the dense one can."""
    row: Row = {}
    with stage(row, 'export'), torch.no_grad():
        small = small.float()
        row |= parity(small, x)
    if 'error' in row:
        del row['traceback']
        other: Row = {}
        with stage(other, 'export of the dense model'), torch.no_grad():
            parity(dense, x)
        row['dense_error'] = other.get('error')
    return row


def parity(model: nn.Module, x: Tensor) -> Row:
    """Export with the TorchScript exporter, or else with torch.export's, and compare; return error and exporter."""
    import onnxruntime

    from mmcpd.deploy.drawn import Fixed

    expected = outputs(model, x)
    fixed = Fixed(model, None, (x,))
    model = fixed if fixed.count else model
    failures = []
    for dynamo in (False, True):
        file = io.BytesIO()
        try:
            if dynamo:
                torch.onnx.export(model, (x,), dynamo=True).save(file)
            else:
                torch.onnx.export(model, (x,), file, dynamo=False, opset_version=18)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(file.getvalue(), options, providers=['CPUExecutionProvider'])
            got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        except Exception as error:  # noqa: BLE001 - the exporters raise anything; both failures are reported
            failures.append(f'{"dynamo" if dynamo else "torchscript"}: {type(error).__name__}: {str(error)[:300]}')
            continue
        gap = relative(tuple(torch.from_numpy(t) for t in got), expected)
        return {'error_parity': gap, 'exporter': 'dynamo' if dynamo else 'torchscript', 'bytes': len(file.getvalue())}
    raise RuntimeError('; '.join(failures))


def sweep_peer(model: Deployed, x: Tensor) -> Row:
    """Prune 30 % with Torch-Pruning by magnitude, as its high-level pruner is documented, within `PEER_SECONDS`."""
    import torch_pruning

    def late(*_: Any) -> None:
        raise TimeoutError(f'no end within {PEER_SECONDS} s')

    signal.signal(signal.SIGALRM, late)
    signal.alarm(PEER_SECONDS)

    before = [t.shape for t in model(x)]
    row: Row = {'params': sum(p.numel() for p in model.parameters()), 'graph': False, 'runs': False}
    with stage(row, 'graph'):
        pruner = torch_pruning.pruner.BasePruner(
            model,
            x,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=1 - KEEP,
            global_pruning=False,
            ignored_layers=classifiers(model, x),
        )
        row['graph'] = True
    if 'error' not in row:
        with stage(row, 'prune'):
            pruner.step()
    if 'error' not in row:
        with stage(row, 'forward'), torch.no_grad():
            after = [t.shape for t in model(x)]
            row |= {'runs': True, 'shape': after == before}
    signal.alarm(0)
    row['removed'] = 1 - sum(p.numel() for p in model.parameters()) / row['params']
    return row


@torch.no_grad()
def classifiers(model: Deployed, x: Tensor) -> list[nn.Module]:
    """List the convolutions and linear layers that make the outputs: the last to run, and those in heads as wide."""
    ran: list[nn.Module] = []
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    handles = [m.register_forward_hook(lambda m, *_: ran.append(m)) for m in layers.values()]
    try:
        widths = {t.shape[min(1, t.dim() - 1)] for t in model(x)}
    finally:
        for handle in handles:
            handle.remove()
    return [m for n, m in layers.items() if m is ran[-1] or ('head' in n and m.weight.shape[0] in widths)]


def child(family: Family, seed: int, gigabytes: float, peer: bool) -> None:
    """Sweep one family and print each part of its row when it is known."""
    resource.setrlimit(resource.RLIMIT_AS, (int(gigabytes * 2**30),) * 2)
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')

    def tell(part: Row) -> None:
        print(MARK + json.dumps(part), flush=True)

    row: Row = {}
    with stage(row, 'build'):
        model, x = build(family, seed)
    if 'error' in row:
        tell({'build': row})
        return
    tell({'rotate': sweep_rotate(model, x)})
    ours, small = sweep_ours(model, x, seed)
    tell({'ours': ours})
    if small is not None:
        tell({'onnx': sweep_onnx(copy.deepcopy(model), small, x)})
    del small
    if peer:
        tell({'peer': sweep_peer(model, x)})


# -- the sweep ---------------------------------------------------------------------------------------------------------
def run_child(family: Family, seconds: float, gigabytes: float, seed: int, peer: Row | None = None) -> Row:
    """Run one family in its own process within limits; what it told before it died counts.

    `peer` is what an earlier sweep found for Torch-Pruning; None: run it.
    """
    command = [sys.executable, __file__, '--child', family.key, '--limit-gb', str(gigabytes), '--seed', str(seed)]
    command += ['--keep-peer'] if peer is not None else []
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    start = time.perf_counter()
    row: Row = {'family': family.key, 'config': family.config, 'input': [1, family.channels, *family.size]}
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


def verdict(row: Row) -> str:
    """Say in one word or line what became of a family: `pass`, or what failed; `WRONG` is what nothing had reported."""
    ours, onnx = row.get('ours', {}), row.get('onnx', {})
    if 'error' in row.get('build', {}):
        return row['build']['error']
    if 'error' in ours:
        return ours['error']
    if not ours:
        return row.get('died', 'no result')
    if (fault := rotation_fault(row.get('rotate', {}))) is not None:
        return fault
    if not ours['groups']:
        return 'nothing can be pruned'
    tolerance = TOLERANCE[ours['dtype']]
    if ours['error_masked_slim'] > tolerance:
        return f'WRONG: masked and slimmed differ by {ours["error_masked_slim"]:.1e}'
    if ours['error_control'] <= 100 * tolerance:
        return f'the control does not differ ({ours["error_control"]:.1e})'
    if ours['params_slim'] != ours['params_cost']:
        return f'WRONG: cost has {ours["params_cost"]} parameters, the slim model {ours["params_slim"]}'
    if ours['macs_slim'] != ours['macs_cost']:
        return f'WRONG: cost has {ours["macs_cost"]} MACs, the slim model {ours["macs_slim"]}'
    if not onnx:
        return row.get('died', 'no ONNX result')
    if 'error' in onnx:
        return f'ONNX: {onnx["error"]}' if not onnx['dense_error'] else 'pass (dense does not export either)'
    if onnx['error_parity'] > ONNX_TOLERANCE:
        return f'ONNX differs by {onnx["error_parity"]:.1e}'
    return 'pass'


def rotation_fault(rotate: Row) -> str | None:
    """Say what went wrong in rotating, if anything."""
    if not rotate:
        return 'not rotated; --rotate does'
    if 'error' in rotate:
        return rotate['error']
    tolerance = ROTATED_TOLERANCE[rotate['dtype']]
    if rotate['gap'] > tolerance:
        return f'WRONG: rotated, the outputs differ by {rotate["gap"]:.1e}'
    if rotate.get('gap_control', 1.0) <= tolerance:
        return f'the control of rotating does not differ ({rotate["gap_control"]:.1e})'
    return None


def passed(row: Row) -> bool:
    return row['verdict'].startswith('pass')


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
        chosen = [f for f in chosen if f.key not in rows]
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


# -- the table ---------------------------------------------------------------------------------------------------------
def summary(rows: dict[str, Row]) -> dict[str, Any]:
    """Count what passed, and take the medians."""
    combed = [r['ours'] for r in rows.values() if 'comb_s' in r.get('ours', {})]
    peers = [r.get('peer', {}) for r in rows.values()]
    return {
        'families': len(rows),
        'passed': sum(map(passed, rows.values())),
        'silently wrong': sum(r['verdict'].startswith('WRONG') for r in rows.values()),
        'median comb seconds': statistics.median(o['comb_s'] for o in combed) if combed else None,
        'median comb / forward': statistics.median(o['comb_s'] / o['forward_s'] for o in combed) if combed else None,
        'at least 95 % of the parameters prunable': sum(o['prunable'] >= 0.95 for o in combed),
        'median prunable': statistics.median(o['prunable'] for o in combed) if combed else None,
        'families with heads that are rotated': sum(bool(r.get('rotate', {}).get('heads')) for r in rows.values()),
        'heads rotated': sum(r.get('rotate', {}).get('heads', 0) for r in rows.values()),
        'heads found': sum(r.get('rotate', {}).get('found', 0) for r in rows.values()),
        'Torch-Pruning runs': sum(bool(p.get('runs')) for p in peers),
        'Torch-Pruning runs, same shape': sum(bool(p.get('shape')) for p in peers),
    }


def line(row: Row) -> str:
    """Write one family's line of the table."""
    ours, onnx, peer = row.get('ours', {}), row.get('onnx', {}), row.get('peer', {})
    cells = [row['family']]
    if 'comb_s' in ours:
        cells += [str(ours['groups']), str(ours['units']), f'{ours["prunable"]:.1%}', '; '.join(ours['frozen'][:2])]
        cells += [f'{ours["comb_s"]:.2f} / {ours["forward_s"]:.2f}']
    else:
        cells += [''] * 5
    gap = ours.get('error_masked_slim')
    cells.append('' if gap is None else f'{gap:.0e}' + ('' if ours['dtype'] == 'float64' else ' (float32)'))
    turned = row.get('rotate', {})
    cells.append(f'{turned["heads"]} / {turned["found"]}' if turned.get('found') else '')
    cells.append(f'{onnx["error_parity"]:.0e}' if 'error_parity' in onnx else 'no')
    cells.append(row['verdict'].split('\n')[0][:120])
    cells.append(peer_cell(peer, row.get('died')))
    return '| ' + ' | '.join(cell.replace('|', '\\|') for cell in cells) + ' |'


def peer_cell(peer: Row, died: str | None) -> str:
    """Say how Torch-Pruning fared."""
    if not peer:
        return (died or 'not reached')[:80]
    if 'error' in peer:
        return peer['error'].split('\n')[0][:80]
    return f'runs, -{peer["removed"]:.0%}' + ('' if peer['shape'] else ', output shape changed')


LEGEND = """# The zoo

Written by `benchmarks/zoo.py`; do not edit. One model of each architecture family of the installed mmpretrain and
mmseg that needs nothing beyond them (what is out stands below), and our SeaFormer; random weights, a random 70 % of
each group kept.

- **groups, units**: what combing found; a unit is a channel with everything that is coupled to it.
- **prunable parameters**: the share that lies in a row of some unit.
- **frozen, and why**: the largest reasons, with the number of rows (indices of a dimension of a parameter) of each.
- **comb / forward**: seconds for combing and for one forward pass, float32, one thread of a shared machine.
- **masked against slim**: largest difference of outputs, relative to the largest output, float64 unless noted. The
  same with each keep shifted by one unit must differ, or the family fails.
- **heads rotated**: of the attention heads that were found, those of which queries and keys, or values and the
  projection, were rotated (`mmcpd.rotate`). Outputs change by at most 1e-10 of the largest, float64 (float32: 1e-4),
  or the family fails.
- **ONNX parity**: the same between torch and ONNX Runtime, float32.
- **Torch-Pruning**: asked for 30 % by magnitude on the same model, in the same run or with
  `--keep-peer` in an earlier one: does the pruned model run, and
  which share of its parameters went. That it runs does not say that the result is right.
"""


def report(results: Path, table: Path) -> None:
    """Write the table in Markdown, and print the summary."""
    stored = json.loads(results.read_text())
    about, rows = stored['about'], stored['families']
    totals = {k: f'{v:.3g}' if isinstance(v, float) else v for k, v in summary(rows).items()}
    head = (
        'family | groups | units | prunable parameters | frozen, and why | comb / forward (s) | masked against slim '
        '| heads rotated | ONNX parity | verdict | Torch-Pruning'
    )
    lines = [
        *LEGEND.splitlines(),
        *([f'Swept: {len(rows)} of {len(FAMILIES)}; `--resume` sweeps the rest.'] if len(rows) < len(FAMILIES) else []),
        '',
        f'{about["date"]}, Python {about["python"]}, {about["machine"]}; '
        + ', '.join(f'{k} {v}' for k, v in about['versions'].items())
        + f'; `{about["command"]}`',
        '',
        *(f'- {k}: {v}' for k, v in totals.items()),
        '',
        f'| {head} |',
        '|' + '---|' * (head.count('|') + 1),
        *map(line, rows.values()),
        '',
        '## Folders that are out',
        '',
        '| folder | why |',
        '|---|---|',
        *(f'| {key} | {reason} |' for key, reason in stored['out'].items()),
        '',
    ]
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text('\n'.join(lines))
    for key, value in totals.items():
        print(f'{key}: {value}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--only', action='append', default=[], help='a family, as `resnet` or `mmseg/unet`; repeatable')
    parser.add_argument('--resume', action='store_true', help='sweep only what the results file has not')
    parser.add_argument('--failed', action='store_true', help='sweep again what did not pass')
    parser.add_argument('--rotate', action='store_true', help='only rotate, and fill that in where a row is there')
    parser.add_argument('--jobs', type=int, default=1, choices=(1, 2))
    parser.add_argument('--limit-seconds', type=float, default=300, help='per family')
    parser.add_argument('--limit-gb', type=float, default=12, help='address space per family')
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
    args = parser.parse_args()
    if args.child:
        child(next(f for f in FAMILIES if f.key == args.child), args.seed, args.limit_gb, not args.keep_peer)
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
