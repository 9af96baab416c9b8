"""Cut a slim.pth from a training checkpoint that was pruned.

The exit status is 3 where the checkpoint is not at its target yet; the file is written all the same.

Example:
  mmcpd slim my_config.py work_dirs/my_config/epoch_30.pth
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmcpd.cli.checks import check_checkpoint, check_folder
from mmcpd.cli.configs import read_config
from mmcpd.engine.report import comparison
from mmcpd.engine.saving import slim_checkpoint
from mmcpd.engine.stage import check_target, stage_of


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', help='a checkpoint that training wrote after pruning began')
    parser.add_argument('--out', metavar='FILE', help='default: slim.pth beside the checkpoint')


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    out = Path(args.out) if args.out else Path(args.checkpoint).with_name('slim.pth')
    check_checkpoint(args.checkpoint, 'checkpoint')
    check_folder(out.absolute().parent, '--out')
    meta = slim_checkpoint(cfg, args.checkpoint, out)
    print(f'{args.checkpoint} is {stage_of(meta)}')
    print(f'{comparison(meta["dense"], meta["slim"])}\nsaved {out}')
    check_target(meta, out)
