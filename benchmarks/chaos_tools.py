"""Hand damaged checkpoints and slim files to the commands, and see that each ends as it should, in one line.

    OMP_NUM_THREADS=1 python benchmarks/chaos_tools.py --files 480 --seed 0

A tiny classifier is trained by `mmcpd train`. Its slim.pth, training checkpoint and dense.pth are damaged at random
(bytes, archives, entries, and structures with their checksum put right), and given to `test`, `slim`, `comb`, `prune`,
`deploy`, and to `train` as `load_from` and by `--resume`. A command must end with status 0, 3 where a target is missed,
or 1 and one line that begins with `error:`. A traceback, another status, more than 60 seconds, or a checkpoint or ONNX
file in the folder after an error count as `anything else`. Results go to `benchmarks/results/chaos_tools.json`.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.chaos_files import FILES, STRUCTURES
from benchmarks.chaos_kills_model import config
from mmcpd.__main__ import main as mmcpd
from mmcpd.files import write_json

RESULTS = Path(__file__).resolve().parent / 'results' / 'chaos_tools.json'
SECONDS = 60  # that one command may take
LATEST = 'iter_12.pth'
DAMAGES = {name: damage.change for name, damage in (STRUCTURES | FILES).items()}


@dataclass(frozen=True)
class Command:
    """A command, which of the run's files it is given, and its words."""

    file: str
    words: tuple[str, ...]

    def line(self, cfg: Path, damaged: Path, out: Path) -> list[str]:
        words = (word.replace('CONFIG', str(cfg)).replace('FILE', str(damaged)) for word in self.words)
        return [word.replace('OUT', str(out)) for word in words]


COMMANDS = {
    'test': Command('slim.pth', ('test', 'CONFIG', 'FILE', '--work-dir', 'OUT')),
    'deploy': Command('slim.pth', ('deploy', 'CONFIG', 'FILE', '--out', 'OUT', '--no-bench', '--random-input')),
    'prune': Command(
        'slim.pth', ('prune', 'CONFIG', 'FILE', '--target', 'macs=0.5', '--out', 'OUT', '--pictures', '8')
    ),
    'comb': Command(LATEST, ('comb', 'CONFIG', '--checkpoint', 'FILE')),
    'slim': Command(LATEST, ('slim', 'CONFIG', 'FILE', '--out', 'OUT/slim.pth')),
    'test a checkpoint': Command(LATEST, ('test', 'CONFIG', 'FILE', '--work-dir', 'OUT')),
    'train, load_from': Command(
        'dense.pth', ('train', 'CONFIG', '--work-dir', 'OUT', '--cfg-options', 'load_from=FILE')
    ),
    'train --resume': Command(LATEST, ('train', 'CONFIG', '--work-dir', 'OUT', '--resume', 'FILE')),
}


def in_child(arguments: Sequence[str], log: Path, seconds: float = SECONDS) -> tuple[int, str, float]:
    """Run a command in a fork; return its status, -9 past its time, what it wrote to stderr, and the seconds."""
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        with open(log, 'wb') as file:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(file.fileno(), 2)
        try:
            mmcpd(list(arguments))
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        finally:
            sys.stderr.flush()
            os._exit(99)
    ended, status = os.waitpid(child, os.WNOHANG)
    while not ended:
        if time.perf_counter() - start > seconds:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
        ended, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status), log.read_text(errors='replace'), time.perf_counter() - start


def run(command: Command, content: bytes, folder: Path) -> tuple[str, float]:
    """Hand a file with this content to a command; return how it ended, and the seconds."""
    damaged, out = folder / 'damaged.pth', folder / 'out'
    shutil.rmtree(out, ignore_errors=True)
    damaged.write_bytes(content)
    shutil.copy(folder / 'work' / 'dense.pth', folder)
    status, text, seconds = in_child(command.line(folder / 'config.py', damaged, out), folder / 'log')
    lines = [line for line in text.splitlines() if line.startswith('error:')]
    if status in (0, 3):
        return 'done', seconds
    if status == -9:
        return f'no end after {seconds:.0f} s', seconds
    if status != 1 or 'Traceback' in text or len(lines) != 1 or 'report it' in text:
        return f'status {status}: {text[-400:]}', seconds
    left = sorted(path.name for path in out.rglob('*.*') if path.suffix in ('.pth', '.onnx', '.tmp'))
    return ('one line' if not left else f'left behind {left}: {lines[0][:300]}'), seconds


def attack(command: Command, count: int, seed: int, folder: Path) -> dict[str, Any]:
    """Hand a number of damaged files to a command; return what happened.

    Raises:
        SystemExit: the whole file is not taken either, so that nothing would be tried.
    """
    whole = (folder / 'work' / command.file).read_bytes()
    end, _ = run(command, whole, folder)
    if end != 'done':
        raise SystemExit(f'{command.words} does not take the whole file: {end}; {(folder / "log").read_text()}')
    kinds = [kind for kind in DAMAGES if kind != 'structures' or command.file == 'slim.pth']
    ends, other, slowest = Counter[str](), dict[str, str](), 0.0
    for number in range(count):
        kind = kinds[number % len(kinds)]
        end, seconds = run(command, DAMAGES[kind](whole, random.Random(f'{seed} {kind} {number}')), folder)
        slowest = max(slowest, seconds)
        ends[end if end in ('done', 'one line') else 'anything else'] += 1
        if end not in ('done', 'one line'):
            other[f'{kind} {number}'] = end
    return {
        'tried': count, 'done': ends['done'], 'one_line': ends['one line'], 'anything_else': ends['anything else'],
        'slowest_seconds': round(slowest, 1), 'examples': dict(list(other.items())[:10]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--files', type=int, default=480, help='damaged files, in turn for each command')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=COMMANDS, nargs='+', default=list(COMMANDS))
    parser.add_argument('--out', type=Path, default=RESULTS)
    args = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cfg = config(folder / 'work', False, 1)
        cfg.custom_imports = {'imports': ['benchmarks.chaos_kills_model'], 'allow_failed_imports': False}
        cfg.test_dataloader, cfg.test_evaluator, cfg.test_cfg = cfg.val_dataloader, cfg.val_evaluator, {}
        cfg.dump(folder / 'config.py')
        log = folder / 'log'
        status, text, _ = in_child(['train', str(folder / 'config.py'), '--work-dir', str(folder / 'work')], log, 600)
        if status != 0:
            raise SystemExit(f'training ended with {status}: {text[-2000:]}')
        for name in args.only:
            rows[name] = attack(COMMANDS[name], -(-args.files // len(args.only)), args.seed, folder)
            print(name, rows[name], flush=True)
    about = {'date': datetime.date.today().isoformat(), 'seed': args.seed, 'torch': torch.__version__}
    write_json(args.out, about | {'rows': rows})


if __name__ == '__main__':
    main()
