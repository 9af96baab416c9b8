"""What the command-line tools share: options, checks before anything is written, and errors in one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from mmcpd.engine.build import datasets, type_name
from mmcpd.engine.compat import mend_scopes
from mmcpd.engine.options import comb_options, prune_options
from mmcpd.errors import CombError, SlimError

EMBEDDED = 'configs/cpd/resnet50_prune.py'  # runs anywhere: its data ship inside a wheel
# How the folders of the data sets look that people lack most; others' are the paths that they name.
LAYOUTS = {
    'ImageNet': '{root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG',
    'CustomDataset': '{root}/train/<class>/*.png and {root}/test/<class>/*.png',
    'ADE20KDataset': '{root}/images/{{training,validation}}/*.jpg and {root}/annotations/{{training,validation}}/*.png',
    'CityscapesDataset': '{root}/leftImg8bit/{{train,val}}/<city>/*.png and '
    '{root}/gtFine/{{train,val}}/<city>/*_labelTrainIds.png',
}
DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')  # these fetch their data themselves
SPLIT_IS_A_FOLDER = ('ImageNet', 'ImageNet21k')
LAUNCHERS = ('none', 'pytorch', 'slurm', 'mpi')


class UserError(RuntimeError):
    """Say in one line what the user can mend."""


# What a user's mistake raises, here, in the hooks and in MMEngine: told in one line.
MISTAKES = (UserError, CombError, SlimError, ValueError, KeyError, OSError, ImportError, SyntaxError)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that every tool has, named as OpenMMLab names them."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument('config', help='path of a config')
    result.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override entries of the config: a.b=1 c="[1,2]" d="[(a,b),(c,d)]", without spaces',
    )
    result.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return result


def add_runner_options(result: argparse.ArgumentParser) -> None:
    """Add the options of the tools that run a Runner."""
    result.add_argument('--work-dir', help='folder of logs and checkpoints; default work_dirs/<config>')
    result.add_argument('--launcher', choices=LAUNCHERS, default='none', help='how processes are launched')
    result.add_argument('--no-pin-memory', action='store_true', help="do not pin the loaders' memory")
    # torch.distributed.launch passes it; torchrun sets the environment instead.
    result.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def guard(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a tool and return its exit status: a mistake becomes one line on stderr, Ctrl-C becomes 130.

    Example:
        >>> sys.exit(guard(main, args))
    """
    try:
        main(args)
    except KeyboardInterrupt as error:
        print(f'\ninterrupted\n{error}'.rstrip(), file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except MISTAKES as error:
        if was_interrupted(error):
            print('\ninterrupted', file=sys.stderr)
            return 130
        if args.debug:
            raise
        print(f'error: {one_line(error)}', file=sys.stderr)
        return 1
    return 0


def was_interrupted(error: BaseException) -> bool:
    """Say whether Ctrl-C is behind an error: MMEngine catches everything while it formats a config."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def one_line(error: BaseException) -> str:
    """Return an error's message in one line, and its kind where it was not raised by our own code."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = ' '.join(text.split()) or type(error).__name__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = isinstance(error, UserError | CombError | SlimError | ImportError)
    if ours or (frames and str(frames[-1].f_globals.get('__name__')).startswith('mmcpd.')):
        return text
    if isinstance(error, URLError):  # torch's hub names the address in the line before
        return f'cannot download the checkpoint above ({text}): fetch it elsewhere and name the file in the config'
    return f'{text} ({type(error).__name__}; --debug shows where)'


def read_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name and merge `--cfg-options` into it.

    Raises:
        UserError: There is no such config, or an option cannot be merged.
    """
    if not Path(args.config).is_file():
        raise UserError(f'{args.config}: there is no such config')
    mend_scopes()
    try:
        cfg = Config.fromfile(args.config)
    except FileNotFoundError as error:
        if '.mim' in Path(str(error.filename)).parts:
            text = f'{args.config} inherits from package::..., but {error.filename} is missing: install that package'
            raise UserError(f'{text} (mmcpd: pip install -e . in its checkout)') from error
        raise
    if 'model' not in cfg:
        raise UserError(f'{args.config} has no model; a config inherits from one that has, by _base_')
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f'--cfg-options does not fit {args.config}: {one_line(error)}') from error
    return cfg


def set_runner_options(cfg: Config, args: argparse.Namespace) -> None:
    """Write work dir, launcher and the data loaders' defaults into the config, in place."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(args.config).stem)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is not None:
            # Pinning warns without an accelerator; persistent workers are refused where there are none.
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
            if args.no_pin_memory:
                loader.pin_memory = False


def check_folder(folder: str | os.PathLike, option: str) -> None:
    """See that the folder of an option can be made and written to, and leave no trace.

    Raises:
        UserError: It cannot.
    """
    path = Path(folder).absolute()
    made = [part for part in (path, *path.parents) if not part.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'{option}: cannot write to the folder {folder} ({error.strerror}); choose another') from error
    finally:
        for part in made:
            if part.exists():
                part.rmdir()


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """See that the folders and files exist that the data sets of these loaders name.

    Raises:
        UserError: One is missing; the message names it, the layout, and the config that needs no data.
    """
    for name in loaders:
        for dataset in datasets(cfg.get(name)):
            kind = type_name(dataset)
            if kind in DOWNLOADING and dataset.get('download', True):
                continue
            for path in _paths(dataset):
                if '://' not in path and not Path(path).exists():
                    root = str(dataset.get('data_root') or path).rstrip('/')
                    layout = LAYOUTS.get(kind, ' and '.join(_paths(dataset)[1:]) or '{root}/...').format(root=root)
                    raise UserError(
                        f'no data: {path} does not exist, which {name} ({kind}) reads. Put the data into '
                        f'{root}, laid out as {layout}, or link it there; {EMBEDDED} needs no data'
                    )


def _paths(dataset: ConfigDict) -> list[str]:
    """Return the root, then the annotation file and the prefixes under it."""
    root = str(dataset.get('data_root') or '')
    split = dataset.get('split') if type_name(dataset) in SPLIT_IS_A_FOLDER else None
    prefix = dataset.get('data_prefix') or split or ''
    parts = [dataset.get('ann_file') or '', *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    return [path for path in (root, *(os.path.join(root, part) for part in parts if part)) if path]


def check_checkpoint(path: str | None, option: str) -> None:
    """See that a local checkpoint exists; a remote one is MMEngine's to fetch.

    Raises:
        UserError: There is no such file.
    """
    if path and '://' not in path and not Path(path).is_file():
        raise UserError(f'{option}: there is no checkpoint {path}')


def check_hooks(cfg: Config) -> None:
    """Check what a config combs and prunes with, as far as that is possible before there is a model.

    Raises:
        ValueError: An option is unknown or makes no sense.
    """
    names = {type_name(hook) for hook in cfg.get('custom_hooks') or ()}
    if 'CombHook' in names:
        comb_options(cfg)
    if 'PruneHook' in names:
        prune_options(cfg)


def build_runner(cfg: Config) -> Runner:
    """Build the Runner that a config asks for."""
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def run(runner: Runner, step: Callable[[Runner], Any]) -> Any:
    """Call `step(runner)`; if it fails by what may be a mistake, its traceback goes beside the log."""
    try:
        return step(runner)
    except MISTAKES as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        file = Path(runner.log_dir) / 'traceback.txt'
        file.write_text(traceback.format_exc(), encoding='utf-8')
        raise


def resume_hint(cfg: Config, args: argparse.Namespace) -> str:
    """Return how to go on after an interruption."""
    if find_latest_checkpoint(cfg.work_dir) is None:
        return f'{cfg.work_dir} has no checkpoint yet, so the next run starts anew'
    command = [word for word in sys.argv if word not in ('--resume', args.resume)]
    return f'go on from the last checkpoint: python {shlex.join(command)} --resume'
