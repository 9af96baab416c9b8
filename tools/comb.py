"""Show a config's coupling groups, and why the rest is frozen."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from mmengine.config import Config

from mmcpd.comb import comb
from mmcpd.engine import cli
from mmcpd.engine.build import build_dense, example_inputs, type_name
from mmcpd.engine.picture import plot
from mmcpd.engine.slimmed import fill, read_checkpoint


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument('--checkpoint', help='weights to load; the groups do not depend on them')
    parser.add_argument('--heads', choices=('dim', 'head'), help="what attention gives up; default: the config's")
    parser.add_argument('--shape', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the input')
    parser.add_argument('--strict', action='store_true', help='fail on an operation without a rule')
    parser.add_argument('--json', metavar='FILE', help='write the comb as JSON')
    parser.add_argument('--plot', metavar='FILE', help='write a picture of the groups (.png, .svg, .pdf)')
    return parser.parse_args()


def options(cfg: Config, args: argparse.Namespace) -> dict[str, object]:
    """Return what training would comb with: the options of the config's CombHook, then those given here."""
    hooks = [hook for hook in cfg.get('custom_hooks') or () if type_name(hook) == 'CombHook']
    chosen = {key: hook[key] for hook in hooks for key in ('heads', 'ignore', 'strict') if key in hook}
    if args.heads:
        chosen['heads'] = args.heads
    if args.strict:
        chosen['strict'] = True
    return chosen


def main(args: argparse.Namespace) -> None:
    cfg = cli.read_config(args)
    for path in filter(None, (args.json, args.plot)):
        cli.check_work_dir(Path(path).absolute().parent)
    cli.check_checkpoint(args.checkpoint, '--checkpoint')
    model = build_dense(cfg)
    if args.checkpoint:
        fill(model, read_checkpoint(args.checkpoint)['state_dict'], args.checkpoint)
    inputs = torch.randn(1, *args.shape) if args.shape else example_inputs(cfg)
    found = comb(model, inputs, **options(cfg, args))
    print(found)
    for path, write in ((args.json, found.to_json), (args.plot, lambda path: plot(found, path))):
        if path:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            write(path)
            print(f'wrote {path}')


if __name__ == '__main__':
    arguments = parse_args()
    sys.exit(cli.guard(main, arguments))
