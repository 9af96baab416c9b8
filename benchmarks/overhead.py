"""What scoring and masking add to a training iteration of a ResNet-50, measured in pairs in one run.

    python benchmarks/overhead.py                                      # 32x32 (the embedded config) and 224x224
    python benchmarks/overhead.py --size 224 --batch 8 --pairs 15

A pair is one plain iteration (forward, loss, backward, SGD with momentum) and one of the same model on the same batch
with the pruner at work, in alternating order: `hessian` and the masks at the step's hooks, a quarter of the MACs already
gone. The event that chooses units is timed by itself and
spread over the interval. Reported: medians, and the median of the pairs' ratios. Results go to
`benchmarks/results/overhead.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from mmcpd.comb import comb
from mmcpd.prune.pruner import Pruner

RESULTS = Path(__file__).resolve().parent / 'results' / 'overhead.json'
SIZES = {32: 64, 224: 8}  # pixels -> batch
INTERVAL = 10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--size', type=int, help='pixels of the square input; default: 32 and 224')
    parser.add_argument('--batch', type=int, help='default: 64 at 32 pixels, 8 at 224')
    parser.add_argument('--pairs', type=int, default=15)
    parser.add_argument('--warm-up', type=int, default=2, metavar='PAIRS')
    parser.add_argument('--threads', type=int, default=os.cpu_count())
    parser.add_argument('--importance', default='hessian')
    parser.add_argument('--out', type=Path, default=RESULTS)
    return parser.parse_args()


def seconds_of(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """Return the time of one training iteration."""
    start = time.perf_counter()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return time.perf_counter() - start


def measure(size: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one input size."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    found = comb(model, x[:1])
    options = {'begin': 0, 'end': 2 * INTERVAL, 'interval': INTERVAL, 'target': 0.5, 'curve': 'linear'}
    pruner = Pruner(model, found, optimizer, 2 * INTERVAL, **options, importance=args.importance)
    pruner.start()
    seconds_of(model, optimizer, x, y)
    start = time.perf_counter()
    pruner.after(INTERVAL)  # halfway: three quarters of the MACs are left from here on
    event = time.perf_counter() - start

    def iteration(pruning: bool) -> float:
        pruner.start() if pruning else pruner.stop()
        return seconds_of(model, optimizer, x, y)

    pairs = []
    for number in range(args.warm_up + args.pairs):
        order = (False, True) if number % 2 else (True, False)
        times = {pruning: iteration(pruning) for pruning in order}
        pairs.append((times[False], times[True]))
        print(f'{size}x{size} pair {number}: {times[False]:.3f} s plain, {times[True]:.3f} s pruning', flush=True)
    pairs = pairs[args.warm_up :]
    plain, pruning = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return {
        'size': size,
        'batch': batch,
        'pairs': len(pairs),
        'plain_s': plain,
        'pruning_s': pruning,
        'event_s': event,
        'ratio': ratio,
        'ratio_with_event': ratio + event / INTERVAL / plain,
        'macs_left': pruner.left()['macs'],
    }


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    sizes = {args.size: args.batch or SIZES.get(args.size, 8)} if args.size else SIZES
    results = [measure(size, batch, args) for size, batch in sizes.items()]
    report = {
        'command': f'python benchmarks/overhead.py {" ".join(sys.argv[1:])}'.rstrip(),
        'importance': args.importance,
        'interval': INTERVAL,
        'torch': torch.__version__,
        'python': platform.python_version(),
        'threads': args.threads,
        'load_before': os.getloadavg()[2],
        'results': results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + '\n')
    for result in results:
        print(
            f'{result["size"]}x{result["size"]}, batch {result["batch"]}: {result["plain_s"]:.3f} s plain, '
            f'{result["pruning_s"]:.3f} s pruning, {result["ratio"] - 1:+.1%} in pairs, '
            f'{result["ratio_with_event"] - 1:+.1%} with an event ({result["event_s"]:.3f} s) every {INTERVAL}'
        )
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main(parse_args())
