"""Run the masked model and refit its layers while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layer_calls import LayerCall, LayerCalls, ParameterRows
from ..slim.mask import named_tensors
from .columns import outputs_at
from .layer import Layer
from .report import RefittedLayer, SkippedLayer
from .targets import Refittable, Target
from .trails import SMALL_GAIN, CallKey, Trail, Trails


@dataclass(frozen=True, eq=False)
class _Pending:
    """A call whose output ends in a sum: it is refitted there, where what the stream has lost is known."""

    call: LayerCall
    output: Tensor  # at the sampled positions, with the old weight


class MaskedRun:
    """Run the masked model, and refit each layer with all that is known before its output is used."""

    def __init__(self, model: nn.Module, refittable: Iterable[Refittable], ridge: float) -> None:
        self.model, self.ridge = model, ridge
        tensors = named_tensors(model)

        def part(rows: ParameterRows | None) -> Tensor | None:
            return None if rows is None else tensors[rows.tensor].detach()[rows.start : rows.stop]

        self.layers: dict[ParameterRows, Layer] = {}
        for found in refittable:
            rows, mean = found.form.rows, tensors.get(found.mean or '')
            weight = tensors[rows.tensor].detach()[rows.start : rows.stop]
            name = found.bias.tensor if found.bias else found.mean or ''
            self.layers[rows] = Layer(found.form, weight, part(found.bias), mean, name)
        self.corrected: set[ParameterRows] = set()
        self.missed: set[ParameterRows] = set()  # ended in a sum in the dense model only
        self._targets: Mapping[CallKey, Target] = {}
        self._pending: dict[CallKey, _Pending] = {}
        self._trails = Trails(model, self._on_sum)
        self._calls = LayerCalls(model, self._on_call)

    def run(self, forward: Callable[..., object], batch: tuple[object, ...], targets: Mapping[CallKey, Target]) -> None:
        """Run one batch, for which these are the targets, and refit each layer on all batches so far."""
        self._targets = targets
        calls = Counter(key.rows for key in targets)
        for rows, layer in self.layers.items():
            layer.expect(calls[rows])
        self._calls.restart()
        with self._trails, self._calls:
            self._trails.close(forward(self.model, *batch))
        for key, pending in self._pending.items():  # the forward took another path than that of the dense model
            self.missed.add(key.rows)
            self._add(pending.call, key, targets[key].output)
        self._pending.clear()

    def results(self) -> tuple[RefittedLayer, ...]:
        """Return what became of each layer, in the order in which they run."""
        return tuple(
            RefittedLayer(
                layer.form.name,
                layer.solution.before,
                layer.solution.after,
                rows in self.corrected,
                layer.form.alike,
                layer.home_name,
            )
            for rows, layer in self.layers.items()
            if layer.solution is not None
        )

    def uncorrected(self, broken: Mapping[ParameterRows, str]) -> tuple[SkippedLayer, ...]:
        """Return the layers whose output ends in a sum that did not correct their target, given the reasons."""
        reasons = {**dict.fromkeys(self.missed, 'the masked model runs another way to the sum'), **broken}
        return tuple(
            SkippedLayer(self.layers[rows].form.name, reason)
            for rows, reason in reasons.items()
            if rows in self.layers and rows not in self.corrected
        )

    def _on_call(self, call: LayerCall) -> Tensor:
        key = CallKey(call.rows, call.number) if call.rows in self.layers else None
        target = self._targets.get(key) if key is not None else None
        if key is None or target is None:
            return call.run()
        if target.total is None:
            with torch._C.DisableTorchFunction():
                self._add(call, key, target.output)
            return call.run()
        output = call.run()
        with torch._C.DisableTorchFunction():
            self._pending[key] = _Pending(call, outputs_at(output, call.weight.dim(), target.positions))
        self._trails.start(output, key, call.input)
        return output

    def _on_sum(self, trail: Trail, operand: Tensor, stream: Tensor) -> None:
        key = trail.origin.key
        target, pending = self._targets[key], self._pending.pop(key)
        assert target.total is not None
        dims, layer = pending.call.weight.dim(), self.layers[key.rows]

        def here(value: Tensor) -> Tensor:
            return outputs_at(value, dims, target.positions)

        gain = here(trail.gain(operand))
        missing = target.total - here(trail.back(operand + stream))
        wanted = pending.output + layer.shift + missing / gain
        wanted = torch.where(gain.abs() < SMALL_GAIN, target.output, wanted)
        self.corrected.add(key.rows)
        if self._add(pending.call, key, wanted):
            operand.copy_(trail.replay(pending.call.run()))

    def _add(self, call: LayerCall, key: CallKey, wanted: Tensor) -> bool:
        """Add a call to its layer's moments, and refit it if that was the last of this batch."""
        layer = self.layers[key.rows]
        target = self._targets[key]
        layer.add(call, target.size, target.positions, wanted)
        if layer.complete:
            layer.refit_(self.ridge)
        return layer.complete
