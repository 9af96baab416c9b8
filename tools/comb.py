"""Show a config's coupling groups, and why the rest is frozen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmcpd.engine import cli
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import comb_by_config, load_dense
from mmcpd.engine.plot import plot


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument('--checkpoint', help='weights to load; the groups do not depend on them')
    parser.add_argument('--heads', choices=('dim', 'head'), help="what attention gives up; default: the config's")
    parser.add_argument('--shape', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the input')
    parser.add_argument('--strict', action='store_true', help='fail on an operation without a rule')
    parser.add_argument('--json', metavar='FILE', help='write the comb as JSON')
    parser.add_argument('--plot', metavar='FILE', help='write a picture of the groups (.png, .svg, .pdf)')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    cfg = cli.read_config(args)
    for option, path in (('--json', args.json), ('--plot', args.plot)):
        if path:
            cli.check_folder(Path(path).absolute().parent, option)
    cli.check_checkpoint(args.checkpoint, '--checkpoint')
    model = load_dense(cfg, args.checkpoint) if args.checkpoint else build_dense(cfg)
    given = {'heads': args.heads, 'strict': args.strict or None, 'input_shape': args.shape}
    found = comb_by_config(model, cfg, **{name: value for name, value in given.items() if value is not None})
    print(found)
    for path, write in ((args.json, found.to_json), (args.plot, lambda path: plot(found, path))):
        if path:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            write(path)
            print(f'wrote {path}')


if __name__ == '__main__':
    arguments = parse_args()
    sys.exit(cli.guard(main, arguments))
