"""Gradients of gates sample by sample, read where a module of the cut takes its input or gives its output.

For a gate on the inputs of a layer, the sum of w * dL/dw over a column equals the sum of x * dL/dx over that
channel: the second form is known for each sample of a batch, the first only for their sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .gates import Cut, Gates, never_prune, sum_except


class Place(NamedTuple):
    """Where a module shows the channels of a cut: in its input or in its output, and in which dimension."""

    in_input: bool
    channel: int


# Module classes -> {cut dimension of its weight: where the module shows it}.
# An input needs a convolution of one group, where a column of the weight is a channel of the input.
PLACES: dict[tuple[type[nn.Module], ...], dict[int, Place]] = {
    (nn.Linear,): {0: Place(False, -1), 1: Place(True, -1)},
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): {0: Place(False, 1), 1: Place(True, 1)},
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): {0: Place(True, 1), 1: Place(False, 1)},
}


class _Tap(torch.autograd.Function):
    """Pass a tensor on, and hand x * dL/dx, summed to (N, C), to `taps` on the way back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor | None, channel: int, copy: bool, taps: SampleTaps, cut: Cut
    ) -> Tensor:
        ctx.save_for_backward(x, offset)
        ctx.channel, ctx.taps, ctx.cut = channel % x.dim(), taps, cut
        return x.clone() if copy else x.view_as(x)  # copy: what follows may write into a module's output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset = ctx.saved_tensors
        if offset is not None:
            x = (x.movedim(ctx.channel, -1) - offset).movedim(-1, ctx.channel)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        ctx.taps.receive(ctx.cut, sum_except(x * grad, 0, ctx.channel))
        return grad, None, None, None, None, None


class SampleTaps:
    """Watch a model's passes and collect dL/dm of each gate for each sample.

    Samples lie along the first dimension; windows or tokens that are folded into it must be its inner part. Hooks stay
    on the model until `remove`. A deep copy of it is not watched.

    Raises:
        ValueError: a tensor of the cut belongs to a module that cannot be tapped.
    """

    def __init__(self, gates: Gates, model: nn.Module) -> None:
        self.gates = gates
        self._batch: dict[Cut, Tensor] = {}
        self._seen: set[Cut] = set()
        places = {cut: self._place(model, cut) for cut in gates.cuts if not self._with_weight(cut)}
        self._handles = [self._tap(model, cut, place) for cut, place in places.items()]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def receive(self, cut: Cut, found: Tensor) -> None:
        """Add one call's (N, C); a module called several times in one pass adds up sample by sample."""
        self._seen.add(cut)
        self._batch[cut] = self._batch[cut] + found if cut in self._batch else found

    def pop(self) -> Tensor | None:
        """Return dL/dm of the batch seen last, (N, units), and forget it; None where nothing was seen.

        Raises:
            ValueError: modules of the cut disagree on how many samples there are.
        """
        if not self._batch:
            return None
        samples = min(len(found) for found in self._batch.values())
        first = next(iter(self._batch.values()))
        total = first.new_zeros(samples, self.gates.units)
        for cut, found in self._batch.items():
            if len(found) % samples:
                raise self._refusal(cut, f"'{cut.tensor}' sees {len(found)} samples where others see {samples}")
            rows, units = self.gates.rows(cut, total.device)
            folded = found.reshape(samples, -1, found.shape[1]).sum(1)  # (N * windows, C) -> (N, C)
            total.index_add_(1, units, folded[:, rows].to(total))
        self._batch.clear()
        return total

    def check(self, model: nn.Module) -> None:
        """Say so if part of the cut took part in the loss unseen, and start a new record.

        Raises:
            ValueError: a module's weight has a gradient but its forward was not called.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for cut in self.gates.cuts:
            grad = parameters[cut.tensor].grad
            seen = cut in self._seen or self._with_weight(cut)
            if not seen and grad is not None and bool(grad.any()):
                why = 'its module is never called with a tensor that has a gradient (as inside nn.MultiheadAttention)'
                raise self._refusal(cut, f"group_fisher cannot score '{cut.tensor}': {why}")
        self._seen.clear()

    def _refusal(self, cut: Cut, why: str) -> ValueError:
        return ValueError(f"{why}: use importance='hessian', or {never_prune(self.gates.groups[cut])}")

    def _with_weight(self, cut: Cut) -> bool:
        """Tell whether a bias of the cut is seen together with its weight, at the module's output."""
        path, _, leaf = cut.tensor.rpartition('.')
        return leaf == 'bias' and Cut(f'{path}.weight' if path else 'weight', cut.dim) in self.gates.cuts

    def _place(self, model: nn.Module, cut: Cut) -> Place:
        path, _, leaf = cut.tensor.rpartition('.')
        module = model.get_submodule(path)
        places = next((table for classes, table in PLACES.items() if isinstance(module, classes)), {})
        if leaf != 'weight' or cut.dim not in places:
            raise self._refusal(cut, f"group_fisher cannot score '{cut.tensor}' of a {type(module).__name__}")
        place = places[cut.dim]
        if place.in_input and getattr(module, 'groups', 1) != 1:
            raise self._refusal(cut, f"group_fisher cannot score the grouped convolution '{path}' by its input")
        return place

    def _tap(self, model: nn.Module, cut: Cut, place: Place) -> RemovableHandle:
        path = cut.tensor.rpartition('.')[0]
        tapped = model.get_submodule(path)
        gated_bias = Cut(f'{path}.bias' if path else 'bias', 0) in self.gates.cuts

        def watched(module: nn.Module, x: object) -> bool:
            # A deep copy of the model (a teacher, an average) carries these hooks too.
            return module is tapped and torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad

        def on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not watched(module, args[0]):
                return None
            return _Tap.apply(args[0], None, place.channel, False, self, cut), *args[1:]

        def on_output(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
            if not watched(module, output):
                return None
            bias = getattr(module, 'bias', None)
            offset = None if bias is None or gated_bias else bias.detach()
            return _Tap.apply(output, offset, place.channel, True, self, cut)

        return tapped.register_forward_pre_hook(on_input) if place.in_input else tapped.register_forward_hook(on_output)
