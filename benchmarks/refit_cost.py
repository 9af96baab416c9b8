"""What a refit costs: seconds and peak memory for mmpretrain's ResNet-50 at half of the MACs.

    OMP_NUM_THREADS=1 python benchmarks/refit_cost.py
    OMP_NUM_THREADS=1 python benchmarks/refit_cost.py --pictures 512

Pictures are noise of 224x224 and weights are random: neither decides what it costs. Units go by magnitude. Printed is
one line: seconds that pass and seconds of the process's CPU time, and its peak memory in GiB.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import mmpretrain.models  # noqa: F401 - fills the registry
import torch
from mmpretrain.registry import MODELS
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.prune import Magnitude, normalize, select
from mmcpd.refit import refit


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--pictures', type=int, default=64)
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--size', type=int, default=224)
    parser.add_argument('--depth', type=int, default=50)
    parser.add_argument('--samples', type=int, default=64, help='positions per picture')
    parser.add_argument('--device', default='cpu')
    return parser.parse_args(arguments)


def peak_gib(device: str) -> float:
    """Return the peak memory of the process, or of the tensors on a GPU."""
    if torch.device(device).type == 'cuda':
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def keep_by_magnitude(model: nn.Module, coupling: Coupling) -> dict[str, Tensor]:
    """Return a keep of half of the MACs."""
    importance, keep = Magnitude(coupling.groups), coupling.keep()
    importance.accumulate(model)
    return select(normalize(importance.scores(), coupling, keep, by='macs'), coupling, keep, {'macs': 0.5})


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    torch.manual_seed(0)
    model = MODELS.build(dict(type='ResNet', depth=args.depth)).to(args.device)
    model.eval()
    coupling = comb(model, torch.rand(1, 3, args.size, args.size, device=args.device))
    keep = keep_by_magnitude(model, coupling)
    batches = torch.rand(args.pictures, 3, args.size, args.size, device=args.device).split(args.batch)
    start, used = time.perf_counter(), time.process_time()
    report = refit(model, coupling, keep, batches, samples=args.samples).report
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    print(
        f'{args.pictures} pictures, {len(report.refitted)} layers, {len(report.corrected)} sums corrected: '
        f'{seconds:.1f} s, {cpu:.1f} s of CPU time, {peak_gib(args.device):.2f} GiB at most'
    )


if __name__ == '__main__':
    main()
