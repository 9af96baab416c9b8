"""Latency of slim against dense at full size, in ONNX Runtime, in pairs in one run.

    python benchmarks/latency.py                       # DeiT-S + UPerHead and SeaFormer-L + Light head, 512x512
    python benchmarks/latency.py --only seaformer-l --time-limit 60
    python benchmarks/latency.py --quantity params      # another reading of the paper's shares

The models are those of `configs/cpd/vit_prune_ade20k.py` and `seaformer_prune_ade20k.py` with random weights: latency
depends on the structure alone. Each unit gets a random score, divided by what `--normalize` says: `memory` as in the
configs, or `none`, which thins all groups evenly. The lowest go, in eights (`round_to=8`), until as much remains as the
config asks for: 60 % (DeiT-S) and 80 % (SeaFormer-L) of the units, as the paper's released code counts, or by
`--quantity` of the parameters. The paper reports -47 % and -26 % of the latency, with trained scores.
Results go to `benchmarks/results/latency.json`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mmcpd.comb import comb
from mmcpd.deploy import deploy
from mmcpd.engine.build import as_config, build_dense
from mmcpd.engine.compat import mend_scopes
from mmcpd.progress import ProgressLine
from mmcpd.prune import NORMALIZERS, normalize, select
from mmcpd.slim import slim

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'latency.json'
MODELS = {'deit-s': 'configs/cpd/vit_prune_ade20k.py', 'seaformer-l': 'configs/cpd/seaformer_prune_ade20k.py'}


def measure(config: str, args: argparse.Namespace) -> dict[str, Any]:
    """Slim one model to the share of its config, export both, and time them side by side."""
    torch.manual_seed(0)
    mend_scopes()
    cfg = as_config(str(ROOT / config))
    dense = build_dense(cfg).eval()
    x = torch.randn(1, 3, args.size, args.size)
    coupling = comb(dense, x)
    generator = torch.Generator().manual_seed(0)
    scores = {group.name: torch.rand(group.units, generator=generator) for group in coupling.groups}
    scores = normalize(scores, coupling, coupling.keep(), by=args.normalize)
    (share,) = cfg.default_hooks.prune.target.values()
    keep = select(scores, coupling, coupling.keep(), {args.quantity: share})
    small = slim(dense, coupling, keep).eval()
    before, after = coupling.cost(coupling.keep()), coupling.cost(keep)
    with tempfile.TemporaryDirectory() as folder:
        report = deploy(
            {'dense': dense, 'slim': small},
            [(x,)],
            folder,
            dynamic_batch=False,
            runs=args.runs,
            time_limit=args.time_limit,
            threads=args.threads,
            progress=ProgressLine('measuring', 'rounds'),
        )
    print(report, flush=True)
    return {
        'config': config,
        'quantity': args.quantity,
        'normalize': args.normalize,
        'input': list(x.shape),
        'params': [before.params, after.params],
        'macs': [before.macs, after.macs],
        'units': [coupling.units, sum(int(kept.sum()) for kept in keep.values())],
        **asdict(report),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', action='append', choices=MODELS)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--runs', type=int, default=1000)
    parser.add_argument('--time-limit', type=float, default=180, help='seconds a model')
    parser.add_argument('--quantity', choices=('units', 'params'), default='units', help='what the share is one of')
    parser.add_argument('--normalize', choices=sorted(NORMALIZERS), default='memory')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.only or MODELS:
        results[f'{name}, {args.quantity}, {args.normalize}'] = measure(MODELS[name], args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + '\n')
    for name, row in results.items():
        slimmed = next(entry for entry in row['latency'] if entry['name'] == 'slim')
        kinds = [kind for kind in ('units', 'params', 'macs') if kind in row]
        left = ', '.join(f'{row[kind][1] / row[kind][0]:.1%} of the {kind}' for kind in kinds)
        print(f'{name:28s} {left}; ratio {slimmed["ratio"]:.3f}, {slimmed["n"]} pairs')


if __name__ == '__main__':
    main()
