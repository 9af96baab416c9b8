"""Run a training step's forward and backward once more: the same batches, the same random numbers, no step."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from mmengine.model import BaseModel, is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from mmcpd.prune.gates import untouched

RandomState = tuple[Any, Any, torch.Tensor, list[torch.Tensor]]


def random_state() -> RandomState:
    """Return the state of every generator that a forward pass may draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: RandomState) -> None:
    """Go back to a state from `random_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])


class Replay:
    """Remember the batches of an optimizer step, and leave their gradients in `.grad` again when called.

    The gradients are of the total loss, un-scaled, and averaged over the batches and over processes, as the step saw
    them. Random states, and what the training model holds beside the student, are as before afterwards.

    Args:
        model: the model that is trained, as the Runner wraps it.
        student: the bare model in it, whose gradients are wanted.
        optim_wrapper: the one that steps it.

    Example:
        >>> replay = Replay(runner.model, student, runner.optim_wrapper)
        >>> replay.record(data_batch)    # before the iteration
        >>> replay()                     # before the optimizer's step
    """

    def __init__(self, model: nn.Module, student: nn.Module, optim_wrapper: OptimWrapper) -> None:
        self.model, self.optim_wrapper = model, optim_wrapper
        self.bare = cast(BaseModel, model.module if is_model_wrapper(model) else model)
        self.student = student
        self._batches: list[tuple[Any, RandomState]] = []

    def record(self, data_batch: Any) -> None:
        """Remember a batch that is about to be trained on; the first after a step forgets those before it."""
        if self.optim_wrapper.should_update():
            self._batches.clear()
        self._batches.append((data_batch, random_state()))

    def __call__(self) -> None:
        others = [] if self.bare is self.student else [m for m in self.bare.children() if m is not self.student]
        before = random_state()
        try:
            with untouched(*others):
                for data_batch, state in self._batches:
                    set_random_state(state)
                    self._backward(data_batch)
        finally:
            set_random_state(before)
        if isinstance(self.optim_wrapper, AmpOptimWrapper):
            scale = self.optim_wrapper.loss_scaler.get_scale()
            for parameter in self.student.parameters():
                if parameter.grad is not None:
                    parameter.grad /= scale

    def _backward(self, data_batch: Any) -> None:
        mixed = isinstance(self.optim_wrapper, AmpOptimWrapper)
        with autocast(dtype=self.optim_wrapper.cast_dtype) if mixed else nullcontext():
            data = cast(Any, self.bare).data_preprocessor(data_batch, True)
            loss, _ = self.bare.parse_losses(cast(Any, self.model)._run_forward(data, mode='loss'))
        loss = loss / len(self._batches)
        if mixed:
            loss = self.optim_wrapper.loss_scaler.scale(loss)
        loss.backward()
