"""Write the report of a run as one page of HTML, and the card of its slim model.

Training and `mmcpd prune` write both, report.html and card.md, by themselves: this is for older runs, and for when
there is more to say. The folder needs a slim.pth; what else is there is shown: the course of a training, dense.pth,
what `mmcpd deploy` measured.

Example:
  mmcpd report work_dirs/resnet50_prune
  mmcpd report work_dirs/pruned --config my_config.py --pictures 2000
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from mmengine.device import get_device

from mmcpd.cli.checks import check_folder
from mmcpd.cli.common import UserError, check_least
from mmcpd.cli.configs import read_config
from mmcpd.cli.stages import Stages
from mmcpd.engine.predicted import PICTURES
from mmcpd.engine.run_folder import SLIM, Run
from mmcpd.engine.run_report import PAGE, write_run_report
from mmcpd.files import write_json

SUBJECT = 'work_dir'
SUBJECT_HELP = 'folder of the run'


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('--config', metavar='FILE', help='config of the run; default: the one that the run put into the folder')
    add('--pictures', type=int, default=PICTURES, metavar='N', help=f'pictures to compare; default {PICTURES}; 0: none')
    add('--device', default=get_device(), help='default: %(default)s')
    add('--json', metavar='FILE', help='write what the report holds as JSON too')


def main(args: argparse.Namespace) -> None:
    folder = Path(args.work_dir)
    if not (folder / SLIM).is_file():
        raise UserError(f'{folder} has no {SLIM}: give the folder of a run that wrote one, or cut it by `mmcpd slim`')
    check_least(args, 0, 'pictures')
    check_folder(folder, 'work_dir')
    if args.json:
        check_folder(Path(args.json).absolute().parent, '--json')
    args.config = args.config or str(config_of(folder))
    cfg, stages = read_config(args), Stages()
    with stages('compare predictions', 'pictures') as progress:
        report = write_run_report(Run.of(folder, cfg), pictures=args.pictures, device=args.device, progress=progress)
    if args.json:
        write_json(Path(args.json), asdict(report))
    print(f'wrote {folder / PAGE}')


def config_of(folder: Path) -> Path:
    """Return the config that training or `mmcpd prune` put into its folder, the newest where there are several.

    Raises:
        UserError: there is none.
    """
    every = [*folder.glob('*.py'), *folder.glob('*/vis_data/config.py')]
    files = [file for file in every if not file.with_suffix('.safetensors').is_file()]  # those are exported code
    if not files:
        raise UserError(f'{folder} has no config: give it by --config')
    return max(files, key=lambda file: (file.parent == folder, file.stat().st_mtime))
