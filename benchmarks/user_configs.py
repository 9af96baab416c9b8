"""Take users' configs through the recipe of docs/your_model.md: train, test and deploy, by the real command line.

    python benchmarks/user_configs.py                    # all rows, about two minutes each on half a core
    python benchmarks/user_configs.py --only two_tasks   # repeatable; a name that stands in `--list`
    python benchmarks/user_configs.py --resume           # what the results file has not yet; --faults: what failed
    python benchmarks/user_configs.py --draw 15          # draw the shipped configs anew, by --seed
    python benchmarks/user_configs.py --survey           # try to build each shipped config, and count what is excluded
    python benchmarks/user_configs.py --report           # the table from the results as they are

A row is a config of `user_configs_own.py`, or one that mmpretrain or mmseg ships (`user_configs_shipped.py`), with the
three statements of the recipe. It ends right (exit status 0), or is refused in one line that says the cure (1). What
else happens is a fault, unless the config itself, without mmcpd, does not train here either: that is tried then.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks.user_configs_own import HOOK, OWN, RECIPE, write_own
from benchmarks.user_configs_report import write_report
from mmcpd.compat import REQUIREMENTS, installed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'user_configs.json'
TABLE = ROOT / 'docs' / 'configs.md'
PACKAGES = ('mmpretrain', 'mmseg')
NOT_OURS = 'Error; --debug shows where)'  # the end of a line that some other package's exception is
SECONDS = 600  # for one command
VERSIONS = ('torch', 'mmengine', 'mmpretrain', 'mmseg', 'onnxruntime')
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--only', action='append', default=[], metavar='NAME', help='only this row; repeatable')
    add('--seed', type=int, default=0, help='of the draw, the data and the runs')
    add('--resume', action='store_true', help='leave out rows that the results file has')
    add('--faults', action='store_true', help='only rows that ended in a fault, or could not be set up')
    add('--draw', type=int, metavar='N', help='draw so many configs of each package, write their names, and end')
    add('--survey', action='store_true', help='count the shipped configs that are excluded, and end')
    add('--list', action='store_true', help='print the rows, and end')
    add('--report', action='store_true', help='write the table, and end')
    add('--seconds', type=float, default=SECONDS, help=f'that one command may take; default {SECONDS}')
    add('--keep', type=Path, metavar='FOLDER', help='work here, and leave the files')
    add('--results', type=Path, default=RESULTS, help='default: benchmarks/results/user_configs.json')
    args = parser.parse_args()
    store = read(args.results)
    if args.draw or args.survey:
        (draw if args.draw else survey)(args, store)
    elif args.list:
        print('\n'.join(rows(store)))
    elif not args.report:
        wanted = [name for name in rows(store) if not args.only or name in args.only]
        if unknown := set(args.only) - set(wanted):
            parser.error(f'--only: no row {", ".join(sorted(unknown))}; --list prints them')
        done = store['rows']
        wanted = [n for n in wanted if not (args.resume and n in done)]
        wanted = [n for n in wanted if not args.faults or done.get(n, {}).get('verdict') in ('fault', 'not set up')]
        for name in wanted:
            done[name] = run_row(name, args)
            write(args.results, store)
            print(f'{name}: {done[name]["verdict"]}', flush=True)
    if not args.list:
        write(args.results, store)
        write_report(store, TABLE)


def read(path: Path) -> dict[str, Any]:
    """Return the results so far: what was drawn, what was excluded, and the rows by name."""
    return json.loads(path.read_text()) if path.is_file() else {'drawn': {}, 'survey': {}, 'rows': {}}


def write(path: Path, store: dict[str, Any]) -> None:
    """Write the results at once, so that a stopped run leaves them whole."""
    aside = path.with_suffix('.new')
    aside.write_text(json.dumps(store, indent=1) + '\n')
    aside.replace(path)


def rows(store: dict[str, Any]) -> list[str]:
    """Return the names of all rows: our own first, then the drawn ones, the packages in turn."""
    drawn = [[f'{package}/{name}' for name in store['drawn'].get(package, {}).get('names', ())] for package in PACKAGES]
    return [own.name for own in OWN] + [name for pair in zip_longest(*drawn) for name in pair if name]


def draw(args: argparse.Namespace, store: dict[str, Any]) -> None:
    """Draw shipped configs; those on the way that do not build are kept with the reason."""
    from benchmarks.user_configs_shipped import draw as drawing

    for package in PACKAGES:
        passed: dict[str, str] = {}
        names = [found.name for found in islice(drawing(package, args.seed, passed), args.draw)]
        store['drawn'][package] = {'seed': args.seed, 'names': names, 'passed_over': passed}
        write(args.results, store)
        print(f'{package}: {len(names)} drawn, {len(passed)} passed over', flush=True)


def survey(args: argparse.Namespace, store: dict[str, Any]) -> None:
    """Try to build each shipped config, and keep how many are excluded, by reason."""
    from benchmarks.user_configs_shipped import Excluded, count_params, names

    for package in PACKAGES:
        reasons: Counter[str] = Counter()
        every = names(package)
        for name in every:
            try:
                count_params(package, name)
            except Excluded as reason:
                reasons[str(reason)] += 1
        store['survey'][package] = {'configs': len(every), 'excluded': dict(reasons.most_common())}
        write(args.results, store)


# -- one row -----------------------------------------------------------------------------------------------------------
def run_row(name: str, args: argparse.Namespace) -> Row:
    """Write a row's files, run its commands, and say how it ended."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.keep / name.replace('/', '_') if args.keep else Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        row: Row = {'seed': args.seed, 'date': datetime.date.today().isoformat(), 'versions': versions()}
        try:
            row['what'] = write_files(name, folder)
        except Exception as error:  # noqa: BLE001 - the set-up's own, and a row says so
            return {**row, 'verdict': 'not set up', 'why': f'{type(error).__name__}: {error}'.splitlines()[0]}
        for command, words in COMMANDS.items():
            row[command] = run(words, folder, args)
            if command == 'train':
                row |= found_out(folder)
            if row[command]['status'] != 0:
                break
        row['verdict'] = verdict(row)
        if row['verdict'] == 'fault':
            row['without_mmcpd'] = run(WITHOUT, folder, args)
            row['verdict'] = 'fault' if row['without_mmcpd']['status'] == 0 else 'not set up'
        return row


