"""Prune a trained model in minutes, without training and without labels, and write slim.pth.

Attention heads are rotated, units scored on a few hundred pictures, the least important ones removed, and the layers
around them refitted so that they give out what the dense model's do. --distill goes on with a short training on what
the dense model answers. CONFIG is any config of a model; the options of a PruneHook in it hold.

Several --target give a curve of the metric against MACs, parameters and latency from one scoring.

Example:
  mmcpd prune my_config.py my_checkpoint.pth --target macs=0.5
  mmcpd prune my_config.py my_checkpoint.pth --target macs=0.5 --images photos/ --distill 240
  mmcpd prune my_config.py my_checkpoint.pth --target macs=0.75 --target macs=0.5 --target macs=0.35
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mmengine
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmcpd.cli.checks import check_checkpoint, check_data, check_folder, check_hooks
from mmcpd.cli.common import UserError
from mmcpd.cli.configs import read_config
from mmcpd.cli.stages import Stages
from mmcpd.compat import require
from mmcpd.coupling import Coupling, aligned
from mmcpd.engine.at_once import PrunedAtOnce, check_label_free, ends_in_softmax, prune_at_once
from mmcpd.engine.build import build_dense, hook_options
from mmcpd.engine.checkpoints import cut_checked, load_any
from mmcpd.engine.combing import comb_by_config, shape_combed
from mmcpd.engine.evaluate import SPLITS, evaluate, has_metrics
from mmcpd.engine.label_free import teach_
from mmcpd.engine.pictures import pictures
from mmcpd.engine.plot import plot_curve
from mmcpd.engine.report import ROWS, comparison, costs
from mmcpd.engine.slim_file import is_slim, read_slim, save_slim
from mmcpd.files import write_json
from mmcpd.prune import Schedule
from mmcpd.prune.schedule import QUANTITIES
from mmcpd.rotate import rotate_
from mmcpd.slim import structure
from mmcpd.version import __version__

SLIM, REPORT = 'slim.pth', 'prune.json'
CURVE = 'curve'  # .json and .png
ROUNDS = 200  # of timing a curve's models side by side
# Options of a config's PruneHook that hold here, beside those of combing, and what they are called.
OPTIONS = {'min_units': 'min_units', 'round_to': 'round_to', 'normalize': 'normalize_by', 'importance': 'importance'}
Target = dict[str, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', help="the trained model's weights, or a slim.pth, which is pruned further")
    add(
        '--target',
        action='append',
        nargs='+',
        metavar='QUANTITY=SHARE',
        help=f'what remains of the model, as macs=0.5; {", ".join(QUANTITIES)}; several after one --target all hold, '
        "several --target make a curve; default: the config's PruneHook's",
    )
    add('--pictures', type=int, default=512, metavar='N', help='pictures to score and refit on; default 512')
    add(
        '--images', metavar='DIR', help="take them from a folder of plain pictures; default: the config's training data"
    )
    add('--distill', type=int, default=0, metavar='ITERATIONS', help='train so long on what the dense model answers')
    add(
        '--lr',
        type=float,
        help='learning rate of --distill; default: that of a config with a PruneHook, else a tenth of it',
    )
    add('--no-rotate', action='store_true', help='leave the basis inside attention heads as it is')
    add('--no-refit', action='store_true', help='only mask')
    add('--no-validate', action='store_true', help='do not measure before and after')
    add('--device', default='cpu', help='where it runs; default cpu')
    add('--seed', type=int, default=0, help='of the choice of pictures and of the score; default 0')
    add('--out', type=Path, metavar='DIR', help='default: work_dirs/<config>')


@dataclass(frozen=True, eq=False)
class Dense:
    """What all targets start from: the dense model, rotated and combed."""

    model: BaseModel
    coupling: Coupling
    batches: list[Tensor]
    facts: dict[str, Any]  # costs, and metrics where validated
    rotated: str | None


@dataclass(frozen=True, eq=False)
class Result:
    """One slim model, and what is to be written about it."""

    name: str  # of the target, as macs-0.5
    model: nn.Module
    structure: dict[str, Any]
    meta: dict[str, Any]
    report: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write `slim.pth` and `prune.json` into a folder, which is made."""
        save_slim(folder / SLIM, self.model, self.structure, self.meta)
        write_json(folder / REPORT, self.report)


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    check_hooks(cfg)
    targets, options = _targets(args, cfg), _options(cfg)
    _check_numbers(args)
    out = args.out or Path('work_dirs') / Path(cfg.filename).stem
    check_checkpoint(args.checkpoint, 'checkpoint')
    check_folder(out, '--out')
    _check_data(cfg, args)
    if len(targets) > 1:
        require('deploy')
        require('demo')
    stages, results, scores = Stages(), [], None
    dense = prepare(cfg, args, stages)
    for target in targets:
        pruned = prune_at_once(
            dense.model, dense.coupling, dense.batches, target, **options, scores=scores, refit=not args.no_refit,
            absorb=args.distill > 0, seed=args.seed, progress=stages.progress,
        )  # fmt: skip
        stages.add(pruned.seconds)
        scores = pruned.scores
        print(f'\n{pruned}')
        result = slim_down(dense, pruned, target, cfg, args, stages)
        results.append(result)
        folder = out if len(targets) == 1 else out / result.name
        result.write(folder)
        print(f'\n{comparison(dense.facts, result.report["slim"])}\nsaved {folder / SLIM} and {folder / REPORT}')
    if len(results) > 1:
        write_curve(out, dense, results, stages)


