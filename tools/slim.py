"""Cut a slim.pth from a training checkpoint that was pruned."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmcpd.engine import cli
from mmcpd.engine.checkpoints import slim_checkpoint
from mmcpd.engine.finish import comparison


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument('checkpoint', help='a checkpoint that training wrote after pruning began')
    parser.add_argument('--out', metavar='FILE', help='default: slim.pth beside the checkpoint')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    cfg = cli.read_config(args)
    out = Path(args.out) if args.out else Path(args.checkpoint).with_name('slim.pth')
    cli.check_checkpoint(args.checkpoint, 'checkpoint')
    cli.check_folder(out.absolute().parent, '--out')
    meta = slim_checkpoint(cfg, args.checkpoint, out)
    print(f'{comparison(meta["dense"], meta["slim"])}\nsaved {out}')


if __name__ == '__main__':
    arguments = parse_args()
    sys.exit(cli.guard(main, arguments))
