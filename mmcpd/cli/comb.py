"""Show the coupling groups of a config's model, and why the rest is frozen.

With --target it looks ahead: what pruning to that would leave, before any training. Units are scored by gauss_newton on
pictures of the training data, or by the magnitude of the weights where there are none; the output says which.

Example:
  mmcpd comb mmpretrain::resnet/resnet50_8xb32_in1k.py
  mmcpd comb my_config.py --heads head --json coupling.json --plot groups.png
  mmcpd comb my_config.py --checkpoint trained.pth --target macs=0.5 --latency --sensitivity --html comb.html
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

from mmengine.config import Config
from torch import nn

from mmcpd.cli.ahead import latencies, scored_by
from mmcpd.cli.checks import check_checkpoint, check_folder
from mmcpd.cli.comb_page import comb_page
from mmcpd.cli.common import UserError, check_least
from mmcpd.cli.configs import read_config
from mmcpd.cli.shares import add_remain, read_shares, remain_of
from mmcpd.cli.stages import Stages
from mmcpd.comb.api import UNUSED
from mmcpd.compat import require
from mmcpd.coupling import Coupling
from mmcpd.engine.build import hook_options
from mmcpd.engine.checkpoints import load_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.latency import measured_times, timed
from mmcpd.engine.plot import plot
from mmcpd.engine.preview import Preview, preview
from mmcpd.engine.sensitivity import Sensitivity, metric_sensitivity, score_sensitivity
from mmcpd.engine.slim_model import build_trained
from mmcpd.files import whole
from mmcpd.prune import LATENCY, Schedule, check_floors
from mmcpd.prune.selection import Floors

PICTURES, ROUNDS = 32, 100

PLOTS = ('.png', '.svg', '.pdf')


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--checkpoint', help='weights to load; the groups do not depend on them, what --target chooses does')
    add('--heads', choices=('dim', 'head'), help="what attention gives up; default: the config's")
    add('--shape', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the input')
    add('--strict', action='store_true', help='fail on an operation without a rule')
    add('--unused', choices=UNUSED, help="what feeds layers that never run; default: the config's")
    add(
        '--target',
        nargs='+',
        metavar='QUANTITY=SHARE',
        help='look ahead: what pruning to this leaves, as macs=0.5 or latency=0.6',
    )
    add_remain(parser)
    add('--latency', action='store_true', help='of --target: measure dense and slim in ONNX Runtime, in turns')
    add('--runs', type=int, default=ROUNDS, help=f'of --latency; default {ROUNDS}')
    add('--threads', type=int, help='of --latency and a target of latency; default: as many as cores')
    add('--sensitivity', action='store_true', help='what is lost where one group alone is pruned, for each group')
    add('--accuracy', action='store_true', help="of --sensitivity: by the config's metric instead of the score; slow")
    add('--pictures', type=int, default=PICTURES, metavar='N', help=f'pictures to score on; default {PICTURES}')
    add('--images', metavar='DIR', help="take them from a folder; default: the config's training data")
    add('--json', metavar='FILE', help='write the coupling, and what else was found, as JSON')
    add('--html', metavar='FILE', help='write it as one page that needs nothing else')
    add('--plot', metavar='FILE', help=f'write a picture of the groups ({", ".join(PLOTS)})')


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    check(args)
    target, floors = wanted(args, cfg)
    model = load_dense(cfg, args.checkpoint) if args.checkpoint else build_trained(cfg)
    given = {'heads': args.heads, 'unused': args.unused, 'strict': args.strict or None, 'input_shape': args.shape}
    with redirect_stdout(sys.stderr):  # what others log: the answer comes first
        coupling = comb_by_config(model, cfg, **{name: value for name, value in given.items() if value is not None})
    print(coupling, flush=True)
    ahead, found, latency = look_ahead(args, cfg, model, coupling, target, floors)
    writers = {
        args.json: lambda path: write_findings(path, coupling, ahead, found, latency),
        args.html: lambda path: write_page(path, args.config, coupling, ahead, found, latency),
        args.plot: lambda path: plot(coupling, path),
    }
    for path, write in writers.items():
        if path:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            write(path)
            print(f'wrote {path}')


def check(args: argparse.Namespace) -> None:
    """Refuse options that make no sense, before the model is built.

    Raises:
        UserError: with what to change.
    """
    for option in ('json', 'html', 'plot'):
        if path := getattr(args, option):
            check_folder(Path(path).absolute().parent, f'--{option}')
            if Path(path).is_dir():
                raise UserError(f'--{option}: {path} is a folder; name a file')
    if args.plot and Path(args.plot).suffix.lower() not in PLOTS:
        raise UserError(f'--plot: {args.plot} must end in one of {", ".join(PLOTS)}')
    check_checkpoint(args.checkpoint, '--checkpoint')
    for option, needs in (('latency', 'target'), ('remain', 'target'), ('accuracy', 'sensitivity')):
        if getattr(args, option) and not getattr(args, needs):
            raise UserError(f'--{option} says something about --{needs}: give that too')
    check_least(args, 1, 'shape', 'runs', 'threads', 'pictures')


def wanted(args: argparse.Namespace, cfg: Config) -> tuple[dict[str, float] | None, Floors]:
    """Return the target, if any, and the floors: the config's PruneHook's, and those of the command line.

    Raises:
        UserError, ValueError: one of them makes no sense.
    """
    hook = hook_options(cfg)
    remain = remain_of(args.remain, hook)
    floors: Floors = {'min_units': hook.get('min_units', 1), 'round_to': hook.get('round_to', 8), 'remain': remain}
    check_floors(**floors)
    if args.target is None:
        return None, floors
    target = read_shares(args.target, '--target')
    Schedule(target)  # refuses what makes no sense
    if LATENCY in target:
        require('deploy')
    return target, floors


def look_ahead(
    args: argparse.Namespace,
    cfg: Config,
    model: nn.Module,
    coupling: Coupling,
    target: dict[str, float] | None,
    floors: Floors,
) -> tuple[Preview | None, Sensitivity | None, str]:
    """Print what a target would leave, how fast that is, and how much each group matters, as far as asked for."""
    if target is None and not args.sensitivity:
        return None, None, ''
    stages, ahead, found, latency = Stages(), None, None, ''
    scored = scored_by(cfg, model, coupling, args, stages)
    if target is not None:
        by = hook_options(cfg).get('normalize')
        if LATENCY in target:
            with stages('time layers', 'layers') as progress:
                times = measured_times(model, coupling, args.threads, progress)
            coupling = timed(model, coupling, times, print)
        ahead = preview(coupling, scored, target, floors, normalize_by=by)
        print(f'\n{ahead}', flush=True)
        if args.latency:
            latency = latencies(model, coupling, ahead.keep, args.runs, args.threads, stages)
            print(f'\n{latency}', flush=True)
    if args.sensitivity and args.accuracy:
        with stages('validate', 'runs') as progress:
            found = metric_sensitivity(model, coupling, scored.scores, cfg, progress=progress)
    elif args.sensitivity:
        found = score_sensitivity(coupling, scored.scores, scored.importance)
    if found is not None:
        print(f'\n{found}', flush=True)
    return ahead, found, latency


def write_findings(
    path: str, coupling: Coupling, ahead: Preview | None, found: Sensitivity | None, latency: str
) -> None:
    """Write the coupling, its summary, and the preview and the sensitivity where there are such."""
    content = {'summary': coupling.summary(), **json.loads(coupling.to_json())}
    if ahead is not None:
        keep = {name: kept.tolist() for name, kept in ahead.keep.items()}
        content['preview'] = {
            'target': ahead.target, 'importance': ahead.scored.importance, 'why': ahead.scored.why,
            'dense': ahead.dense, 'slim': ahead.slim, 'left': ahead.left,
            'layers': [asdict(layer) for layer in ahead.layers], 'keep': keep, 'latency': latency or None,
        }  # fmt: skip
    if found is not None:
        content['sensitivity'] = asdict(found)
    with whole(Path(path)) as unfinished:
        unfinished.write_text(json.dumps(content), encoding='utf-8')


def write_page(
    path: str, title: str, coupling: Coupling, ahead: Preview | None, found: Sensitivity | None, latency: str
) -> None:
    """Write the page of HTML."""
    with whole(Path(path)) as unfinished:
        unfinished.write_text(comb_page(title, coupling, ahead, found, latency), encoding='utf-8')