def prepare(cfg: Config, args: argparse.Namespace, stages: Stages) -> Dense:
    """Load the dense model and pictures, measure it, rotate its heads and comb it."""
    shape = read_slim(args.checkpoint)['meta'].get('input_shape') if is_slim(args.checkpoint) else None
    model: Any = load_any(cfg, args.checkpoint).to(args.device)
    with stages('read pictures') as progress:
        batches = pictures(
            cfg, model, args.pictures, folder=args.images, shape=shape, seed=args.seed, progress=progress
        )
    metrics = _metrics(model, cfg, args, stages, 'dense')
    rotated = None
    if not args.no_rotate:
        with stages('rotate'):
            rotated = str(rotate_(model, batches[0][:1].to(args.device)))
            print(rotated)
    with stages('comb'):
        coupling = comb_by_config(model, cfg, input_shape=shape)
    print(f'{len(coupling.groups)} groups, {coupling.units} units')
    return Dense(model, coupling, batches, {**costs(coupling, coupling.keep()), 'metrics': metrics}, rotated)


def slim_down(
    dense: Dense, pruned: PrunedAtOnce, target: Target, cfg: Config, args: argparse.Namespace, stages: Stages
) -> Result:
    """Slim a masked model, let the dense one teach it where asked, and measure it."""
    name = '_'.join(f'{quantity}-{share:g}' for quantity, share in target.items())
    coupling, keep = dense.coupling, pruned.keep
    with stages('slim'):
        small: Any = cut_checked(pruned.model, coupling, keep)
    report: dict[str, Any] = {'target': target, 'dense': dense.facts}
    metrics = _metrics(small, cfg, args, stages, name)
    if args.distill:
        report['before_distillation'] = {'metrics': metrics}
        with stages('distil', 'iterations') as progress:
            teach_(
                small, dense.model, cfg, args.distill, softmax=ends_in_softmax(dense.model), lr=args.lr,
                pictures=[batch.to(args.device) for batch in dense.batches] if args.images else None,
                seed=args.seed, progress=progress,
            )  # fmt: skip
        metrics = _metrics(small, cfg, args, stages, f'{name}, distilled')
    report['slim'] = {**costs(coupling, keep), 'metrics': metrics}
    report |= {'rotated': dense.rotated, 'refitted': None if pruned.refitted is None else str(pruned.refitted)}
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str | None)}
    report |= {'seconds': stages.seconds, 'settings': settings, 'versions': versions()}
    plan = structure(build_dense(cfg), small.cpu())
    meta = {'cfg': cfg.pretty_text, 'input_shape': shape_combed(coupling)}
    return Result(name, small, plan, meta | {key: report[key] for key in ('dense', 'slim')}, report)


def versions() -> dict[str, str]:
    """Return the versions of what the result depends on, and the date."""
    packages = {'mmcpd': __version__, 'python': platform.python_version()}
    packages |= {name: version(name) for name in ('torch', 'numpy')} | {'mmengine': mmengine.__version__}
    return packages | {'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')}


