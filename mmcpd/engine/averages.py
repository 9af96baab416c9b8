"""The averages of the trained weights that other hooks keep: masked like the model, and what is validated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.hooks import EMAHook
from mmengine.model import BaseAveragedModel
from mmengine.runner import Runner
from torch import nn

from mmcpd.engine.wrappers import bare_model, unwrapped
from mmcpd.slim.mask import named_tensors


class Averages:
    """Find the averaged models of a Runner's hooks (`EMAHook` and its kind), once training has started.

    MMEngine validates the average, by swapping it with the model for the time being; what is written is the average
    too. So it is the one that teaches, is pruned at once, and is slimmed in the end.

    Example:
        >>> from types import SimpleNamespace
        >>> Averages(SimpleNamespace(hooks=[], model=model)).copies
        []
    """

    def __init__(self, runner: Runner) -> None:
        self.model = unwrapped(runner.model)
        self._averaged = [
            value for hook in runner.hooks for value in vars(hook).values() if isinstance(value, BaseAveragedModel)
        ]
        hooks = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
        self._validated = [
            hook for hook in hooks if getattr(hook, 'evaluate_on_ema', True)
        ]  # an option of mmpretrain's

    @property
    def copies(self) -> list[nn.Module]:
        """The bare models inside: copies of the one that is pruned."""
        return [bare_model(averaged.module) for averaged in self._averaged]

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model hold the weights that validation measures, and give its own back afterwards."""
        for averaged in self._averaged:
            if int(averaged.steps) == 0:  # nothing was averaged yet: it may be older than the weights that were loaded
                _copy(self.model, averaged.module)
        for hook in self._validated:
            hook._swap_ema_parameters()
        try:
            yield
        finally:
            for hook in reversed(self._validated):
                hook._swap_ema_parameters()

    def follow_(self) -> None:
        """Let every average be the model as it is now: they start anew from it."""
        for averaged in self._averaged:
            _copy(self.model, averaged.module)


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    values = named_tensors(source)
    for name, tensor in named_tensors(target).items():
        tensor.copy_(values[name])
