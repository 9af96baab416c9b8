"""What the score without training costs, measured in pairs with a plain forward and backward of the same pictures.

    OMP_NUM_THREADS=1 python benchmarks/score_cost.py
    python benchmarks/score_cost.py --only vit --rounds 15

Both run in eval mode on the same batch, in an order that changes; the time of the score, one draw, is divided by that
of the forward and backward of all weights in the same round. Reported: medians of times and of ratios. Weights and
pictures are random: they change no time. Results go to `benchmarks/results/score_cost.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmpretrain
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from mmcpd.comb import comb
from mmcpd.engine.build import build_dense
from mmcpd.prune import build_importance
from mmcpd.slim.compare import evaluating

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'cpd'
RESULTS = ROOT / 'benchmarks' / 'results' / 'score_cost.json'
Row = dict[str, Any]
# Name -> the model's config, pictures of a batch, and their size.
MODELS_MEASURED: dict[str, Row] = {
    'resnet50': dict(config='resnet50_prune_in1k.py', batch=8, size=224),
    'vit': dict(config='vit_prune_cifar10.py', batch=64, size=32),
}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', choices=MODELS_MEASURED, nargs='+', default=list(MODELS_MEASURED))
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--warm-up', type=int, default=1, metavar='ROUNDS')
    parser.add_argument('--batch', type=int, help='pictures; default: 8 at 224 pixels, 64 at 32')
    parser.add_argument('--results', type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Return what a classifier gives out for images (N, C, H, W)."""
    return model.head(model.extract_feat(images))


def measure(name: str, args: argparse.Namespace) -> Row:
    """Measure one model, and return its row."""
    case = MODELS_MEASURED[name]
    torch.manual_seed(0)
    model = build_dense(CONFIGS / case['config'])
    images = torch.randn(args.batch or case['batch'], 3, case['size'], case['size'])
    coupling = comb(model, images[:1], forward=logits)
    score = build_importance('gauss_newton', coupling.groups)
    start = time.perf_counter()
    score.check(model, coupling.example)
    layout = time.perf_counter() - start

    def plain() -> None:
        model.zero_grad()
        with evaluating(model), torch.enable_grad():
            logits(model, images).square().sum().backward()

    steps = {'plain': plain, 'score': lambda: score.accumulate(model, closure=lambda: [logits(model, images)])}
    times: dict[str, list[float]] = {mode: [] for mode in steps}
    for number in range(args.warm_up + args.rounds):
        for mode in steps if number % 2 else reversed(steps):
            start = time.perf_counter()
            steps[mode]()
            times[mode].append(time.perf_counter() - start)
        print(name, number, *(f'{mode} {seconds[-1]:.3f} s' for mode, seconds in times.items()), flush=True)
    kept = {mode: seconds[args.warm_up :] for mode, seconds in times.items()}
    return {
        'model': name,
        'pictures': len(images),
        'size': case['size'],
        'rounds': args.rounds,
        'forward_backward_s': statistics.median(kept['plain']),
        'score_s': statistics.median(kept['score']),
        'ratio': statistics.median(a / b for a, b in zip(kept['score'], kept['plain'], strict=True)),
        'check_s': layout,
    }


def main(args: argparse.Namespace) -> None:
    """Measure, save and print."""
    warnings.filterwarnings('ignore')  # torch and OpenMMLab about each other
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
    report = {
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'torch': torch.__version__,
        'mmpretrain': mmpretrain.__version__,
        'python': platform.python_version(),
        'threads': torch.get_num_threads(),
        'cores': os.cpu_count(),
        'load_before': os.getloadavg()[1],
        'results': [measure(name, args) for name in args.only],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(report, indent=1) + '\n')
    for row in report['results']:
        print(
            f'{row["model"]}, {row["pictures"]} pictures of {row["size"]}: forward and backward '
            f'{row["forward_backward_s"]:.2f} s, score {row["score_s"]:.2f} s, ratio {row["ratio"]:.2f}'
        )


if __name__ == '__main__':
    main(parse_args())
