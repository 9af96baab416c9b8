"""What all commands share: their parser, and how they end: a mistake of the user is one line."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NoReturn
from urllib.error import URLError

from mmengine.config import DictAction

from mmcpd.engine.compat import leave
from mmcpd.engine.reader import trust
from mmcpd.errors import CombError, DeployError, ProofError, PruneError, SlimError, TargetError


class UserError(RuntimeError):
    """The command cannot do what was asked; the message says in one line what to change."""


OURS = (UserError, CombError, SlimError, PruneError, TargetError, DeployError, ImportError)
# Shown in one line: a config can make any of them, here, in the hooks, in MMEngine, in torch and in the user's code.
MISTAKES = (Exception,)
LONGEST = 300  # of somebody else's message
TRACEBACK = 'the traceback is in '  # how a note on an error begins that names a file
STATUS = {TargetError: 3, ProofError: 4}  # of an error that is not 1
CONFIG = 'path of a config, or package::name, as in mmpretrain::resnet/resnet18_8xb32_in1k.py'
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def run(command: ModuleType, arguments: Sequence[str]) -> NoReturn:
    """Run a module of `mmcpd.cli` on the arguments after its name, and end the process with its exit status.

    The module has `add_options(parser)` and `main(args)`; its docstring is the help. Its first argument is a config,
    or what its `SUBJECT` and `SUBJECT_HELP` say.
    """
    name = command.__name__.rpartition('.')[2].replace('_', '-')
    parser = argparse.ArgumentParser(
        prog=f'mmcpd {name}', description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(getattr(command, 'SUBJECT', 'config'), help=getattr(command, 'SUBJECT_HELP', CONFIG))
    command.add_options(parser)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config: a.b=1 c="[1,2]" d="[(a,b),(c,d)]", without spaces',
    )
    parser.add_argument(
        '--trust-checkpoint',
        action='store_true',
        help='let the checkpoints that are read run code, where that is refused; only if you trust who wrote them',
    )
    parser.add_argument('--debug', action='store_true', help='show the traceback of an error')
    # mmseg's CrossEntropyLoss warns of its own default at each start, also where a config names it.
    warnings.filterwarnings('ignore', message='Default ``avg_non_ignore`` is False')
    args = parser.parse_args(arguments)
    if args.trust_checkpoint:
        trust()
    leave(guard(command.main, args))


def add_runner_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the commands that run a Runner, named as OpenMMLab names them."""
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; default work_dirs/<config>')
    parser.add_argument('--launcher', choices=LAUNCHERS, default='none', help='how processes are launched')
    parser.add_argument('--no-pin-memory', action='store_true', help="do not pin the loaders' memory")
    # torch.distributed.launch passes it; torchrun sets the environment instead.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def check_least(values: object, least: int, *names: str) -> None:
    """Refuse numbers that are too small, among options that were given; one option may hold several.

    Raises:
        UserError: which.
    """
    for name in names:
        value = getattr(values, name)
        if value is not None and min(value if isinstance(value, list | tuple) else [value]) < least:
            raise UserError(f'--{name.replace("_", "-")} must be {least} or more, not {value}')


def guard(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Call a command and return its exit status: a mistake becomes one line on stderr, Ctrl-C becomes 130.

    A run that ended before its target, with its slim file written, is status 3; a slim file that could not be proved 4.
    """
    try:
        main(args)
    except KeyboardInterrupt as error:
        print(f'\ninterrupted\n{error}'.rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` for one, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MISTAKES as error:
        if was_interrupted(error):
            print('\ninterrupted', file=sys.stderr)
            return 130
        if args.debug:
            raise
        print(f'error: {one_line(error)}', file=sys.stderr)
        return next((status for kind, status in STATUS.items() if isinstance(error, kind)), 1)
    return 0


def was_interrupted(error: BaseException) -> bool:
    """Say whether Ctrl-C is behind an error: MMEngine catches everything while it formats a config."""
    cause, seen = error.__cause__ or error.__context__, [error]
    while cause is not None and cause not in seen:  # causes may run in a circle
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return any(isinstance(each, KeyboardInterrupt) for each in seen)


def one_line(error: BaseException) -> str:
    """Return an error's message in one line; where it is not our own, shortened, and with where the traceback is.

    What mmcpd's own code raises without meaning to is called a fault of mmcpd.

    Example:
        >>> one_line(KeyError('lr'))
        'lr (KeyError; --debug shows where)'
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    kind = type(error).__name__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = str(frames[-1].f_globals.get('__name__')) if frames else ''
    if isinstance(error, OURS) or (isinstance(error, ValueError | OSError) and module.startswith('mmcpd.')):
        return ' '.join(text.split()) or kind
    notes = [note for note in getattr(error, '__notes__', ()) if note.startswith(TRACEBACK)]
    where = notes[0] if notes else '--debug shows where'
    if isinstance(error, URLError):  # torch's hub names the address in the line before
        return f'cannot download the checkpoint above ({text}): fetch it elsewhere and name the file in the config'
    if module.startswith('mmcpd.'):
        return f'{shortened(text)} ({kind} in {module}: {where}. If the config is right, mmcpd is wrong: report it)'
    return f'{shortened(text) or kind} ({kind}; {where})'


def shortened(text: str) -> str:
    r"""Return somebody else's message in one line: its first sentences within 300 characters; of a traceback its end.

    Example:
        >>> shortened('Caught in worker 0.\nOriginal Traceback (most recent call last):\n  ...\nValueError: x')
        'Caught in worker 0. ValueError: x'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if any(line.endswith('Traceback (most recent call last):') for line in lines):
        lines = [lines[0], lines[-1]]
    joined = ' '.join(' '.join(lines).split())
    if len(joined) <= LONGEST:
        return joined
    sentences = joined[:LONGEST].rpartition('. ')[0]
    return f'{sentences}.' if sentences else f'{joined[: LONGEST - 3]}...'
