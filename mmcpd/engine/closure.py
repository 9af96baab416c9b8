"""Run a training step's forward once more, with or without backward: the same batches and random numbers, no step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from mmcpd.engine.passes import DEPLOYED
from mmcpd.engine.wrappers import bare_model, unwrapped
from mmcpd.prune.gates import untouched
from mmcpd.random_state import RandomState, random_state, set_random_state


class StepClosure:
    """Remember the batches of an optimizer step, and leave their gradients in `.grad` again, or yield their outputs.

    Call `record` before each iteration, and the closure before the optimizer's step. The gradients are of the total
    loss, un-scaled, and averaged over the batches and over processes, as the step saw them. Random states, and what
    the training model holds beside the student, are as before afterwards.

    Args:
        model: the model that is trained, as the Runner wraps it.
        optim_wrapper: the one that steps it.
        forward: runs the student for its outputs on a preprocessed batch.
    """

    def __init__(
        self, model: nn.Module, optim_wrapper: OptimWrapper, forward: Callable[..., object] = DEPLOYED
    ) -> None:
        self.model, self.optim_wrapper, self.forward = model, optim_wrapper, forward
        self.trained = cast(BaseModel, unwrapped(model))
        self.student = bare_model(model)
        self._batches: list[tuple[Any, RandomState]] = []

    def record(self, data_batch: Any) -> None:
        """Remember a batch that is about to be trained on; the first after a step forgets those before it."""
        if self.optim_wrapper.should_update():
            self._batches.clear()
        self._batches.append((data_batch, random_state()))

    def __call__(self) -> None:
        whole = self.trained is self.student
        others = [] if whole else [m for m in self.trained.children() if m is not self.student]
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

    def outputs(self) -> Iterator[object]:
        """Yield what the student gives out for each batch of the step, run as it was combed, in the mode it is in."""
        before = random_state()
        try:
            for data_batch, state in self._batches:
                set_random_state(state)
                with self._autocast():
                    data = cast(Any, self.trained).data_preprocessor(data_batch, True)
                    outputs = self.forward(self.student, data)
                yield outputs
        finally:
            set_random_state(before)

    def _autocast(self) -> AbstractContextManager[Any]:
        if isinstance(self.optim_wrapper, AmpOptimWrapper):
            return cast(AbstractContextManager[Any], autocast(dtype=self.optim_wrapper.cast_dtype))
        return nullcontext()

    def _backward(self, data_batch: Any) -> None:
        with self._autocast():
            data = cast(Any, self.trained).data_preprocessor(data_batch, True)
            loss, _ = self.trained.parse_losses(cast(Any, self.model)._run_forward(data, mode='loss'))
        loss = loss / len(self._batches)
        if isinstance(self.optim_wrapper, AmpOptimWrapper):
            loss = self.optim_wrapper.loss_scaler.scale(loss)
        loss.backward()
