"""Time combing against a forward pass of the same model, in turn, in one run.

    python benchmarks/comb_time.py --pairs 9 --out benchmarks/results/comb_time.json

Random weights, batch 1, eval mode. A ResNet needs no trial, a Swin Transformer does. Prints the medians of a forward
pass, of combing without its trial and of combing as it is by default, and the medians of their ratios, pair by pair;
and how much memory combing takes beyond the model and its run, by `getrusage` in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmcpd.comb import comb


def seconds(call: Callable[[], Any]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(model: nn.Module, x: torch.Tensor, pairs: int) -> dict[str, Any]:
    """Time the three in turn; return medians in seconds, and the medians of the ratios to a forward pass."""
    model.eval()
    rows: dict[str, list[float]] = {'forward': [], 'comb without trial': [], 'comb': []}
    for turn in range(pairs + 1):
        with torch.no_grad():
            times = [seconds(lambda: model(x))]
        times += [seconds(lambda: comb(model, x, trial=False)), seconds(lambda: comb(model, x))]
        for name, value in zip(rows, times, strict=True):
            if turn:  # the first turn warms up
                rows[name].append(value)
    ratios = {n: [t / f for t, f in zip(times, rows['forward'], strict=True)] for n, times in rows.items()}
    return {
        'median_s': {name: statistics.median(times) for name, times in rows.items()},
        'median_ratio': {name: statistics.median(values) for name, values in ratios.items()},
    }


def peak_mib() -> float:
    """Return the most memory that this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def memory(name: str, size: int) -> dict[str, float]:
    """Return the size of a model's parameters, and what its combing takes at most beyond a forward pass, in MiB."""
    import torchvision

    torch.set_num_threads(1)
    model, x = torchvision.models.get_model(name).eval(), torch.rand(1, 3, size, size)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    with torch.no_grad():
        model(x)
    before = peak_mib()
    comb(model, x)
    return {'parameters': parameters, 'combing': peak_mib() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['resnet50', 'swin_t'], help='names in torchvision.models')
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--pairs', type=int, default=9)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    import torchvision

    results = {}
    for model in args.models:
        results[model] = measure(
            torchvision.models.get_model(model), torch.rand(1, 3, args.size, args.size), args.pairs
        )
        with multiprocessing.get_context('spawn').Pool(1) as alone:  # a peak never goes down
            results[model]['memory_mib'] = alone.apply(memory, (model, args.size))
        parameters, most = results[model]['memory_mib'].values()
        print(f'{model:12s} {"memory":20s} {most:8.1f} MiB {most / parameters:5.2f} times the parameters')
        for name, ratio in results[model]['median_ratio'].items():
            seconds = results[model]['median_s'][name]
            print(f'{model:12s} {name:20s} {seconds * 1e3:8.1f} ms  {ratio:5.2f} forward passes')
    about = {
        'size': args.size,
        'pairs': args.pairs,
        'threads': args.threads,
        'torch': torch.__version__,
        'torchvision': torchvision.__version__,
        'date': datetime.date.today().isoformat(),
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, 'models': results}, indent=2) + '\n')


if __name__ == '__main__':
    main()
