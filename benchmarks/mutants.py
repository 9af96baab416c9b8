"""Break the library's claims one by one, and see whether its tests notice.

    python benchmarks/mutants.py                  # all of them: `make mutants`, some ten minutes on two cores
    python benchmarks/mutants.py --only trial     # those whose name holds this text
    python benchmarks/mutants.py --list

Each mutant (`mutants_{comb,sizes,slim,prune,rotate,refit}.py`) is one changed line in a copy of the library. The
tests that should notice run against that copy: first the likely killer, and where it passes the whole folder. A test
must fail, which is more than an import that breaks. The exit status is 1 where a mutant survives, does not apply, or
breaks something else than a test.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import mutants_comb, mutants_prune, mutants_refit, mutants_rotate, mutants_sizes, mutants_slim
from benchmarks.mutant import Mutant

MUTANTS = tuple(
    mutant
    for part in (mutants_comb, mutants_sizes, mutants_slim, mutants_prune, mutants_rotate, mutants_refit)
    for mutant in part.MUTANTS
)
ROOT = Path(__file__).resolve().parent.parent
COPIED = ('mmcpd', 'tests', 'benchmarks', 'pyproject.toml')
PASSED, FAILED = 0, 1  # pytest's exit statuses
SERVER = multiprocessing.get_context('forkserver')  # torch is loaded once, and each run of pytest is a fork of it
SERVER.set_forkserver_preload(['torch', 'torch.utils.flop_counter', 'scipy.sparse.csgraph', 'pytest'])


class Outcome(str, Enum):  # of mmcpd nothing is imported here: the tests import the copy
    """What became of a mutant."""

    KILLED = 'killed'
    SURVIVED = 'survived'
    ERROR = 'error'


OUTCOMES: dict[int | None, Outcome] = {FAILED: Outcome.KILLED, PASSED: Outcome.SURVIVED}


@dataclass(frozen=True)
class Result:
    """What became of a mutant, and the first test that failed, or what else there is to say."""

    mutant: Mutant
    outcome: Outcome
    detail: str
    seconds: float


@dataclass(frozen=True)
class Tests:
    """One run of pytest: its exit status (None: out of time), and its last lines."""

    status: int | None
    lines: tuple[str, ...]

    @property
    def failed(self) -> str:
        """The first failing test, without the folder that all tests stand in."""
        found = (line for line in self.lines if line.startswith(('FAILED ', 'ERROR ')))
        return next(found, '').partition(' ')[2].partition(' - ')[0].removeprefix('tests/')

    @property
    def last(self) -> str:
        return self.lines[-1] if self.lines else 'no output'


def _run(root: Path, arguments: tuple[str, ...], log: Path) -> None:
    """Run pytest in a tree, and end with its exit status."""
    os.chdir(root)
    sys.path.insert(0, str(root))
    sys.modules['__main__'] = ModuleType('__main__')  # else processes of a test run this file, and find `ROOT` first
    sys.dont_write_bytecode = True  # it is found by time and length of its source: the same for two mutants
    with log.open('w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    options = ['-x', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', '--tb=no', '--rootdir', str(root)]
    status = int(pytest.main([*options, *arguments]))
    library = sys.modules.get('mmcpd')
    if library is None or not str(library.__file__).startswith(str(root)):
        print('the tests ran against another copy of the library, or none')
        status = int(pytest.ExitCode.INTERNAL_ERROR)
    sys.stdout.flush()
    sys.exit(status)


class Tree:
    """A copy of the library and its tests, in which one line at a time is changed.

    Args:
        root: an empty folder.
        limit: seconds that one run of pytest may take.
    """

    def __init__(self, root: Path, limit: float) -> None:
        self.root, self.limit = root, limit
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, root / name, ignore=shutil.ignore_patterns('__pycache__', 'results'))
            else:
                shutil.copy(source, root / name)

    def run(self, *arguments: str) -> Tests:
        """Run some tests against the copy as it is now."""
        log = self.root / 'log.txt'
        process = SERVER.Process(target=_run, args=(self.root, arguments, log))
        process.start()
        process.join(self.limit)
        if process.exitcode is None:
            process.kill()
            process.join()
            return Tests(None, (f'no end after {self.limit:.0f} s',))
        return Tests(process.exitcode, tuple(line for line in log.read_text().splitlines() if line.strip()))

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """Apply a mutant, and take it back."""
        file = self.root / mutant.file
        text = file.read_text()
        file.write_text(mutant.applied(text))
        try:
            yield
        finally:
            file.write_text(text)

    def judge(self, mutant: Mutant) -> Result:
        """Run the tests that must notice a mutant."""
        start = time.perf_counter()
        try:
            with self.changed(mutant):
                tests = self.run(f'tests/{mutant.killer}')
                if tests.status == PASSED:
                    tests = self.run(f'tests/{mutant.folder}')
        except ValueError as error:
            return Result(mutant, Outcome.ERROR, str(error), 0.0)
        outcome = OUTCOMES.get(tests.status, Outcome.ERROR)
        return Result(mutant, outcome, tests.failed or tests.last, time.perf_counter() - start)


def judge_all(mutants: list[Mutant], jobs: int, limit: float, unchecked: bool) -> list[Result]:
    """Judge mutants, several at a time, each time in a copy of its own; print each result as it comes.

    Raises:
        SystemExit: the tests fail on the library as it is, so that no failure would mean anything.
    """
    free: SimpleQueue[Tree] = SimpleQueue()
    count = 0

    def sound(folder: str) -> Tests:
        tree = free.get()
        try:
            return tree.run(f'tests/{folder}')
        finally:
            free.put(tree)

    def judged(mutant: Mutant) -> Result:
        nonlocal count
        tree = free.get()
        try:
            result = tree.judge(mutant)
        finally:
            free.put(tree)
        count += 1
        print(f'[{count}/{len(mutants)}] {result.outcome.value:8} {mutant.name} ({result.seconds:.0f} s)', flush=True)
        return result

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(jobs) as pool:
        for number in range(jobs):
            root = Path(scratch, str(number))
            root.mkdir()
            free.put(Tree(root, limit))
        for tests in pool.map(sound, sorted({mutant.folder for mutant in mutants} if not unchecked else ())):
            if tests.status != PASSED:
                raise SystemExit(f'the tests fail without any mutant: {tests.failed or tests.last}')
        return list(pool.map(judged, mutants))


def table(results: list[Result]) -> str:
    """Return one line a mutant: what became of it, what it claims, and the first test that failed."""
    width = max(len(result.mutant.name) for result in results)
    rows = []
    for result in results:
        rows.append(f'{result.outcome.value:8}  {result.mutant.name:{width}}  {result.mutant.claim}')
        rows.append(f'{"":8}  {"":{width}}  {result.detail}')
    counts = ', '.join(f'{sum(r.outcome is kind for r in results)} {kind.value}' for kind in Outcome)
    return '\n'.join([*rows, f'{len(results)} mutants: {counts}'])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='+', default=[''], metavar='TEXT', help='mutants whose name holds one of these')
    parser.add_argument('--list', action='store_true', help='print the mutants and run nothing')
    parser.add_argument('--jobs', type=int, default=2, help='mutants at a time')
    parser.add_argument('--limit', type=float, default=300.0, help='seconds that one run of the tests may take')
    parser.add_argument('--unchecked', action='store_true', help='trust that the unchanged library passes its tests')
    args = parser.parse_args()
    os.environ |= dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), '1')
    chosen = [mutant for mutant in MUTANTS if any(text in mutant.name for text in args.only)]
    if not chosen:
        parser.error(f'no mutant is named like {args.only}; --list names them')
    if args.list:
        print('\n'.join(f'{m.name}  {m.file}: {m.old!r} -> {m.new!r}  ({m.claim})' for m in chosen))
        return 0
    results = judge_all(chosen, args.jobs, args.limit, args.unchecked)
    print(table(results))
    return int(any(result.outcome is not Outcome.KILLED for result in results))


if __name__ == '__main__':
    sys.exit(main())
