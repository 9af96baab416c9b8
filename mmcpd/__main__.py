"""The console command `mmcpd`, its commands in the table below; `python -m mmcpd` is the same.

What MMEngine needs to start is imported once a command is known, so that `mmcpd --help` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from mmcpd.version import __version__

# A command is the module of that name in `mmcpd.cli`, `_` for `-`; its text is the first line of its docstring.
COMMANDS = {
    'train': 'Train a model by its config: comb, prune and distil if the config says so.',
    'test': "Test a config's model with a training checkpoint, a slim.pth or an ONNX file, and print the metrics.",
    'comb': "Show the coupling groups of a config's model, and why the rest is frozen.",
    'slim': 'Cut a slim.pth from a training checkpoint that was pruned.',
    'prune': 'Prune a trained model in minutes, without training and without labels, and write slim.pth.',
    'report': 'Write the report of a run as one page of HTML, and the card of its slim model.',
    'export-code': 'Write a slim model as one plain Python file and its weights, which need no mmcpd.',
    'deploy': 'Export a slim model and its dense original to ONNX, check both against torch, and measure them.',
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit status: 0, 1 on an error, 2 on wrong usage, 130 on Ctrl-C.

    3: the slim model is written, and did not reach its target. 4: training is done, but its slim model could not be
    proved to be what was trained.

    Args:
        arguments: The command's name and its arguments; None: those of the command line.

    Example:
        >>> main(['slim', 'configs/cpd/resnet50_prune.py', 'nowhere.pth'])
        Traceback (most recent call last):
        SystemExit: 1
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog='mmcpd',
        description='Comb, prune, distil and slim any vision model of OpenMMLab.',
        epilog='mmcpd COMMAND --help lists the options of a command.',
    )
    parser.add_argument('--version', action='version', version=f'mmcpd {__version__}')
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', dest='command', required=True)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    command = parser.parse_args(arguments[:1]).command
    import_module('mmcpd.cli.common').run(import_module(f'mmcpd.cli.{command.replace("-", "_")}'), arguments[1:])
    raise AssertionError('a command ends the process')


if __name__ == '__main__':
    main()
