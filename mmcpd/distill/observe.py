"""Find the layers whose output a loss compares with the labels: walk back from the loss to the last layer."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..nested import tensors_in
from .forwards import Call, watching

# Autograd's names of what ends the walk, layers (also products without a weight), ...
LAYER = re.compile(
    r'(?i)conv|^(addmm|mm|addmv|mv|linear|einsum)|bmm|mkldnnlinear|(batch|layer|group|rms)_?norm|dotproduct|embedding'
    r'|checkpoint'
)
# ... of what makes logits probabilities, by class or all together, ...
SIGMOID = re.compile(r'^(Sigmoid|LogSigmoid|BinaryCrossEntropy|Softplus|SoftMargin|MultilabelMargin)')
SOFTMAX = re.compile(r'^(Softmax|LogSoftmax|Logsumexp)')
# ... of the other functions that compare with a target, and of what changes a map's resolution or precision only.
TARGET = re.compile(r'^(Nll|Mse|L1Loss|SmoothL1|Huber|KlDiv|MultiMargin)')
RESIZED = re.compile(r'^(Upsample|ToCopy|Clone|Alias)')
# Distances to a target, as of boxes; what joins the maps of several levels; linear layers, whose channels are the last
# dimension, and what moves them elsewhere.
DISTANCE = re.compile(r'^(Mse|L1Loss|SmoothL1|Huber)')
JOINED = re.compile(r'^(Cat|Stack)')
LINEAR = re.compile(r'^(Addmm|Mm|Linear|MkldnnLinear)')
MOVED = re.compile(r'^(Transpose|Permute|Movedim)')


@dataclass(frozen=True)
class Output:
    """A tensor that a module gives out; `part` is its index among several, None where there is one.

    Its `(N, C)`, `(N, L, C)` or `(N, C, H, W)` has `dims` dimensions and C `channels`; four dimensions that a linear
    layer gives out have their channels last: `(layers, N, queries, C)`. As a string it is a tap's name.

    Example:
        >>> str(Output('backbone', 1))
        'backbone:1'
    """

    module: str
    part: int | None = None
    channels: int = field(default=0, compare=False)
    dims: int = field(default=0, compare=False)
    channels_last: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return self.module if self.part is None else f'{self.module}:{self.part}'


@dataclass(frozen=True)
class Compared:
    """Logits: a tensor that a loss compares with labels, or that a model gives out.

    Attributes:
        outputs: the module outputs that are this tensor, or that it is computed from without a layer; the best first.
        softmax, sigmoid: whether the loss takes a softmax over its channels, a sigmoid of each.
        distance: whether a loss takes its distance to a target (L1, L2): boxes, not classes.

    Example:
        >>> Compared((Output('fc'),), softmax=True).sigmoid
        False
    """

    outputs: tuple[Output, ...]
    softmax: bool = False
    sigmoid: bool = False
    distance: bool = False


@dataclass(frozen=True)
class _Edge:
    """A node of autograd's graph, and which of its outputs."""

    node: Any
    number: int

    @property
    def name(self) -> str:
        return str(self.node.name())

    def inputs(self) -> list[_Edge]:
        return [_Edge(node, number) for node, number in self.node.next_functions if node is not None]

    def is_probability(self) -> bool:
        return any(kind.search(self.name) for kind in (SIGMOID, SOFTMAX, TARGET))


