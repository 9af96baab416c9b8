"""Run the dense model: what each layer should put out at sampled positions, and which layers can be refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..example import count_pictures
from ..layer_calls import LayerCall, LayerCalls, LayerKind, ParameterRows, storage
from .columns import flat, outputs_at, sample
from .layer import Form, within
from .report import SkippedLayer
from .trails import CallKey, Origin, Trail, Trails

KeptRows = Mapping[str, Mapping[int, Tensor]]  # kept rows by tensor and dimension, only where some are removed


@dataclass(eq=False)
class Target:
    """What one call of a layer puts out in the dense model at some positions, `(P, O)` in float64.

    `total` is the sum that the output ends in, moved to where it lies in the output.
    """

    size: torch.Size  # of the whole output
    positions: Tensor
    output: Tensor
    total: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Refittable:
    """A layer that can be refitted, and the tensor that takes up its intercept."""

    form: Form
    bias: ParameterRows | None
    mean: str | None  # name of the running mean


@dataclass(eq=False)
class _Seen:
    """The calls with some rows of a weight in one forward."""

    kind: LayerKind
    shape: torch.Size  # of these rows
    bias: set[ParameterRows | None] = field(default_factory=set)
    groups: set[int] = field(default_factory=set)
    origins: list[Origin] = field(default_factory=list)


class DenseRun:
    """Run the dense model on batches and keep targets of the latest one.

    Layers have a target that lost rows or columns, and those after them whose output ends in a sum.

    Args:
        model: the dense model.
        kept: the rows that are kept in the masked model, where some are removed.
        samples: positions per picture.
    """

    def __init__(self, model: nn.Module, kept: KeptRows, samples: int) -> None:
        self.model, self.kept, self.samples = model, kept, samples
        self._parameters = dict(model.named_parameters())
        self.targets: dict[CallKey, Target] = {}
        self.broken: dict[ParameterRows, str] = {}  # why the sum behind a layer is no use
        self._seen: dict[ParameterRows, _Seen] = {}
        self._early: set[ParameterRows] = set()  # weights and biases of calls before the first loss
        self._trails = Trails(model, self._on_sum, self._on_break)
        self._calls = LayerCalls(model, self._on_call)
        self._limit = 1
        self._lossy = False  # whether a layer that lost something has run in this forward

    def run(self, forward: Callable[..., object], batch: tuple[object, ...]) -> object:
        """Run one batch and return the outputs."""
        self._limit, self.targets, self._seen = self.samples * count_pictures(batch), {}, {}
        self._early.clear()
        self._trails.norms.clear()
        self._calls.restart()
        self._lossy = False
        with self._trails, self._calls:
            outputs = forward(self.model, *batch)
            self._trails.close(outputs)
        whole = {key.rows for key, target in self.targets.items() if target.total is None and not self._loses(key.rows)}
        self.targets = {key: target for key, target in self.targets.items() if key.rows not in whole}
        self._seen = {rows: seen for rows, seen in self._seen.items() if rows not in whole}
        return outputs

    def _on_call(self, call: LayerCall) -> Tensor:
        output, rows = call.run(), call.rows
        if rows is None:
            self._trails.readers.setdefault(storage(call.weight), 'a call that transposes it or takes a part of it')
        if rows is None or call.weight.dim() < 2:
            return output
        self._lossy = self._lossy or self._loses(rows)
        if not self._lossy:  # what runs before the first loss computes what it did
            self._early |= {rows for rows in (rows, call.bias_rows) if rows is not None}
            return output
        key = CallKey(rows, call.number)
        with torch._C.DisableTorchFunction():
            shape = flat(output, call.weight.dim())
            positions = sample(shape.shape[0] * shape.shape[2], self._limit, len(self.targets), output.device)
            self.targets[key] = Target(output.shape, positions, outputs_at(output, call.weight.dim(), positions))
        seen = self._seen.setdefault(rows, _Seen(call.kind, call.weight.shape))
        seen.bias.add(call.bias_rows)
        seen.groups.add(call.groups)
        seen.origins.append(self._trails.start(output, key, call.input))
        return output

    def _loses(self, rows: ParameterRows) -> bool:
        dims = self.kept.get(rows.tensor, {})
        return any(not bool((kept[rows.start : rows.stop] if dim == 0 else kept).all()) for dim, kept in dims.items())

    def _on_sum(self, trail: Trail, operand: Tensor, stream: Tensor) -> None:
        key = trail.origin.key
        target, dims = self.targets[key], len(self._seen[key.rows].shape)
        target.total = outputs_at(trail.back(operand + stream), dims, target.positions)

    def _on_break(self, trail: Trail, reason: str) -> None:
        self.broken[trail.origin.key.rows] = reason

    def refittable(self, gram_limit: int) -> list[Refittable | SkippedLayer]:
        """Return each layer that lost rows or columns, in the order in which they ran, and what is left alone."""
        obstacles = {rows: self._obstacle(rows, seen) for rows, seen in self._seen.items()}
        forms = {rows: self._form(rows, seen) for rows, seen in self._seen.items()}
        fitting = within(gram_limit, [forms[rows] for rows, reason in obstacles.items() if reason is None])
        found: list[Refittable | SkippedLayer] = []
        for rows, seen in self._seen.items():
            form, reason = fitting.get(rows), obstacles[rows]
            if form is not None:
                bias, mean = self._bias(rows, seen), self._mean(seen)
                found.append(Refittable(form, bias, None if bias else mean))
            else:
                size = forms[rows].gram_bytes
                beside = ' beside the others' if size <= gram_limit else ''
                large = f'its Gram matrix of {size:,} bytes does not fit{beside}: raise gram_limit={gram_limit:,}'
                found.append(SkippedLayer(forms[rows].name, reason or large))
        return found + self._unread()

    def _unread(self) -> list[SkippedLayer]:
        """Return the weights that lost something and are read by no layer."""
        found = []
        called = {rows.tensor for rows in self._seen}
        for name in self.kept:
            if name not in called and name in self._parameters and self._parameters[name].dim() > 1:
                reader = self._trails.readers.get(storage(self._parameters[name]))
                reason = f'read by {reader}, which is no layer' if reader else 'no layer reads it in this forward'
                found.append(SkippedLayer(name, reason))
        return found

    def _form(self, rows: ParameterRows, seen: _Seen) -> Form:
        first, second = (
            self.kept.get(rows.tensor, {}).get(dim, torch.ones(size, dtype=torch.bool))
            for dim, size in enumerate(self._parameters[rows.tensor].shape[:2])
        )
        groups, first = max(seen.groups), first[rows.start : rows.stop]
        one, other = first.reshape(groups, -1), second.expand(groups, -1)
        columns, outputs = (one, other) if seen.kind is LayerKind.TRANSPOSED else (other, one)
        outputs = outputs & columns.any(1, keepdim=True)  # of a convolution group that goes, outputs go too
        whole = len(first) == len(self._parameters[rows.tensor])
        name = rows.tensor if whole else f'{rows.tensor}[{rows.start}:{rows.stop}]'
        return Form(name, rows, seen.kind, columns, outputs, seen.shape[2:].numel(), False)

    def _obstacle(self, rows: ParameterRows, seen: _Seen) -> str | None:
        """Return why a layer cannot be refitted."""
        reader = self._trails.readers.get(storage(self._parameters[rows.tensor]))
        if reader is not None:
            return f'its weight is also read by {reader}'
        if any(_overlap(other, rows) for other in self._early):
            return 'it is also called before anything was lost'
        if any(other != rows and _overlap(other, rows) for other in self._seen):
            return 'other calls use a part of the same rows of its weight'
        return 'it is called with different numbers of groups' if len(seen.groups) > 1 else None

    def _bias(self, rows: ParameterRows, seen: _Seen) -> ParameterRows | None:
        """Return the bias if no one else reads it."""
        (bias,) = seen.bias if len(seen.bias) == 1 else (None,)
        if bias is None or storage(self._parameters[bias.tensor]) in self._trails.readers:
            return None
        others = [b for r, other in self._seen.items() if r != rows for b in other.bias if b is not None]
        return None if any(_overlap(other, bias) for other in (*others, *self._early)) else bias

    def _mean(self, seen: _Seen) -> str | None:
        """Return the running mean of the norm that follows, if that norm and the layer read and feed no one else."""
        means = {None if o.mean is None or o.output_reads != 1 else storage(o.mean) for o in seen.origins}
        mean = means.pop() if len(means) == 1 else None
        if mean is None or {id(o) for o in self._trails.norms[mean]} != {id(o) for o in seen.origins}:
            return None
        return next((name for name, buffer in self.model.named_buffers() if storage(buffer) == mean), None)


def _overlap(one: ParameterRows, other: ParameterRows) -> bool:
    return one.tensor == other.tensor and one.start < other.stop and other.start < one.stop