def write_curve(out: Path, dense: Dense, results: Sequence[Result], stages: Stages) -> None:
    """Measure all models side by side in ONNX Runtime, print the table, and write it and a plot."""
    from mmcpd.deploy import deploy  # needs ONNX, which nothing else here does

    models = {'dense': dense.model.cpu(), **{result.name: result.model for result in results}}
    with stages('time', 'rounds') as progress, tempfile.TemporaryDirectory() as folder:
        timed = deploy(models, [dense.batches[0][:1]], folder, dynamic_batch=False, runs=ROUNDS, progress=progress)
    costs_of = [dense.facts, *(result.report['slim'] for result in results)]
    rows = [
        {'name': entry.name, 'ms': entry.median, 'ratio': entry.ratio, **found}
        for entry, found in zip(timed.latency, costs_of, strict=True)
    ]
    print(f'\n{curve_table(rows)}')
    write_json(out / f'{CURVE}.json', {'facts': timed.facts, 'rows': rows})
    plot_curve(rows, out / f'{CURVE}.png')
    print(f'wrote {out / CURVE}.json and {out / CURVE}.png')


def curve_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the models of a curve as a table, one line each, shares of the first."""
    metrics = list(rows[0]['metrics'])
    lines: list[tuple[str, ...]] = [('model', 'MACs', 'parameters', 'activations', 'ms', 'of dense', *metrics)]
    for row in rows:
        shares = [f'{row[quantity] / rows[0][quantity]:.1%}' for quantity in ROWS]
        found = [f'{row["metrics"][name]:.2f}' if name in row['metrics'] else '-' for name in metrics]
        lines.append((row['name'], *shares, f'{row["ms"]:.2f}', f'{row["ratio"]:.2f}', *found))
    return '\n'.join(aligned(lines))


def _metrics(model: nn.Module, cfg: Config, args: argparse.Namespace, stages: Stages, name: str) -> dict[str, float]:
    if args.no_validate or not has_metrics(cfg):
        return {}
    with stages(f'validate {name}') as progress:
        return evaluate(model, cfg, progress=progress)


def _targets(args: argparse.Namespace, cfg: Config) -> list[Target]:
    """Return the targets of the command line, or that of the config's hook."""
    targets = [dict(map(_target, words)) for words in args.target or ()]
    if not targets:
        given = hook_options(cfg).get('target')
        if given is None:
            raise UserError('--target: say what remains, as --target macs=0.5, or set the target of a PruneHook')
        targets = [dict(given)]
    for target in targets:
        Schedule(target)  # refuses what makes no sense
    return targets


def _options(cfg: Config) -> dict[str, Any]:
    """Return what the config's hook says about the choice; an importance that reads a loss has no say here."""
    options = {OPTIONS[name]: value for name, value in hook_options(cfg).items() if name in OPTIONS}
    try:
        check_label_free(options.get('importance', 'gauss_newton'))
    except ValueError as error:
        print(f'{error}; gauss_newton does it here')
        del options['importance']
    return options


def _target(word: str) -> tuple[str, float]:
    quantity, _, share = word.partition('=')
    try:
        return quantity, float(share)
    except ValueError:
        raise UserError(f'--target: {word!r} is not QUANTITY=SHARE, as macs=0.5') from None


def _check_numbers(args: argparse.Namespace) -> None:
    for name, least in (('pictures', 1), ('distill', 0), ('seed', 0)):
        if getattr(args, name) < least:
            raise UserError(f'--{name.replace("_", "-")} must be {least} or more, not {getattr(args, name)}')
    if args.lr is not None and not args.lr > 0:
        raise UserError(f'--lr must be above 0, not {args.lr}')
    try:
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {args.device}: {str(error).splitlines()[0]}') from error


def _check_data(cfg: Config, args: argparse.Namespace) -> None:
    if args.images is None:
        check_data(cfg, ('train_dataloader',))
    elif not Path(args.images).is_dir():
        raise UserError(f'--images: there is no folder {args.images}')
    if not args.no_validate and has_metrics(cfg):
        check_data(cfg, tuple(f'{split}_dataloader' for split in SPLITS if cfg.get(f'{split}_dataloader'))[:1])
