"""Gradients of gates sample by sample, read where a layer of the cut takes its input or gives its output.

For a gate on the inputs of a layer, the sum of w * dL/dw over a column equals the sum of x * dL/dx over that
channel: the second form is known for each sample of a batch, the first only for their sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from ..layer_calls import LayerCall, LayerCalls
from .cut_calls import CutCalls, CutPlace, refusal
from .gates import Cut, Gates, row_dot
from .layouts import FIRST, TABLE, Layout

_CHUNK = 1 << 20  # elements of a product at a time, one sample at least


def sample_dot(x: Tensor, g: Tensor, sample: int | None, channel: int) -> Tensor:
    """Sum `x * g` over all but two dimensions: (S, C), in at least float32; (1, C) without a sample dimension.

    Example:
        >>> sample_dot(torch.ones(2, 3, 4, 4), torch.ones(2, 3, 4, 4), 0, 1).tolist()
        [[16.0, 16.0, 16.0], [16.0, 16.0, 16.0]]
    """
    channel %= x.dim()
    if sample is None or sample == channel:
        return sample_dot(x.unsqueeze(0), g.unsqueeze(0), 0, channel + 1).sum(0, keepdim=True)
    others = [d for d in range(x.dim()) if d not in (sample, channel)]
    step = max(1, _CHUNK * x.shape[sample] // max(1, x.numel()))
    found = []
    for a, b in zip(x.split(step, sample), g.split(step, sample), strict=True):
        product = a.float() * b if a.dtype in (torch.float16, torch.bfloat16) else a * b
        found.append(product.sum(others) if others else product)
    total = torch.cat(found, int(channel < sample))
    return total.T if channel < sample else total


@dataclass(frozen=True, eq=False)
class _Reading:
    """What a tap hands over, and to whom."""

    taps: SampleTaps
    place: CutPlace
    layout: Layout
    offset: Tensor | None  # (C,), the part of the activation that no gate multiplies


class _Tap(torch.autograd.Function):
    """Pass a tensor on, and hand x * dL/dx, summed to (S, C), over on the way back.

    Thanks to the anchor, a scalar with a gradient, a way back passes here whatever else has one.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, reading: _Reading) -> Tensor:
        ctx.save_for_backward(x)
        ctx.reading = reading
        return x.view_as(x) if reading.place.in_input else x.clone()  # what follows may write into an output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), reading = ctx.saved_tensors, ctx.reading
        place, sample = reading.place, reading.layout.dim
        found = sample_dot(x, grad, sample, place.channel)
        if reading.offset is not None:
            found = found - reading.offset * sample_dot(grad.new_ones(()).expand_as(grad), grad, sample, place.channel)
        reading.taps.receive(place, found.unflatten(1, (-1, place.size)).sum(1))  # (S, groups, rows)
        return grad, None, None


class SampleTaps:
    """Collect dL/dm of each gate for each sample, in passes that run within a `with`, or after `watch`.

    Attributes:
        anchor: what every tap's way back ends in: `torch.autograd.grad(outputs, taps.anchor, allow_unused=True)` visits
            all taps and computes no gradient of a weight.

    Args:
        layouts: where samples lie in the activations of each cut; where they cannot be told apart, and where no call
            shows them, the batch counts as one sample. Without an entry they lie along the first dimension.
    """

    def __init__(self, gates: Gates, model: nn.Module, layouts: Mapping[Cut, Layout] | None = None) -> None:
        self.gates, self.model, self.layouts = gates, model, layouts or {}
        self.anchor = torch.zeros((), requires_grad=True)
        self.calls = CutCalls(gates, model)
        self._batch: dict[Cut, Tensor] = {}
        self._mode: LayerCalls | None = None
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> SampleTaps:
        self._depth += 1
        if self._depth == 1:
            self._mode = LayerCalls(self.model, self._on_call, norms=True)
            self._mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0 and self._mode is not None:
            self._mode.__exit__(kind, error, trace)
            self._mode = None

    def watch(self) -> None:
        """Watch every pass from now on, until `remove`; one through a part of the model too (checkpointing repeats it).

        A deep copy of the model, which carries these hooks, is not watched.
        """
        own = set(self.model.modules())

        def enter(module: nn.Module, _: Any) -> None:
            if module in own:
                self.__enter__()

        def leave(module: nn.Module, *_: Any) -> None:
            if module in own and self._depth:
                self.__exit__(None, None, None)

        for module in self.model.modules():
            self._handles.append(module.register_forward_pre_hook(enter, prepend=True))
            self._handles.append(module.register_forward_hook(leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def receive(self, place: CutPlace, found: Tensor) -> None:
        """Add one call's (S, rows); a weight that is called several times in one pass adds up sample by sample."""
        beyond = self.calls.shapes[place.cut.tensor][place.cut.dim] - place.start - place.size
        if place.start or beyond:
            found = F.pad(found, (place.start, beyond))
        before = self._batch.get(place.cut)
        self._batch[place.cut] = found if before is None else before + found

    def receive_table(self, cut: Cut, gradient: Tensor) -> None:
        """Add the gradient of a tensor that no call shows, of its shape: that of the batch as a whole."""
        self.layouts = {**self.layouts, cut: TABLE}
        self._batch[cut] = row_dot(self.model.get_parameter(cut.tensor).detach(), gradient, cut.dim).unsqueeze(0)

    def pop(self) -> Tensor | None:
        """Return dL/dm of the batch seen last, (N, units), and forget it; None where nothing was seen.

        Raises:
            ValueError: layers of the cut disagree on how many samples there are.
        """
        if not self._batch:
            return None
        layouts = {cut: self.layouts.get(cut, FIRST) for cut in self._batch}
        samples = min((len(found) for cut, found in self._batch.items() if layouts[cut].dim is not None), default=1)
        first = next(iter(self._batch.values()))
        total = first.new_zeros(samples, self.gates.units)
        whole = torch.zeros(self.gates.units, dtype=torch.bool, device=total.device)
        for cut, found in self._batch.items():
            rows, units = self.gates.rows(cut, total.device)
            layout = layouts[cut]
            if layout.dim is None:
                whole[units] = True
                total[0].index_add_(0, units, found[0, rows].to(total))
                continue
            if len(found) % samples:
                raise refusal(self.gates, cut, f"'{cut.tensor}' sees {len(found)} samples where others see {samples}")
            parts = found.unflatten(0, (-1, samples) if layout.inner else (samples, -1))
            total.index_add_(1, units, parts.sum(int(not layout.inner))[:, rows].to(total))
        self._batch.clear()
        total[0] = torch.where(whole, total.sum(0), total[0])
        total[1:].masked_fill_(whole, 0)
        return total

    def _on_call(self, call: LayerCall) -> Tensor:
        """Run a call with taps on the channels that it shows."""
        if not torch.is_grad_enabled():
            return call.run()
        places = list(self.calls.places(call))
        given = call.input
        for place in places:
            if place.in_input:
                given = self._tapped(given, place, None)
        out = call.run(input=given) if places else call.run()
        for place in places:
            if not place.in_input:
                out = self._tapped(out, place, self.calls.offset(call))
        return out

    def _tapped(self, x: Tensor, place: CutPlace, offset: Tensor | None) -> Tensor:
        layout = self.layouts.get(place.cut, FIRST)
        return _Tap.apply(x, self.anchor, _Reading(self, place, layout, offset))
