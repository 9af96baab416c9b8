"""Kill training runs at named and at random moments, resume them, and compare with runs that were never stopped.

    OMP_NUM_THREADS=1 python benchmarks/chaos_kills.py
    python benchmarks/chaos_kills.py --random 20 --only 'iterations, 2 processes'

A tiny classifier with dropout and random augmentation prunes itself and learns from what it was; it is killed by
SIGKILL, resumed from its newest whole checkpoint until it is done, and its last checkpoint and slim.pth are compared
with those of an uninterrupted run, bit for bit. Results go to `benchmarks/results/chaos_kills.json`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.chaos_kills_model import ITERATIONS, config
from mmcpd.engine.hashing import digest
from mmcpd.engine.hooks import PruneHook
from mmcpd.engine.latest import newest_whole
from mmcpd.files import UNFINISHED, write_json

RESULTS = Path(__file__).resolve().parent / 'results' / 'chaos_kills.json'


# -- when it is killed -------------------------------------------------------------------------------------------------
def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_file(event: str, words: str, count: int = 1) -> None:
    """Kill right before a process opens, renames or removes a file with some words in its path, the n-th time."""
    seen = [0]

    def audit(name: str, args: tuple) -> None:
        if name == event:
            path = str(args[1] if event == 'os.rename' else args[0])
            seen[0] += path.endswith(words) if event != 'open' else words in Path(path).name
            if seen[0] >= count:
                kill()

    sys.addaudithook(audit)


def in_write(words: str, count: int) -> None:
    """Kill when half of a file with some words in its name is written, the n-th time."""
    plain, seen = Path.write_bytes, [0]

    def write_bytes(path: Path, content: bytes) -> int:
        seen[0] += words in path.name
        if seen[0] < count:
            return plain(path, content)
        plain(path, content[: len(content) // 2])
        kill()
        raise AssertionError('killed')

    Path.write_bytes = write_bytes  # type: ignore[method-assign]


def at_call(owner: type, name: str, count: int = 1, after: bool = False) -> None:
    """Kill at the n-th call of a method, at its beginning or its end."""
    plain, seen = getattr(owner, name), [0]

    def called(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if seen[0] == count and not after:
            kill()
        result = plain(*args, **kwargs)
        if seen[0] == count:
            kill()
        return result

    setattr(owner, name, called)


def after_seconds(seconds: float) -> None:
    threading.Timer(seconds, kill).start()


# Name -> what makes a process kill itself then; those of files concern the main process alone.
MOMENTS: dict[str, Callable[[], None]] = {
    'first checkpoint half written': lambda: in_write('_', 1),
    'third checkpoint or best file half written': lambda: in_write('_', 4),
    'checkpoint before its rename': lambda: at_file('os.rename', '.pth', 3),
    'before last_checkpoint is written': lambda: at_file('open', 'last_checkpoint', 5),
    'before last_checkpoint is renamed': lambda: at_file('os.rename', 'last_checkpoint', 2),
    'before an old checkpoint is removed': lambda: at_file('os.remove', '.pth', 1),
    'in removal, later': lambda: at_file('os.remove', '.pth', 3),
    'in dense.pth': lambda: at_file('open', '.dense.pth', 1),
    'before dense.pth is renamed': lambda: at_file('os.rename', 'dense.pth', 1),
    'in slim.pth': lambda: at_file('open', '.slim.pth', 1),
    'before slim.pth is renamed': lambda: at_file('os.rename', 'work/slim.pth', 1),
    'at the begin of pruning': lambda: at_call(PruneHook, '_begin'),
    'after the begin of pruning': lambda: at_call(PruneHook, '_begin', after=True),
    'mid-iteration, dense': lambda: at_call(OptimWrapper, 'update_params', 3),
    'mid-iteration, while it prunes': lambda: at_call(OptimWrapper, 'update_params', 7),
    'mid-iteration, pruned': lambda: at_call(OptimWrapper, 'update_params', 11, after=True),
}
OF_ALL = ('mid-iteration', 'at the begin', 'after the begin', 'after')


# -- runs --------------------------------------------------------------------------------------------------------------
def train(folder: Path, by_epoch: bool, processes: int, rank: int, moment: Callable[[], None] | None) -> None:
    """Train in this process, from the newest whole checkpoint if there is one."""
    torch.set_num_threads(1)
    os.chdir(folder.parent)  # processes exchange what they validated in the folder they are in
    cfg = config(folder, by_epoch, processes)
    newest = newest_whole(folder)
    if newest is not None:
        cfg.resume, cfg.load_from = True, newest
    if processes > 1:
        os.environ['LOCAL_RANK'] = str(rank)
        meet = folder.with_name(f'meet_{os.getppid()}_{len(list(folder.parent.glob("out_*")))}')
        torch.distributed.init_process_group('gloo', init_method=f'file://{meet}', rank=rank, world_size=processes)
    if moment is not None:
        moment()
    Runner.from_cfg(cfg).train()


def started(
    folder: Path, by_epoch: bool, processes: int, moments: Sequence[Callable[[], None] | None]
) -> tuple[int, list[int]]:
    """Run it in forked processes and return how many were killed; where one dies the others are killed, as by torchrun.

    Raises:
        RuntimeError: One ended by an error.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f'out_{len(list(folder.parent.glob("out_*")))}.txt')
    log.touch()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            out = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(out, 1), os.dup2(out, 2)
            try:
                train(folder, by_epoch, processes, rank, moments[rank])
            except BaseException:  # noqa: BLE001 - the child must end here, whatever happened
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    left, killed = set(children), 0
    while left:
        child, status = os.wait()
        left.discard(child)
        if status:
            by_itself = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            killed += by_itself
            for other in left:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            left = set()
            if not by_itself:
                raise RuntimeError(log.read_text()[-3000:])
    return killed, children


