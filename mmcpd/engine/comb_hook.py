"""Comb a model before it trains, to look at; and the options that its hook shares with the one that prunes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmcpd.comb.api import HEADS, UNUSED
from mmcpd.engine.combing import comb_runner
from mmcpd.engine.examples import check_shape
from mmcpd.names import check_options, look_up
from mmcpd.registry import HOOKS


@HOOKS.register_module()
class CombHook(Hook):
    """Comb the bare model before training: show what belongs together, and why the rest is frozen.

    A look at a model that nothing prunes; PruneHook combs by itself.

    Args:
        heads: what an attention gives up: 'dim', the same index in each head, or 'head', whole heads.
        ignore: groups that are never pruned, by patterns of their names: ['backbone.conv1', 'backbone.layer1.*'].
        strict: True: an operation without a rule is an error; False: what goes through it is frozen.
        unused: 'freeze' the channels that layers may use which neither testing nor training runs, or 'leave' them.
        input_shape: (C, H, W) of the input that is combed with, see `mmcpd.engine.examples.input_shape`.
        save: a file name in the work dir, or None.

    Raises:
        ValueError: an unknown option, or a value that makes no sense.

    Example:
        >>> CombHook(head='dim')
        Traceback (most recent call last):
        ValueError: CombHook has no option 'head': did you mean heads, unused?
    """

    def __init__(
        self,
        *,
        heads: str = 'dim',
        ignore: Sequence[str] = (),
        strict: bool = False,
        unused: str = 'freeze',
        input_shape: Sequence[int] | None = None,
        save: str | None = 'coupling.json',
        **unknown: object,
    ) -> None:
        refuse_unknown(unknown, self)
        self.options = comb_options(heads, ignore, strict, unused, input_shape)
        if save is not None and not isinstance(save, str):
            raise ValueError(f'save is a file name in the work dir, or None: got {save!r}')
        self.save = save

    def before_train(self, runner: Runner) -> None:
        coupling = comb_runner(runner, **self.options)
        runner.logger.info(f'combed:\n{coupling}')
        if self.save is not None and is_main_process():
            coupling.to_json(Path(runner.work_dir) / self.save)


def comb_options(
    heads: str, ignore: Sequence[str] | str, strict: bool, unused: str, input_shape: Sequence[int] | None
) -> dict[str, Any]:
    """Check the options of combing, as far as that is possible without a model, and return them by name."""
    ignore = [ignore] if isinstance(ignore, str) else ignore
    look_up(dict.fromkeys(HEADS), heads, 'heads')
    look_up(dict.fromkeys(UNUSED), unused, 'unused')
    if not isinstance(ignore, list | tuple) or not all(isinstance(pattern, str) for pattern in ignore):
        raise ValueError(f"ignore is a list of patterns of group names, as ['backbone.layer1.*']: got {ignore!r}")
    if not isinstance(strict, bool):
        raise ValueError(f'strict is True or False: got {strict!r}')
    shape = None if input_shape is None else check_shape(input_shape)
    return {'heads': heads, 'ignore': list(ignore), 'strict': strict, 'unused': unused, 'input_shape': shape}


def refuse_unknown(unknown: Iterable[str], hook: Hook) -> None:
    """Refuse options that are not in the hook's signature: MMEngine would raise a TypeError without near names."""
    known = [name for name in inspect.signature(type(hook)).parameters if name != 'unknown']
    check_options(unknown, known, type(hook).__name__)
