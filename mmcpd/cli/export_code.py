"""Write a slim model as one plain Python file and its weights, which need no mmcpd.

The file builds the model with torch and the model's own package (mmpretrain, mmseg, ...) alone; the weights are in
the safetensors format. Both are tried before they appear: the model that the file builds must compute the same.

Example:
  mmcpd export-code my_config.py work_dirs/my_config/slim.pth
  mmcpd export-code my_config.py slim.pth --out plain/my_model.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mmcpd.cli.checks import check_checkpoint, check_folder
from mmcpd.cli.common import UserError
from mmcpd.cli.configs import read_config
from mmcpd.engine.export_code import export_code


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('checkpoint', help='a slim.pth')
    parser.add_argument('--out', type=Path, metavar='FILE', help='a .py file; default: slim_model.py beside it')


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    check_checkpoint(args.checkpoint, 'checkpoint')
    out = args.out or Path(args.checkpoint).with_name('slim_model.py')
    if out.suffix != '.py' or not out.stem.isidentifier():
        raise UserError(f'--out: {out} must be a .py file that can be imported: letters, digits and _ in its name')
    check_folder(out.absolute().parent, '--out')
    gap = export_code(cfg, args.checkpoint, out)
    print(f'wrote {out} and {out.with_suffix(".safetensors")}; its outputs are within {gap:.1e} of the slim model')
