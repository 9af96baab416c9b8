"""Gradients of gates sample by sample, read where a module of the cut takes its input or gives its output.

For a gate on the inputs of a layer, the sum of w * dL/dw over a column equals the sum of x * dL/dx over that
channel: the second form is known for each sample of a batch, the first only for their sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .gates import Gates

# Module class -> {cut dimension of its weight: side of the module that shows it, dimension there}.
# The input side needs one group, where a column of the weight is a channel of the input.
_CONV = {0: ('output', 1), 1: ('input', 1)}
_CONV_TRANSPOSE = {0: ('input', 1), 1: ('output', 1)}
PLACES: dict[type[nn.Module], dict[int, tuple[str, int]]] = {
    nn.Linear: {0: ('output', -1), 1: ('input', -1)},
    nn.Conv1d: _CONV,
    nn.Conv2d: _CONV,
    nn.Conv3d: _CONV,
    nn.ConvTranspose1d: _CONV_TRANSPOSE,
    nn.ConvTranspose2d: _CONV_TRANSPOSE,
    nn.ConvTranspose3d: _CONV_TRANSPOSE,
}


class _Tap(torch.autograd.Function):
    """Pass a tensor on, and hand x * dL/dx, summed to (N, C), to `taps` on the way back."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offset: Tensor | None,
        channel: int,
        copy: bool,
        taps: SampleTaps,
        cut: tuple[str, int],
    ) -> Tensor:
        ctx.save_for_backward(x, offset)
        ctx.channel, ctx.taps, ctx.cut = channel % x.dim(), taps, cut
        return x.clone() if copy else x.view_as(x)  # copy: what follows may write into a module's output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offset = ctx.saved_tensors
        if offset is not None:
            shape = [1] * x.dim()
            shape[ctx.channel] = -1
            x = x - offset.reshape(shape)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        product = x * grad
        others = [d for d in range(1, x.dim()) if d != ctx.channel]
        ctx.taps.receive(ctx.cut, product.sum(others) if others else product)
        return grad, None, None, None, None, None


class SampleTaps:
    """Watch a model's passes and collect dL/dm of each gate for each sample.

    Samples lie along the first dimension; windows or tokens that are folded into it must be its inner part.

    Args:
        gates: the gates of the model's comb.
        model: the model itself; hooks stay on it until `remove`.

    Raises:
        ValueError: a tensor of the cut belongs to a module that cannot be tapped.
    """

    def __init__(self, gates: Gates, model: nn.Module) -> None:
        self.gates = gates
        self._batch: dict[tuple[str, int], Tensor] = {}
        self._seen: set[tuple[str, int]] = set()
        places = {cut: self._place(model, *cut) for cut in gates.cuts if not self._with_weight(*cut)}
        self._handles = [self._tap(model, cut, side, channel) for cut, (side, channel) in places.items()]

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def receive(self, cut: tuple[str, int], found: Tensor) -> None:
        """Add one call's (N, C); a module called several times in one pass adds up sample by sample."""
        self._seen.add(cut)
        before = self._batch.get(cut)
        self._batch[cut] = found if before is None else before + found

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
        for (name, dim), found in self._batch.items():
            if len(found) % samples:
                raise ValueError(
                    f"'{name}' sees {len(found)} samples where others see {samples}: {self._hint(name, dim)}"
                )
            rows, owners = self.gates.rows(name, dim, total.device)
            folded = found.reshape(samples, -1, found.shape[1]).sum(1)  # (N * windows, C) -> (N, C)
            total.index_add_(1, owners, folded[:, rows].to(total))
        self._batch.clear()
        return total

    def check(self, model: nn.Module) -> None:
        """Say so if part of the cut took part in the loss unseen, and start a new record.

        Raises:
            ValueError: a module's weight has a gradient but its forward was not called.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, dim in self.gates.cuts:
            grad = parameters[name].grad
            seen = (name, dim) in self._seen or self._with_weight(name, dim)
            if not seen and grad is not None and bool(grad.any()):
                raise ValueError(
                    f"group_fisher cannot score '{name}': its module is never called with a tensor that has "
                    f'a gradient (as inside nn.MultiheadAttention); {self._hint(name, dim)}'
                )
        self._seen.clear()

    def _hint(self, name: str, dim: int) -> str:
        return f"use importance='hessian', or put {self.gates.groups[name, dim]} into `ignore`"

    def _with_weight(self, name: str, dim: int) -> bool:
        """Tell whether a bias of the cut is seen together with its weight, at the module's output."""
        path, _, leaf = name.rpartition('.')
        return leaf == 'bias' and (f'{path}.weight' if path else 'weight', dim) in self.gates.cuts

    def _place(self, model: nn.Module, name: str, dim: int) -> tuple[str, int]:
        """Return the side of the module that shows this dimension, and the channel's dimension there."""
        path, _, leaf = name.rpartition('.')
        module = model.get_submodule(path)
        places = next((table for cls, table in PLACES.items() if isinstance(module, cls)), {})
        if leaf != 'weight' or dim not in places:
            raise ValueError(
                f"group_fisher cannot score '{name}' of a {type(module).__name__}: {self._hint(name, dim)}"
            )
        side, channel = places[dim]
        if side == 'input' and getattr(module, 'groups', 1) != 1:
            raise ValueError(
                f"group_fisher cannot score the grouped convolution '{path}' by its input: {self._hint(name, dim)}"
            )
        return side, channel

    def _tap(self, model: nn.Module, cut: tuple[str, int], side: str, channel: int) -> RemovableHandle:
        """Put the hook on."""
        path = cut[0].rpartition('.')[0]
        module = model.get_submodule(path)
        gated_bias = (f'{path}.bias' if path else 'bias', 0) in self.gates.cuts

        def watched(x: object) -> bool:
            return torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad

        def on_input(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not args or not watched(args[0]):
                return None
            return _Tap.apply(args[0], None, channel, False, self, cut), *args[1:]

        def on_output(module: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
            if not watched(output):
                return None
            bias = getattr(module, 'bias', None)
            offset = None if bias is None or gated_bias else bias.detach()
            return _Tap.apply(output, offset, channel, True, self, cut)

        return (
            module.register_forward_pre_hook(on_input) if side == 'input' else module.register_forward_hook(on_output)
        )
