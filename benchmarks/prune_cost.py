"""What pruning without training costs: seconds of each stage and peak memory for mmpretrain's ResNet-50 at 224x224.

    OMP_NUM_THREADS=2 python benchmarks/prune_cost.py --pictures 512

Pictures are noise and weights are random: neither decides what it costs. Half of the MACs go. The result is printed and
written to `benchmarks/results/prune_cost.json`: for each stage the seconds that pass and those of the process's CPU
time, and the process's peak memory in GiB.
"""

from __future__ import annotations

import argparse
import datetime
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mmpretrain.models  # noqa: F401 - fills the registry
import torch
from mmpretrain.registry import MODELS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from mmcpd.comb import comb
from mmcpd.files import write_json
from mmcpd.prune import normalize, score, select
from mmcpd.refit import refit
from mmcpd.slim import slim

RESULTS = Path(__file__).resolve().parent / 'results' / 'prune_cost.json'


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pictures', type=int, default=64)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--depth', type=int, default=50)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--out', type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def peak_gib(device: str) -> float:
    """Return the peak memory of the process, or of the tensors on a GPU."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.manual_seed(0)
    model = MODELS.build(dict(type='ResNet', depth=args.depth)).to(args.device)
    model.eval()  # mmpretrain's returns nothing
    batches = torch.rand(args.pictures, 3, args.size, args.size, device=args.device).split(args.batch)
    stages: dict[str, dict[str, float]] = {}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        start, used = time.perf_counter(), time.process_time()
        yield
        stages[name] = {'seconds': time.perf_counter() - start, 'cpu_seconds': time.process_time() - used}
        print(f'{name}: {stages[name]["seconds"]:.1f} s, {stages[name]["cpu_seconds"]:.1f} s of CPU time', flush=True)

    with timed('comb'):
        coupling = comb(model, batches[0][:1])
    with timed('score'):
        scores = score(model, coupling, batches)
        scores = normalize(scores, coupling, coupling.keep(), by='macs')
        keep = select(scores, coupling, coupling.keep(), {'macs': 0.5})
    with timed('refit'):
        found = refit(model, coupling, keep, batches)
    with timed('slim'):
        slim(found.model, coupling, keep)
    row: dict[str, Any] = {name: vars(args)[name] for name in ('pictures', 'batch', 'size', 'depth', 'device')}
    row |= {
        'layers': len(found.report.refitted),
        'sums': len(found.report.corrected),
        'peak_gib': peak_gib(args.device),
    }
    row |= {'stages': stages, 'threads': torch.get_num_threads(), 'torch': torch.__version__}
    row |= {'load': os.getloadavg()[0], 'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    seconds = sum(stage['seconds'] for stage in stages.values())
    print(f'{args.pictures} pictures: {seconds:.0f} s in all, {row["peak_gib"]:.2f} GiB at most')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, row)


if __name__ == '__main__':
    main()
