"""Show the coupling groups of a config's model, and why the rest is frozen.

Example:
  mmcpd comb mmpretrain::resnet/resnet50_8xb32_in1k.py
  mmcpd comb my_config.py --heads head --json coupling.json --plot groups.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmcpd.cli.checks import check_checkpoint, check_folder
from mmcpd.cli.configs import read_config
from mmcpd.comb.api import UNUSED
from mmcpd.engine.checkpoints import load_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.plot import plot
from mmcpd.engine.slim_model import build_trained


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--checkpoint', help='weights to load; the groups do not depend on them')
    parser.add_argument('--heads', choices=('dim', 'head'), help="what attention gives up; default: the config's")
    parser.add_argument('--shape', type=int, nargs=3, metavar=('C', 'H', 'W'), help='size of the input')
    parser.add_argument('--strict', action='store_true', help='fail on an operation without a rule')
    parser.add_argument('--unused', choices=UNUSED, help="what feeds layers that never run; default: the config's")
    parser.add_argument('--json', metavar='FILE', help='write the coupling as JSON')
    parser.add_argument('--plot', metavar='FILE', help='write a picture of the groups (.png, .svg, .pdf)')


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    for option, path in (('--json', args.json), ('--plot', args.plot)):
        if path:
            check_folder(Path(path).absolute().parent, option)
    check_checkpoint(args.checkpoint, '--checkpoint')
    model = load_dense(cfg, args.checkpoint) if args.checkpoint else build_trained(cfg)
    given = {'heads': args.heads, 'unused': args.unused, 'strict': args.strict or None, 'input_shape': args.shape}
    coupling = comb_by_config(model, cfg, **{name: value for name, value in given.items() if value is not None})
    print(coupling)
    for path, write in ((args.json, coupling.to_json), (args.plot, lambda path: plot(coupling, path))):
        if path:
            Path(path).absolute().parent.mkdir(parents=True, exist_ok=True)
            write(path)
            print(f'wrote {path}')
