"""What scoring and masking add to a training iteration of a ResNet-50, measured in pairs in one run.

    python benchmarks/overhead.py                                      # 32x32 (the embedded config) and 224x224
    python benchmarks/overhead.py --size 224 --batch 8 --pairs 15

A pair is one plain iteration (forward, loss, backward, SGD with momentum) and one of the same model on the same batch
with the pruner at work, in alternating order: `hessian` and the masks at the step's hooks, a quarter of the MACs
already gone. The event that chooses units is timed by itself and spread over the interval. Reported: medians, and the
median of the pairs' ratios, of wall time and of CPU time, which other programs disturb less. Results go to
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
from mmcpd.prune import Pruner, Schedule

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


def clock() -> tuple[float, float]:
    """Return wall time and CPU time, in seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Return wall time and CPU time since then."""
    wall, cpu = clock()
    return wall - start[0], cpu - start[1]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Do one training iteration and return its wall and CPU time."""
    start = clock()
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    return since(start)


def measure(size: int, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one input size."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50(num_classes=1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    x, y = torch.randn(batch, 3, size, size), torch.randint(1000, (batch,))
    schedule = Schedule({'macs': 0.5}, end=2 * INTERVAL, interval=INTERVAL, curve='linear')
    pruner = Pruner(model, comb(model, x[:1]), optimizer, schedule, importance=args.importance)
    for _ in range(INTERVAL - 1):
        pruner.step()
    step(model, optimizer, x, y)
    start = clock()
    pruner.step()  # halfway: three quarters of the MACs remain from here on
    event = since(start)

    def iteration(pruning: bool) -> tuple[float, float]:
        pruner.start() if pruning else pruner.stop()
        return step(model, optimizer, x, y)

    pairs = []
    for number in range(args.warm_up + args.pairs):
        order = (False, True) if number % 2 else (True, False)
        times = {pruning: iteration(pruning) for pruning in order}
        pairs.append((times[False], times[True]))
        print(f'{size}x{size} pair {number}: {times[False][0]:.3f} s plain, {times[True][0]:.3f} s pruning', flush=True)
    pairs = pairs[args.warm_up :]
    result = {'size': size, 'batch': batch, 'pairs': len(pairs), 'macs_left': pruner.left()['macs']}
    for i, name in enumerate(('wall', 'cpu')):
        plain, pruning = (statistics.median(column) for column in zip(*((a[i], b[i]) for a, b in pairs), strict=True))
        ratio = statistics.median(b[i] / a[i] for a, b in pairs)
        result[name] = {
            'plain_s': plain,
            'pruning_s': pruning,
            'event_s': event[i],
            'ratio': ratio,
            'ratio_with_event': ratio + event[i] / INTERVAL / plain,
        }
    return result


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
        for name in ('wall', 'cpu'):
            r = result[name]
            print(
                f'{result["size"]}x{result["size"]}, batch {result["batch"]}, {name} time: {r["plain_s"]:.3f} s plain, '
                f'{r["pruning_s"]:.3f} s pruning, {r["ratio"] - 1:+.1%} in pairs, {r["ratio_with_event"] - 1:+.1%} '
                f'with an event ({r["event_s"]:.3f} s) every {INTERVAL}'
            )
    print(f'wrote {args.out}')


if __name__ == '__main__':
    main(parse_args())