class Observer:
    """Remember within a `with` what each module of a model gives out, and find it again behind a loss.

    Nothing is known about heads: from the loss autograd's graph leads back through the functions that compare with the
    labels, through resizing, views, masks and arithmetic, to the last layer. What a module gave out on that way, and
    what all of that way comes from, are the logits. Modules that are given labels (an integer tensor) are left out.

    Example:
        >>> with Observer(model) as observer:
        ...     logits = model(images)
        >>> loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1]))
        >>> [compared] = observer.compared([loss])
        >>> str(compared.outputs[0]), compared.softmax, compared.sigmoid
        ('fc', True, False)
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = {name: module for name, module in model.named_modules() if name}
        self.outputs: dict[Output, None] = {}  # all of them, in order
        self._given: dict[_Edge, list[Output]] = {}
        self._watching: AbstractContextManager[None] | None = None

    def __enter__(self) -> Observer:
        modules = {n: m for n, m in self.modules.items() if not isinstance(m, torch.jit.ScriptModule)}
        self._watching = watching(modules, self._see)
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._watching is not None:
            self._watching.__exit__(*error)

    def _see(self, call: Call) -> None:
        if any(_is_labels(value) for value in (*call.args, *call.kwargs.values())):
            return
        several = isinstance(call.output, tuple | list)
        for index, tensor in enumerate(call.output if several else [call.output]):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim >= 2:
                last = tensor.ndim > 3 and tensor.grad_fn is not None and _is_linear(tensor)
                width = tensor.shape[-1 if last or tensor.ndim == 3 else 1]
                output = Output(call.module, index if several else None, int(width), tensor.ndim, last)
                self.outputs[output] = None
                if tensor.grad_fn is not None:
                    self._given.setdefault(_Edge(tensor.grad_fn, tensor.output_nr), []).append(output)

    def compared(self, values: Iterable[Tensor]) -> list[Compared]:
        """Return the logits behind some losses, in their order; those behind several losses once."""
        found: list[Compared] = []
        for start in (_Edge(value.grad_fn, value.output_nr) for value in values if value.grad_fn is not None):
            comparisons = [edge for edge in _walk(start, until_probability=True) if edge.is_probability()]
            found += [each for root in comparisons for each in self._behind(root)]
            if not comparisons or any(LAYER.search(e.name) for e in _walk(start, set(comparisons))):
                found += self._behind(start, comparisons)
        return merged(found)

    def given_out(self, outputs: Any) -> list[Compared]:
        """Return the tensors that a model gives out, in nested lists and dicts too, as `compared` does for losses."""
        starts = (_Edge(t.grad_fn, t.output_nr) for t in tensors_in(outputs) if t.grad_fn is not None and t.ndim >= 2)
        behind = (each for start in starts for each in self._behind(start))
        return merged([Compared(each.outputs) for each in behind])

    def behind(self, outputs: Any) -> set[Output]:
        """Return all module outputs that some tensors are computed from without a layer, each alone or with others."""
        starts = (_Edge(t.grad_fn, t.output_nr) for t in tensors_in(outputs) if t.grad_fn is not None)
        return {output for start in starts for edge in _walk(start) for output in self._given.get(edge, ())}

    def _behind(self, root: _Edge, stops: Collection[_Edge] = ()) -> list[Compared]:
        """Collect the module outputs that everything on the way from `root` to the last layers comes from.

        That is one tensor, or several that are joined: the maps of a pyramid's levels.
        """
        whole = [edge for edge in self._passed(root, stops) if _comes_from(root, {edge}, stops)]
        nearest = {whole[0]} if whole else self._joined(root, stops)
        way = list(_walk(root, {*stops, *nearest}))  # what the loss does, not what a head does with softmax and sigmoid
        reading = Compared((), _any(SOFTMAX, way), _any(SIGMOID, way), bool(DISTANCE.search(root.name)))
        sets = [whole] if whole else [[edge] for edge in nearest]
        return [
            replace(reading, outputs=tuple(dict.fromkeys(o for e in edges for o in self._same(e)))) for edges in sets
        ]

    def _passed(self, root: _Edge, stops: Collection[_Edge]) -> Iterator[_Edge]:
        return (edge for edge in _walk(root, stops) if edge in self._given and not edge.is_probability())

    def _joined(self, root: _Edge, stops: Collection[_Edge]) -> set[_Edge]:
        """Return the nearest module outputs on all ways from `root`, where nothing but joining is between them."""
        nearest: set[_Edge] = set()
        for edge in self._passed(root, stops):
            if not any(edge in _walk(other) for other in nearest):
                nearest.add(edge)
        way = [edge for edge in _walk(root, {*stops, *nearest}) if edge != root]
        joined = all(JOINED.search(edge.name) or len(edge.inputs()) < 2 for edge in way)
        return nearest if joined and _comes_from(root, nearest, stops) else set()

    def _same(self, edge: _Edge) -> list[Output]:
        """Return the outputs that are one tensor, before it was resized the best."""
        outputs: list[Output] = []
        source = edge
        while RESIZED.search(source.name) and source.inputs():
            source = source.inputs()[0]
            outputs += self._given.get(source, ())
        return outputs + self._given[edge]


def reads(loss: Tensor) -> Compared:
    """Tell whether a loss takes a softmax or sigmoids of what it compares, which no module needs to give out.

    Example:
        >>> logits = torch.zeros(2, 3, requires_grad=True)
        >>> reads(nn.functional.binary_cross_entropy_with_logits(logits, torch.ones(2, 3))).sigmoid
        True
    """
    way = list(_walk(_Edge(loss.grad_fn, loss.output_nr))) if loss.grad_fn is not None else []
    return Compared((), _any(SOFTMAX, way), _any(SIGMOID, way))


def merged(compared: Iterable[Compared]) -> list[Compared]:
    """Make one of those that share outputs; what has none is left out.

    Example:
        >>> a, b = Output('fc'), Output('head')
        >>> [each] = merged([Compared((a, b), softmax=True), Compared((a,), sigmoid=True)])
        >>> [str(output) for output in each.outputs], each.softmax, each.sigmoid
        (['fc'], True, True)
    """
    found: list[Compared] = []
    for each in compared:
        if not each.outputs:
            continue
        for i, other in enumerate(found):
            common = tuple(output for output in other.outputs if output in each.outputs)
            if common:
                either = (getattr(other, n) or getattr(each, n) for n in ('softmax', 'sigmoid', 'distance'))
                found[i] = Compared(common, *either)
                break
        else:
            found.append(each)
    return found


def _walk(start: _Edge, stops: Collection[_Edge] = (), until_probability: bool = False) -> Iterator[_Edge]:
    """Yield edges backwards, the nearest first, as far as the last layers; stops are neither yielded nor passed."""
    queue, seen = [start], {start}
    for edge in queue:
        if edge in stops:
            continue
        yield edge
        if not LAYER.search(edge.name) and not (until_probability and edge.is_probability()):
            new = [each for each in edge.inputs() if each not in seen]
            seen.update(new)
            queue += new


def _comes_from(root: _Edge, edges: Collection[_Edge], stops: Collection[_Edge]) -> bool:
    """Tell whether no layer is reached from `root` but through `edges`."""
    return not any(LAYER.search(each.name) for each in _walk(root, {*edges, *stops}))


def _is_linear(tensor: Tensor) -> bool:
    """Tell whether a tensor is what a linear layer gives, its channels still the last."""
    way = [edge.name for edge in _walk(_Edge(tensor.grad_fn, tensor.output_nr))]
    layers = [name for name in way if LAYER.search(name)]
    return bool(layers) and all(LINEAR.search(name) for name in layers) and not any(map(MOVED.search, way))


def _any(kind: re.Pattern[str], edges: Iterable[_Edge]) -> bool:
    return any(kind.search(edge.name) for edge in edges)


def _is_labels(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype is not torch.bool
