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
from mmcpd.errors import CombError, DeployError, ProofError, PruneError, SlimError


class UserError(RuntimeError):
    """The command cannot do what was asked; the message says in one line what to change."""


OURS = (UserError, CombError, SlimError, PruneError, DeployError, ImportError)
# What a user's mistake raises, here, in the hooks and in MMEngine: shown in one line.
MISTAKES = (*OURS, ValueError, KeyError, OSError, SyntaxError)
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


def run(command: ModuleType, arguments: Sequence[str]) -> NoReturn:
    """Run a module of `mmcpd.cli` on the arguments after its name, and end the process with its exit status.

    The module has `add_options(parser)` and `main(args)`; its docstring is the help.
    """
    name = command.__name__.rpartition('.')[2]
    parser = argparse.ArgumentParser(
        prog=f'mmcpd {name}', description=command.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'config', help='path of a config, or package::name, as in mmpretrain::resnet/resnet18_8xb32_in1k.py'
    )
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


def guard(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Call a command and return its exit status: a mistake becomes one line on stderr, Ctrl-C becomes 130.

    A slim file that could not be proved is status 4.
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
        return 4 if isinstance(error, ProofError) else 1
    return 0


def was_interrupted(error: BaseException) -> bool:
    """Say whether Ctrl-C is behind an error: MMEngine catches everything while it formats a config."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, and its kind where it was not raised by our own code.

    Example:
        >>> one_line(KeyError('lr'))
        'lr (KeyError; --debug shows where)'
    """
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = ' '.join(text.split()) or type(error).__name__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OURS) or (frames and str(frames[-1].f_globals.get('__name__')).startswith('mmcpd.')):
        return text
    if isinstance(error, URLError):  # torch's hub names the address in the line before
        return f'cannot download the checkpoint above ({text}): fetch it elsewhere and name the file in the config'
    return f'{text} ({type(error).__name__}; --debug shows where)'
