"""A latency target against a MACs target at equal MACs: how fast the files are, measured in pairs in ONNX Runtime.

    python benchmarks/latency_target.py                      # ResNet-50, MobileNetV2 and DeiT-S, on a quiet machine
    python benchmarks/latency_target.py --only mobilenetv2 --runs 20
    python benchmarks/latency_target.py report               # the table alone

Weights are random, and so are the scores (`--scores`): what is compared is where units go, not accuracy. `any width` is
a MACs target with `round_to=1`, `macs` one with `round_to=8`, and `latency` divides scores by time and takes the
latency at which as many MACs are left. Results go to `benchmarks/results/latency_target.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling, Keep, aligned
from mmcpd.deploy import export_onnx, measure_latency, with_latency
from mmcpd.deploy.times import Machine
from mmcpd.engine.build import as_config, build_dense
from mmcpd.engine.compat import mend_scopes
from mmcpd.engine.passes import DEPLOYED
from mmcpd.files import write_json
from mmcpd.progress import ProgressLine
from mmcpd.prune import normalize, reachable, score, select, shares
from mmcpd.slim import slim

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'latency_target.json'
MODELS = {
    'resnet50': 'configs/cpd/resnet50_prune_in1k.py',
    'mobilenetv2': 'configs/cpd/mobilenetv2_prune_in1k.py',
    'deit-s': 'configs/cpd/deit_prune_in1k.py',
}
HALVINGS = 12  # of the search for the latency that leaves as many MACs


def scores_of(model: nn.Module, coupling: Coupling, how: str, seed: int) -> dict[str, Tensor]:
    """Return one score a unit, drawn at random or of the weights' magnitude."""
    if how == 'magnitude':
        return dict(score(model, coupling, [], importance='magnitude'))
    generator = torch.Generator().manual_seed(seed)
    return {group.name: torch.rand(group.units, generator=generator) for group in coupling.groups}


def chosen(coupling: Coupling, scores: Mapping[str, Tensor], macs: float) -> dict[str, Keep]:
    """Return which units are kept where this share of the MACs is left, by each way of choosing."""
    dense = coupling.keep()
    by = {name: normalize(scores, coupling, dense, by=name) for name in ('macs', 'latency')}
    found = {
        'any width': select(by['macs'], coupling, dense, {'macs': macs}, round_to=1),
        'macs': select(by['macs'], coupling, dense, {'macs': macs}),
    }
    low, high = reachable(coupling)['latency'] * (1 + 1e-9), 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        keep = select(by['latency'], coupling, dense, {'latency': middle})
        low, high = (low, middle) if shares(coupling, keep)['macs'] > macs else (middle, high)
    return {**found, 'latency': select(by['latency'], coupling, dense, {'latency': low})}


def measure(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Prune one model in each way, and time all files and the dense one in turns."""
    torch.manual_seed(args.seed)
    mend_scopes()
    model = build_dense(as_config(str(ROOT / config))).eval()
    x = torch.randn(1, 3, args.size, args.size)
    coupling = with_latency(
        model, comb(model, x, forward=DEPLOYED), inputs=x, forward=DEPLOYED, threads=args.threads, folder=args.cache,
        progress=ProgressLine('timing layers', 'layers'),
    )  # fmt: skip
    keeps = chosen(coupling, scores_of(model, coupling, args.scores, args.seed), args.macs)
    with tempfile.TemporaryDirectory() as folder:
        models = {'dense': model, **{name: slim(model, coupling, keep) for name, keep in keeps.items()}}
        files = {
            name: export_onnx(each, x, Path(folder, f'{name}.onnx'), dynamic_batch=False, forward=DEPLOYED)
            for name, each in models.items()
        }
        line = ProgressLine('measuring', 'rounds')
        timed = measure_latency(files, x, args.runs, args.time_limit, threads=args.threads, progress=line)
    rows = [{**asdict(timed[0]), 'left': shares(coupling, coupling.keep())}]
    rows += [{**asdict(entry), 'left': shares(coupling, keeps[entry.name])} for entry in timed[1:]]
    settings = {'config': config, 'size': args.size, 'macs': args.macs, 'scores': args.scores, 'seed': args.seed}
    return {**settings, 'machine': asdict(Machine.here(args.threads)), 'rows': rows}


def report(results: Mapping[str, Any]) -> str:
    """Return the table: for each model what is left, what latency was predicted, and what was measured."""
    lines: list[tuple[str, ...]] = [
        ('model', 'target', 'MACs', 'parameters', 'predicted', 'measured', 'p10', 'p90', 'ms', 'rounds')
    ]
    for name, result in results.items():
        for row in result['rows'][1:]:
            left = [f'{row["left"][quantity]:.1%}' for quantity in ('macs', 'params', 'latency')]
            ratios = [f'{row[key]:.1%}' for key in ('ratio', 'ratio_p10', 'ratio_p90')]
            lines.append((name, row['name'], *left, *ratios, f'{row["median"]:.2f}', str(row['n'])))
    return '\n'.join(aligned(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('what', nargs='?', choices=('run', 'report'), default='run')
    add('--only', action='append', choices=MODELS)
    add('--size', type=int, default=224)
    add('--macs', type=float, default=0.5, help='share of the MACs that is left')
    add('--scores', choices=('random', 'magnitude'), default='random')
    add('--runs', type=int, default=1000)
    add('--time-limit', type=float, default=300, help='seconds of measuring a model')
    add('--threads', type=int, default=1)
    add('--seed', type=int, default=0)
    add('--cache', type=Path, help="folder of layers' times; default: the user's")
    add('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in (args.only or MODELS) if args.what == 'run' else ():
        results[name] = measure(MODELS[name], args)
        write_json(args.out, results)
    print(report(results))


if __name__ == '__main__':
    main()
