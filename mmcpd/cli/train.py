"""Train a model by its config: comb, prune and distil if the config says so.

Example:
  mmcpd train mmcpd::cpd/resnet50_prune.py
  mmcpd train my_config.py --cfg-options default_hooks.prune.target.macs=0.4
  mmcpd train my_config.py --resume
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.device import get_device

from mmcpd.cli.checks import check_checkpoint, check_data, check_folder, check_hooks, use_whole_checkpoints
from mmcpd.cli.common import UserError, add_runner_options, one_line
from mmcpd.cli.configs import read_config, set_runner_options
from mmcpd.cli.runner import build_runner, last_whole, newest, resume_hint, run
from mmcpd.engine.checkpoints import check_start
from mmcpd.engine.compat import start_processes
from mmcpd.engine.hooks import PruneHook
from mmcpd.engine.stage import check_target
from mmcpd.files import unwritten, why_unwritten


def add_options(parser: argparse.ArgumentParser) -> None:
    add_runner_options(parser)
    add = parser.add_argument
    add(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from this checkpoint; without a name, from the last one in the work dir',
    )
    add('--amp', action='store_true', help='train in automatic mixed precision')
    add('--seed', type=int, help="seed of everything random; default: the config's")
    add('--no-validate', action='store_true', help='do not evaluate while training')
    add('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    add('--no-persistent-workers', action='store_true', help="start the loaders' workers anew each epoch")


def merge_args(cfg: Config, args: argparse.Namespace) -> None:
    """Write the options into the config, in place; `--cfg-options` was merged when it was read."""
    set_runner_options(cfg, args)
    if args.no_validate:
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.seed is not None:
        cfg.randomness = {**cfg.get('randomness', {}), 'seed': args.seed}
    if args.resume == 'auto' or (args.resume is None and cfg.get('resume') and not cfg.get('load_from')):
        # Without a checkpoint yet this is the first run, and load_from is where it begins.
        if (path := newest(cfg)) is not None:
            cfg.resume, cfg.load_from = True, path
    elif args.resume:
        cfg.resume, cfg.load_from = True, args.resume
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise UserError(f'--auto-scale-lr: {args.config} has no auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    if args.no_persistent_workers:
        for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
            if cfg.get(name) is not None:
                cfg[name].persistent_workers = False


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    merge_args(cfg, args)
    if args.amp and get_device() == 'cpu':
        raise UserError('--amp needs an accelerator, and torch finds none here; leave it out')
    check_folder(cfg.work_dir, '--work-dir')
    use_whole_checkpoints(cfg)
    check_hooks(cfg)
    check_data(cfg, ('train_dataloader', 'val_dataloader'))
    check_checkpoint(cfg.get('load_from'), '--resume' if args.resume else 'load_from')
    if cfg.get('load_from') and '://' not in cfg.load_from:
        check_start(cfg, cfg.load_from)
    start_processes(cfg)
    try:
        runner = build_runner(cfg)
        run(runner, lambda runner: runner.train())
        for failure in [hook.failure for hook in runner.hooks if isinstance(hook, PruneHook)]:
            if failure is not None:  # the hook has said how to go on
                raise failure
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(resume_hint(cfg, args)) from error
    except (OSError, RuntimeError) as error:
        if why_unwritten(error) is None:
            raise
        raise UserError(f'{one_line(unwritten(error, Path(cfg.work_dir)))}; {last_whole(cfg)}') from error
    for hook in [hook for hook in runner.hooks if isinstance(hook, PruneHook)]:
        check_target(hook.stage(), Path(cfg.work_dir) / 'slim.pth')
