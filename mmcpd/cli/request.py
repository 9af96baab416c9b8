"""What `mmcpd prune` was asked for: its arguments, and where they say nothing the options of the config's PruneHook."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from mmcpd.cli.checks import check_checkpoint, check_data, check_folder
from mmcpd.cli.common import UserError, check_least
from mmcpd.cli.shares import add_remain, read_shares, remain_of
from mmcpd.engine.at_once import check_label_free
from mmcpd.engine.build import hook_options
from mmcpd.engine.evaluate import SPLITS, has_metrics
from mmcpd.engine.label_free import check_teachable
from mmcpd.engine.latency import check_threads
from mmcpd.prune import LATENCY, Schedule, check_importance
from mmcpd.prune.schedule import QUANTITIES

Target = Mapping[str, float]
PICTURES = 512
# Options of a PruneHook about the choice of units, and what `prune_at_once` calls them.
CHOICE = {'min_units': 'min_units', 'round_to': 'round_to', 'normalize': 'normalize_by', 'importance': 'importance'}


@dataclass(frozen=True)
class Request:
    """What is to be done."""

    checkpoint: str
    targets: tuple[Target, ...]
    choice: Mapping[str, Any]  # options of `prune_at_once`
    pictures: int
    images: str | None
    rotate: bool
    refit: bool
    distill: int
    lr: float | None
    validate: bool
    device: str
    seed: int
    out: Path
    threads: int | None = None


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
    add_remain(parser)
    add('--pictures', type=int, metavar='N', help=f'pictures to score and refit on; default {PICTURES}')
    add(
        '--images', metavar='DIR', help="take them from a folder of plain pictures; default: the config's training data"
    )
    add(
        '--distill',
        type=int,
        default=0,
        metavar='ITERATIONS',
        help="train so long on what the dense model answers; the config's losses and labels are not used",
    )
    add('--lr', type=float, help='of --distill; default: that of a config with a PruneHook, else a tenth of it')
    add('--no-rotate', action='store_true', help='leave the basis inside attention heads as it is')
    add('--no-refit', action='store_true', help='only mask')
    add('--no-validate', action='store_true', help='do not measure before and after')
    add('--device', default='cpu', help='where it runs; default cpu')
    add('--seed', type=int, help='of the choice of pictures, the score and the distillation; default 0')
    add('--threads', type=int, help='of ONNX Runtime, for a target of latency; default: as many as cores')
    add('--out', type=Path, metavar='DIR', help='default: work_dirs/<config>')


def read_request(args: argparse.Namespace, cfg: Config) -> Request:
    """Return what is to be done, checked as far as that is possible without a model.

    Raises:
        UserError, ValueError: an argument makes no sense, or names what is not there.
    """
    hook = hook_options(cfg)
    request = Request(
        checkpoint=args.checkpoint,
        targets=_targets(args, hook),
        choice={**_choice(hook), 'remain': remain_of(args.remain, hook)},
        pictures=_first(args.pictures, hook.get('pictures'), PICTURES),
        images=args.images,
        rotate=not args.no_rotate and hook.get('rotate', True),
        refit=not args.no_refit and hook.get('refit', True),
        distill=args.distill,
        lr=args.lr,
        validate=not args.no_validate and has_metrics(cfg),
        device=args.device,
        seed=_first(args.seed, hook.get('seed'), 0),
        out=args.out or Path('work_dirs') / Path(cfg.filename).stem,
        threads=hook.get('threads') if args.threads is None else args.threads,
    )
    check_latency(request.threads, request.targets)
    _check_numbers(request)
    check_checkpoint(request.checkpoint, 'checkpoint')
    check_folder(request.out, '--out')
    _check_data(cfg, request)
    return request


def check_latency(threads: int | None, targets: Sequence[Target]) -> None:
    """Refuse threads that make no sense.

    Raises:
        UserError: with what to change.
    """
    timed = [dict(target) for target in targets if LATENCY in target]
    try:
        check_threads(threads, timed[0] if timed else {})
    except ValueError as error:
        raise UserError(f'--threads: {error}') from error


def _first(*values: int | None) -> int:
    return next(value for value in values if value is not None)


def _targets(args: argparse.Namespace, hook: Mapping[str, Any]) -> tuple[Target, ...]:
    targets = [read_shares(words, '--target') for words in args.target or ()]
    if not targets and 'target' not in hook:
        raise UserError('--target: say what remains, as --target macs=0.5, or set the target of a PruneHook')
    targets = targets or [dict(hook['target'])]
    for target in targets:
        Schedule(target)  # refuses what makes no sense
    names = [name_of(target) for target in targets]
    if again := next((name for name in names if names.count(name) > 1), ''):
        raise UserError(f'--target: {again} is there twice')
    return tuple(targets)


def name_of(target: Target) -> str:
    """Return what the folder and the row of a target are called, where there are several.

    Example:
        >>> name_of({'macs': 0.5, 'params': 0.6})
        'macs-0.5_params-0.6'
    """
    return '_'.join(f'{quantity}-{share:g}' for quantity, share in target.items())


def _choice(hook: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hook's options about the choice; an importance that reads a loss has no say here, which is printed."""
    options = {name: hook[option] for option, name in CHOICE.items() if option in hook}
    if 'importance' in options:
        check_importance(options['importance'])
        try:
            check_label_free(options['importance'])
        except ValueError as error:
            print(f'{error}; gauss_newton does it here')
            del options['importance']
    return options


def _check_numbers(request: Request) -> None:
    check_least(request, 1, 'pictures')
    check_least(request, 0, 'distill', 'seed')
    if request.lr is not None and not request.lr > 0:
        raise UserError(f'--lr must be above 0, not {request.lr}')
    if request.lr is not None and not request.distill:
        raise UserError('--lr is the rate of --distill, which is not asked for: give that too')
    try:
        torch.zeros(1, device=request.device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device {request.device}: {str(error).splitlines()[0]}') from error


def _check_data(cfg: Config, request: Request) -> None:
    if request.distill:
        check_teachable(cfg)
    if request.images is None:
        check_data(cfg, ('train_dataloader',))
    elif not Path(request.images).is_dir():
        raise UserError(f'--images: there is no folder {request.images}')
    if request.validate:
        check_data(cfg, tuple(f'{split}_dataloader' for split in SPLITS if cfg.get(f'{split}_dataloader'))[:1])
