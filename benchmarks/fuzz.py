"""Comb, mask and slim random small nets, and look for one whose slim model is not the masked one.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --operations 20000 --seed 0
    python benchmarks/fuzz.py --operations 2000 --blocks Packed Multihead Residual
    python benchmarks/fuzz.py --net 1234                # this net alone, with the traceback

Nets are drawn from `fuzz_nets.py` until they have run so many operations of torch. Each is combed in float64 with
random weights, with the trial and without; about half of its units go, then a fifth. **Wrong** are outputs of the slim
model that differ by more than 1e-9 from the masked one's with the trial held, gradients by more than 1e-6, an exception
that is none of mmcpd's own, one of mmcpd's own in slimming, and a net that takes more than a minute. Without the trial
the same is **saved by the trial**: a rule that could be better. Where gradients differ and torch's own of the whole net
is not what finite differences give, **torch is wrong**. As a control, units that are not the masked ones are cut away:
the outputs must differ. What is wrong is made as short as it stays wrong, and printed as a plan for `Net`. Results go
to `benchmarks/results`.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.fuzz_nets import BLOCKS, Net, plan_of
from benchmarks.time_limit import Slow, within
from mmcpd.comb import comb
from mmcpd.coupling import Coupling, Keep
from mmcpd.errors import CombError, SlimError, first_line
from mmcpd.files import write_json
from mmcpd.progress import ProgressLine
from mmcpd.slim import slim
from mmcpd.slim.compare import compare, compare_gradients
from mmcpd.slim.trial import random_keep, randomised

RESULTS = Path(__file__).resolve().parent / 'results'
Plan = list[tuple[str, int]]
TOLERANCE, SECONDS, LENGTHS = 1e-9, 60, (3, 9)


class Operations(TorchDispatchMode):
    """Count the operations of torch that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """What was found about one net."""

    operations: int = 0
    wrong: str = ''
    saved: str = ''  # what would be wrong without the trial
    torch: str = ''  # what is wrong with the whole net already
    control: bool | None = None  # whether cutting other units than the masked ones was seen; None: nothing can go
    units: tuple[int, int] = (0, 0)  # channels that can go, and all
    reasons: dict[str, int] = field(default_factory=dict)


def build(plan: Plan) -> tuple[torch.nn.Module, Tensor]:
    """Return a net in float64 in which every weight matters, and its input."""
    torch.manual_seed(0)
    net = Net(plan).eval()
    return randomised(net).double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)


def fault(net: torch.nn.Module, found: Coupling) -> str:
    """Return how the slim model differs from the masked one, or ''."""
    for ratio, seed in ((0.5, 0), (0.8, 1)):
        keep = random_keep(found, ratio, seed, awkward=True)
        for name, gap in (('outputs', compare), ('gradients', compare_gradients)):
            value = gap(net, found, keep)
            if not value <= (TOLERANCE if name == 'outputs' else 1e3 * TOLERANCE):
                return f'{name} differ by {value:.1e}'
    return ''


def gradient_error(net: torch.nn.Module, x: Tensor) -> float:
    """Return how far torch's own gradient of a net by its input is from a finite difference, relative to the larger."""
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    net, x, step = copy.deepcopy(net), x.clone().requires_grad_(), 1e-6
    net(x).sum().backward()
    with torch.no_grad():
        numeric = float((net(x + step * way) - net(x - step * way)).sum()) / (2 * step)
    exact = float((x.grad * way).sum())
    return abs(exact - numeric) / max(abs(exact), abs(numeric), 1e-9)


def shifted(keep: Keep) -> Keep:
    return {name: kept.roll(1) for name, kept in keep.items()}


def examine(plan: Plan) -> Outcome:
    """Comb, mask and slim one net; mmcpd's own errors in combing are no fault where they are one line."""
    net, x = build(plan)
    outcome = Outcome()
    with Operations() as seen, torch.no_grad():
        net(x)
    outcome.operations = seen.count
    try:
        raw, found = comb(net, x, trial=False), comb(net, x)
    except CombError as error:
        outcome.reasons = {f'CombError: {first_line(error)}': 1}
        return outcome
    outcome.units, outcome.reasons = found.prunable_channels(), dict(found.reasons())
    outcome.wrong = fault(net, found)
    if outcome.wrong.startswith('gradients') and (error := gradient_error(net, x)) > 1e-3:
        outcome.torch, outcome.wrong = f"torch's own gradient of the whole net is off by {error:.0%}", ''
    try:
        outcome.saved = fault(net, raw)
    except Exception as error:  # noqa: BLE001 - without the trial anything may happen
        outcome.saved = f'{type(error).__name__}: {first_line(error)}'
    keep = random_keep(found, 0.5, 0, awkward=True)
    other = shifted(keep)
    if any(not torch.equal(keep[name], other[name]) for name in keep):
        outcome.control = compare(net, found, keep, slim(net, found, other)) > 1e-6
    return outcome


