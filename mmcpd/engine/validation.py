"""Validate in the middle of a run without anybody hearing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmcpd.engine.report import numbers
from mmcpd.modes import modes_kept
from mmcpd.random_state import random_state, set_random_state


def validate_unseen(runner: Runner) -> dict[str, float]:
    """Return the metrics of a Runner's validation loop on the model as it is; {} where it has none.

    No other hook hears of it, but for what prepares a validation (`before_val`): no scheduler, no early stopping, no
    best checkpoint and no logger is moved. Random numbers and the modes of modules are as before.
    """
    if runner.val_loop is None:
        return {}
    hooks = list(runner.hooks)
    listener, before = _Listener(hooks), random_state()
    runner.hooks[:] = [listener]
    try:
        with modes_kept(runner.model):
            runner.val_loop.run()
    finally:
        runner.hooks[:] = hooks
        set_random_state(before)
    return listener.metrics


class _Listener(Hook):
    """Take the metrics, and let the others prepare."""

    def __init__(self, others: Sequence[Hook]) -> None:
        self.others = others
        self.metrics: dict[str, float] = {}

    def before_val(self, runner: Runner) -> None:
        for hook in self.others:
            hook.before_val(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, Any] | None = None) -> None:
        self.metrics = numbers(metrics or {})
