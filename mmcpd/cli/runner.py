"""Build a Runner with a readable screen, and run it."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

import mmcpd
from mmcpd.cli.checks import savers
from mmcpd.cli.common import MISTAKES, TRACEBACK, UserError, was_interrupted
from mmcpd.engine.latest import newest_whole
from mmcpd.errors import SlimError

PACKAGE = str(Path(mmcpd.__file__).parent)
# What MMEngine says in each run and no user can change: CheckpointHook's own use of FileClient, the name of the log's
# folder at the end of each epoch.
HIDDEN = ('"FileClient" will be deprecated', '"HardDiskBackend" is the alias', 'Exp name: ')


class ScreenFilter(logging.Filter):
    """Show warnings and mmcpd's own lines until the loop starts, then everything.

    What MMEngine says before (environment, configuration, hooks, initial weights, each parameter's options) is
    hundreds of lines: they are in the log file, as is what is `HIDDEN`.
    """

    loop_runs = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(HIDDEN):
            return False
        return self.loop_runs or record.levelno > logging.INFO or record.pathname.startswith(PACKAGE)


class ScreenRunner(Runner):
    """A Runner whose screen shows what the user needs; its log file shows everything."""

    screen: ScreenFilter

    def build_logger(self, *args: Any, **kwargs: Any) -> logging.Logger:
        logger = super().build_logger(*args, **kwargs)
        self.screen = ScreenFilter()
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _unwritten  # type: ignore[assignment, method-assign]
            else:
                handler.addFilter(self.screen)
        return logger

    def call_hook(self, fn_name: str, **kwargs: Any) -> None:
        if fn_name in ('before_train', 'before_test'):
            self.screen.loop_runs = True
        super().call_hook(fn_name, **kwargs)


def _unwritten(_record: logging.LogRecord) -> None:
    """Pass over a line that a full disk does not take: what fails for it says so, and logging prints a traceback."""


def build_runner(cfg: Config) -> Runner:
    """Build the Runner that a config asks for.

    Raises:
        UserError: Its `runner_type` is not registered.
    """
    kind = cfg.get('runner_type', 'Runner')
    found = RUNNERS.get(kind) if isinstance(kind, str) else kind
    if found is None:
        raise UserError(f'runner_type: no Runner is registered as {kind!r}; name its module in custom_imports')
    # Before the user's class in the order of methods, and under its name.
    runner: Any = ScreenRunner if found is Runner else type(found.__name__, (ScreenRunner, found), {})
    return runner.from_cfg(cfg)


def run(runner: Runner, step: Callable[[Runner], Any]) -> Any:
    """Call `step(runner)`; if it fails by what may be a mistake, its traceback goes beside the log."""
    try:
        return step(runner)
    except MISTAKES as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from error
        with suppress(OSError):  # the disk may be full
            file = Path(runner.log_dir) / 'traceback.txt'
            file.write_text(traceback.format_exc(), encoding='utf-8')
            vars(error).setdefault('__notes__', []).append(f'{TRACEBACK}{file}')
        raise


def newest(cfg: Config) -> str | None:
    """Return the newest whole checkpoint of a config's run.

    Raises:
        SlimError: All are damaged.
    """
    hooks, name = savers(cfg), Path(cfg.work_dir).absolute().name
    folders = [Path(hook['out_dir']) / name for hook in hooks if hook.get('out_dir')]
    templates = [hook['filename_tmpl'] for hook in hooks if hook.get('filename_tmpl')]
    return newest_whole(cfg.work_dir, folders, templates)


def last_whole(cfg: Config) -> str:
    """Say which checkpoint of a run that failed is the last whole one."""
    try:
        path = newest(cfg)
    except SlimError as error:
        return str(error)
    return f'the last whole checkpoint is {path}' if path else f'{cfg.work_dir} has no checkpoint yet'


def resume_hint(cfg: Config, args: argparse.Namespace) -> str:
    """Return how to go on after an interruption."""
    try:
        if newest(cfg) is None:
            return f'{cfg.work_dir} has no checkpoint yet, so the next run starts anew'
    except SlimError as error:
        return str(error)
    script = Path(sys.argv[0])
    program = ['python', '-m', 'mmcpd'] if script.name == '__main__.py' else ['python', sys.argv[0]]
    program = program if script.suffix == '.py' else [script.name]
    words = [word for word in sys.argv[1:] if word not in ('--resume', args.resume)]
    return f'go on from the last checkpoint: {shlex.join([*program, *words])} --resume'