def attempt(plan: Plan) -> Outcome:
    """Examine a net; whatever it raises is a finding."""
    try:
        with within(SECONDS):
            return examine(plan)
    except Slow:
        return Outcome(wrong=f'no end after {SECONDS} s')
    except SlimError as error:
        return Outcome(wrong=f'SlimError: {first_line(error)}')
    except Exception as error:  # noqa: BLE001 - this is what is looked for
        return Outcome(wrong=f'{type(error).__name__}: {first_line(error)}')


def shrunk(plan: Plan, name: str) -> Plan:
    """Leave out blocks as long as the same attribute of the outcome says something."""
    for at in reversed(range(len(plan))):
        less = plan[:at] + plan[at + 1 :]
        if less and getattr(attempt(less), name):
            return shrunk(less, name)
    return plan


def run(operations: int, seed: int, names: list[str] | None, shrink: bool) -> dict[str, Any]:
    """Examine nets until so many operations ran; return what was found."""
    line, start = ProgressLine('fuzz', 'operations'), time.perf_counter()
    done = nets = 0
    controls: list[bool] = []
    unseen: list[int] = []
    found: dict[str, list[dict[str, Any]]] = {'wrong': [], 'torch': [], 'saved': []}
    reasons, used, channels = Counter[str](), Counter[str](), [0, 0]
    while done < operations:
        number = seed * 1_000_000 + nets
        plan = plan_of(number, LENGTHS[0] + number % (LENGTHS[1] - LENGTHS[0]), names)
        outcome = attempt(plan)
        nets, done = nets + 1, done + max(1, outcome.operations)
        controls += [] if outcome.control is None else [outcome.control]
        unseen += [number] if outcome.control is False else []
        used.update(name for name, _ in plan)
        reasons.update(outcome.reasons)
        channels = [a + b for a, b in zip(channels, outcome.units, strict=True)]
        for name in found:
            if why := getattr(outcome, name):
                short = shrunk(plan, name) if shrink and name == 'wrong' else plan
                found[name].append({'net': number, 'why': why, 'plan': short})
                print(f'{name}: net {number}: {why}\n    Net({short})', flush=True)
        line(min(done, operations), operations)
    return {
        'date': datetime.date.today().isoformat(), 'torch': torch.__version__, 'seed': seed, 'operations': done,
        'nets': nets, 'wrong': len(found['wrong']), 'torch_is_wrong': len(found['torch']),
        'saved_by_the_trial': len(found['saved']),
        'controls': len(controls), 'controls_that_differ': sum(controls), 'controls_unseen': unseen,
        'channels_prunable': channels,
        'seconds': round(time.perf_counter() - start), 'blocks': dict(used.most_common()),
        'frozen_because': dict(reasons.most_common(30)), 'findings': found,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--operations', type=int, default=20_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--blocks', nargs='+', choices=sorted(BLOCKS))
    parser.add_argument('--net', type=int, help='the number of one net, to see what it does')
    parser.add_argument('--no-shrink', action='store_true', help='print findings as they are drawn')
    parser.add_argument('--out', type=Path, help='default: benchmarks/results/fuzz_seed<SEED>.json')
    args = parser.parse_args()
    if args.net is not None:
        plan = plan_of(args.net, LENGTHS[0] + args.net % (LENGTHS[1] - LENGTHS[0]), args.blocks)
        try:
            print(plan, examine(plan), sep='\n')
        except Exception:  # noqa: BLE001 - it is shown
            traceback.print_exc()
        return
    found = run(args.operations, args.seed, args.blocks, not args.no_shrink)
    print('\n' + '\n'.join(f'{name}: {value}' for name, value in found.items() if name not in ('findings', 'blocks')))
    write_json(args.out or RESULTS / f'fuzz_seed{args.seed}.json', found)


if __name__ == '__main__':
    main()