COMMANDS = {
    'train': ['train', 'prune.py', '--work-dir', 'work', '--seed', '{seed}'],
    'test': ['test', 'prune.py', 'work/slim.pth', '--work-dir', 'tested'],
    'deploy': ['deploy', 'prune.py', 'work/slim.pth', '--runs', '3', '--threads', '1'],
}
WITHOUT = ['train', 'base.py', '--work-dir', 'without', '--seed', '{seed}']


def write_files(name: str, folder: Path) -> str:
    """Write base.py, prune.py and the data; return what the config is about, in short."""
    own = next((own for own in OWN if own.name == name), None)
    if own is not None:
        write_own(own, folder)
        return own.what
    from benchmarks.user_configs_shipped import adapt, count_params

    package, _, config = name.partition('/')
    adapt(package, config, folder / 'data').dump(folder / 'base.py')
    (folder / 'prune.py').write_text(RECIPE + HOOK)
    return f'{count_params(package, config) / 1e6:.1f} M parameters'


def run(words: Sequence[str], folder: Path, args: argparse.Namespace) -> Row:
    """Run one command of mmcpd; return its exit status, the last line that it wrote to stderr, and seconds."""
    command = [sys.executable, '-m', 'mmcpd', *(word.format(seed=args.seed) for word in words)]
    paths = os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]).rstrip(os.pathsep)
    environment = {**os.environ, 'PYTHONPATH': paths, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    environment |= {'HF_HUB_OFFLINE': '1'}
    start = time.perf_counter()
    log = folder / f'{words[0]}_{Path(words[1]).stem}.log'
    try:
        with log.open('w') as file:
            status = subprocess.run(
                command, cwd=folder, env=environment, timeout=args.seconds, stdout=file, stderr=subprocess.STDOUT
            ).returncode
    except subprocess.TimeoutExpired:
        status = -1
    ran: Row = {'status': status, 'seconds': round(time.perf_counter() - start, 1)}
    if status != 0:
        lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith('error: ')]
        ran['line'] = clean((errors or lines or [''])[-1], folder) if status != -1 else 'out of time'
        ran['end'] = [clean(line, folder) for line in lines[-12:]]
    return ran


def clean(line: str, folder: Path) -> str:
    """Take this machine's paths out of a line, and the middle of a long one: its end says whose it is."""
    packages = sysconfig.get_path('purelib')
    for path, name in ((str(folder), '.'), (str(ROOT), 'mmcpd'), (packages, 'site-packages'), (sys.prefix, 'env')):
        line = line.replace(path, name)
    return line if len(line) <= 600 else f'{line[:300]} ... {line[-300:]}'


def found_out(folder: Path) -> Row:
    """Read from a run's files how many groups there are, and what is left of the model."""
    from mmcpd.engine.slim_file import read_slim

    found: Row = {}
    table = folder / 'work' / 'coupling.txt'
    if table.is_file():
        found['coupling'] = clean(table.read_text().splitlines()[0], folder)
    if (folder / 'work' / 'slim.pth').is_file():
        meta = read_slim(folder / 'work' / 'slim.pth')['meta']
        found['left'] = {key: round(meta['slim'][key] / meta['dense'][key], 4) for key in ('macs', 'params', 'units')}
    return found


def verdict(row: Row) -> str:
    """Say how a row ended: 'right', 'refused' (one line of ours that says the cure), or 'fault'."""
    ran = [row[command] for command in COMMANDS if command in row]
    last = ran[-1]
    if last['status'] == 0:
        return 'right' if len(ran) == len(COMMANDS) else 'fault'
    ours = last['status'] == 1 and last['line'].startswith('error: ') and not last['line'].endswith(NOT_OURS)
    return 'refused' if ours else 'fault'


def versions() -> dict[str, str]:
    """Return what ran."""
    named = [each for part in ('pure', 'openmmlab', 'deploy') for each in REQUIREMENTS[part]]
    found = [installed(each.distributions) for each in named if each.module in VERSIONS]
    return {'python': platform.python_version(), **dict(pair for pair in found if pair is not None)}


if __name__ == '__main__':
    main()