def result(folder: Path) -> dict[str, str]:
    """Return the digests of what a run ended with: weights, momentum, kept units and the slim model."""
    (last,) = [file for file in folder.iterdir() if file.name in (f'iter_{ITERATIONS}.pth', 'epoch_6.pth')]
    content = torch.load(last, map_location='cpu', weights_only=False)
    momentum = {str(name): state['momentum_buffer'] for name, state in content['optimizer']['state'].items()}
    slim = torch.load(folder / 'slim.pth', map_location='cpu', weights_only=True)['state_dict']
    keep = content['mmcpd']['pruner']['keep']
    parts = {'weights': content['state_dict'], 'momentum': momentum, 'keep': keep, 'slim': slim}
    return {name: digest(tensors) for name, tensors in parts.items()}


@dataclass(frozen=True)
class Row:
    """One run that was killed: of which kind, when, how often, and whether it ended as the uninterrupted one."""

    kind: str
    moment: str
    kills: int
    same: bool
    left_over: list[str]
    seconds: float


def one(kind: str, by_epoch: bool, processes: int, name: str, plan: Sequence, expected: dict[str, str]) -> Row:
    """Kill a run at each moment of a plan, one start after the other, and then let it end."""
    begin, kills = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / 'work'
        for moments in (*plan, [None] * processes):
            kills += started(folder, by_epoch, processes, moments)[0]
        left = [file.name for file in folder.iterdir() if UNFINISHED in file.name or 'unproved' in file.name]
        same = result(folder) == expected
    return Row(kind, name, kills, same, left, round(time.perf_counter() - begin, 1))


def plans(processes: int, count: int, seconds: float, seed: int) -> dict[str, list]:
    """Return the moments of each run: the named ones, and twice at random for `count` runs."""
    draw = random.Random(seed)
    found: dict[str, list] = {}
    for number, (name, moment) in enumerate(MOMENTS.items()):
        rank = number % processes if name.startswith(OF_ALL) else 0
        found[name] = [[moment if each == rank else None for each in range(processes)]]
    for number in range(count):
        plan: list = []
        for _ in range(2):
            rank, when = draw.randrange(processes), draw.uniform(0.05, 0.95) * seconds
            plan.append([_timer(when) if each == rank else None for each in range(processes)])
        found[f'random {number}'] = plan
    return found


def _timer(seconds: float) -> Callable[[], None]:
    return lambda: after_seconds(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--random', type=int, default=6, help='runs per kind that are killed twice at random')
    parser.add_argument('--only', help='a part of the kind and moment')
    parser.add_argument('--results', type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: list[Row] = []
    for by_epoch in (False, True):
        for processes in (1, 2):
            kind = f'{"epochs" if by_epoch else "iterations"}, {processes} process{"es" * (processes > 1)}'
            with tempfile.TemporaryDirectory() as place:
                folder, begin = Path(place) / 'work', time.perf_counter()
                started(folder, by_epoch, processes, [None] * processes)
                seconds, expected = time.perf_counter() - begin, result(folder)
            for name, plan in plans(processes, args.random, seconds, seed=processes + 2 * by_epoch).items():
                if args.only and args.only not in f'{kind}: {name}':
                    continue
                rows.append(one(kind, by_epoch, processes, name, plan, expected))
                print(rows[-1], flush=True)
                write(args.results, rows)
    wrong = [row for row in rows if not row.same or row.left_over or not row.kills]  # no kill: it tries nothing
    print(f'{sum(row.kills for row in rows)} kills in {len(rows)} runs, {len(wrong)} not as the uninterrupted run')
    raise SystemExit(bool(wrong))


def write(path: Path, rows: Sequence[Row]) -> None:
    totals = {
        'kills': sum(row.kills for row in rows),
        'runs': len(rows),
        'same': sum(row.same for row in rows),
        'seconds': round(sum(row.seconds for row in rows)),
    }
    versions = {'python': platform.python_version(), 'torch': torch.__version__, 'mmengine': mmengine.__version__}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')
    write_json(path, {'totals': totals, 'versions': versions, 'date': date, 'runs': [asdict(row) for row in rows]})


if __name__ == '__main__':
    main()
