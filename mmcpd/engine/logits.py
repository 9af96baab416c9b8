"""Find a model's logits, and whether its loss takes a softmax or a sigmoid of them, by observing how it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmcpd.distill import Compared, Observer, Output
from mmcpd.distill.observe import merged
from mmcpd.engine.head_losses import read_near
from mmcpd.modes import modes_kept
from mmcpd.nested import map_tensors, tensors_in
from mmcpd.prune.gates import untouched
from mmcpd.random_state import random_state, set_random_state

NAMED = 8  # candidates in an error


@dataclass(frozen=True)
class Logits:
    """Logits of one head: the tap on them, and whether the loss takes a sigmoid of each class."""

    tap: str
    sigmoid: bool
    channels: int

    def __str__(self) -> str:
        return f'{self.tap} ({"sigmoid" if self.sigmoid else "softmax"} over {self.channels})'


@dataclass(frozen=True)
class Observed:
    """What running a model as it is trained and as it is tested has shown.

    Attributes:
        trained: what its losses compare with labels; empty where there are no labels.
        tested: what it gives out in mode 'tensor', in eval mode, as far as its predictions are made of it.
        ran: all module outputs of the run in mode 'tensor'.
        failed: why that run ended early, '' if it did not.
        classes: the numbers of classes that its heads state.
    """

    model: nn.Module
    trained: tuple[Compared, ...]
    tested: tuple[Compared, ...]
    ran: tuple[Output, ...]
    failed: str
    classes: frozenset[int]

    def logits(self) -> list[Logits]:
        """Return what is both given out and compared with labels: no auxiliary heads, no inner stages.

        What is given out with as many channels as a head has classes counts too: a batch may have labels for some of
        several tasks, or none at all. If nothing that is given out is compared, what is compared and runs in a test.
        Maps of boxes are left out, where there are logits beside them.

        Raises:
            ValueError: There is nothing of the kind; with the candidates.
        """
        behind = [next((t for t in self.trained if set(t.outputs) & set(out.outputs)), None) for out in self.tested]
        found: list[Compared] = []
        unlabelled: list[Compared] = []
        if any(behind) or not self.trained:
            for out, loss in zip(self.tested, behind, strict=True):
                if loss is not None:
                    found += merged([loss, out])
                elif out.outputs[0].channels in self.classes or len(self.tested) == 1:
                    unlabelled.append(out)
        else:
            ran = set(self.ran)
            kept = [replace(loss, outputs=tuple(o for o in loss.outputs if o in ran)) for loss in self.trained]
            found = [each for each in kept if each.outputs]
        found = self._classifying(found) + unlabelled
        if not found:
            raise ValueError(f'{type(self.model).__name__}: it cannot be told where its logits are; {self._cure()}')
        return [self._describe(each) for each in found]

    def _classifying(self, found: list[Compared]) -> list[Compared]:
        """Leave out what a loss takes no probability of, and distributions over places beside maps of classes."""
        rated = [each for each in found if (each.softmax or each.sigmoid) and not each.distance]
        fitting = [each for each in rated if self._fits(each.outputs[0])]
        if fitting and len({each.sigmoid for each in rated if each.outputs[0].dims == 4}) == 2:
            return fitting
        return rated or found

    def _fits(self, output: Output) -> bool:
        """Tell whether there is a channel for each class of a head, with one for none or without, or several."""
        channels = output.channels
        return any(channels - n in (0, 1) or (n > 1 and channels % n == 0) for n in self.classes)

    def reads_sigmoid(self, tap: str) -> bool | None:
        """Tell whether the loss takes a sigmoid of what a tap sees; None where that is not compared with labels."""
        for each in (*self.trained, *self.tested):
            if any(tap in (str(output), output.module) for output in each.outputs):
                return self._describe(each).sigmoid
        return None

    def channels_last(self, tap: str) -> bool:
        """Tell whether what a tap sees has four dimensions of which the last are the channels."""
        return any(output.channels_last for output in self.ran if tap in (str(output), output.module))

    def _describe(self, each: Compared) -> Logits:
        first = each.outputs[0]
        read = each if each.softmax or each.sigmoid else read_near(self.model, first.module, first.channels)
        return Logits(str(first), first.channels == 1 or (read.sigmoid and not read.softmax), first.channels)

    def _cure(self) -> str:
        fitting = [output for output in self.ran if output.channels in self.classes and output.dims in (2, 4)]
        names = ', '.join([str(output) for output in fitting or self.ran][-NAMED:])
        cure = f"set tap='...' to the module that computes them{f', of {names}' if names else ''}"
        return f"{cure} (mode 'tensor' failed: {self.failed})" if self.failed else cure


def observe(model: nn.Module, inputs: Any, data_samples: Any, *, labelled: bool) -> Observed:
    """Run a model on a preprocessed batch for its losses, where it is labelled, and as it is tested, and look on.

    Statistics, random states and modes are afterwards as they were.
    """
    trained: list[Compared] = []
    with restored(model), torch.enable_grad():
        if labelled:
            with Observer(model) as observer:
                losses = model(inputs, copy.deepcopy(data_samples), mode='loss')
            values = [tensor for name, value in losses.items() if 'loss' in name for tensor in tensors_in(value)]
            trained = observer.compared(values)
        model.eval()
        observer, outputs, failed = _looked_on(model, inputs, data_samples, 'tensor')
        tested, ran = observer.given_out(outputs), tuple(observer.outputs)
        observer, outputs, _ = _looked_on(model, inputs, data_samples, 'predict')
        predicting = observer.behind(outputs)
        tested = [each for each in tested or observer.given_out(outputs) if predicting & {*each.outputs}] or tested
    classes = {getattr(m, name, None) for m in model.modules() for name in ('out_channels', 'num_classes')
               if hasattr(m, 'num_classes')}  # fmt: skip
    whole = frozenset(number for number in classes if isinstance(number, int))
    return Observed(model, tuple(trained), tuple(tested), ran, failed, whole)


def _looked_on(model: nn.Module, inputs: Any, data_samples: Any, mode: str) -> tuple[Observer, Any, str]:
    """Run a model in a mode that it may not have; return who looked on, what it gave out, and why it failed."""
    arguments = (copy.deepcopy(data_samples),) if isinstance(model, BaseModel) else ()
    options = {'mode': mode} if isinstance(model, BaseModel) else {}
    with Observer(model) as observer:
        try:
            return observer, model(map_tensors(inputs, _differentiable), *arguments, **options), ''
        except Exception as error:  # noqa: BLE001 - anything that a model of anyone may raise
            return observer, None, f'{type(error).__name__}: {error}'


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put buffers, random states and modes back afterwards."""
    state = random_state()
    try:
        with modes_kept(model), untouched(model, weights=False):
            yield
    finally:
        set_random_state(state)


def _differentiable(tensor: Tensor) -> Tensor:
    """Let autograd's graph lead to an input, for a teacher has no parameter that is trained."""
    return tensor.detach().requires_grad_() + 0 if tensor.is_floating_point() else tensor
