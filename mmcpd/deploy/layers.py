"""Which layers a model runs whose time can be looked up: convolutions and matrix products, and their live widths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmcpd.compat import StrEnum
from mmcpd.cost import Term
from mmcpd.coupling import Coupling
from mmcpd.slim.compare import evaluating


class LayerKind(StrEnum):
    """What is timed, by the names of ONNX."""

    CONVOLUTION = 'Conv'
    TRANSPOSED = 'ConvTranspose'
    PRODUCT = 'MatMul'


@dataclass(frozen=True)
class Layer:
    """A layer as its time depends on it.

    Attributes:
        kind: what it is.
        sizes: of a convolution the first two of its weight and the batch, of a product (..., M, K, N).
        live: which of the sizes units can be removed from.
        weights: whether the right factor of a product is a weight; a convolution's always is.
        kernel, space, stride, padding, dilation, output_padding: of a convolution, one number a spatial dimension.
        groups: of a convolution.
    """

    kind: LayerKind
    sizes: tuple[int, ...]
    live: tuple[int, ...] = ()
    weights: bool = True
    kernel: tuple[int, ...] = ()
    space: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1

    @property
    def key(self) -> str:
        """A name that says everything which the time depends on."""
        return ' '.join(f'{name}={_plain(value)}' for name, value in asdict(self).items())

    @property
    def widths(self) -> tuple[int, ...]:
        """The dense widths that can become smaller."""
        return tuple(self.sizes[place] for place in self.live)

    def at(self, widths: Sequence[int]) -> Layer:
        """Return the layer at other live widths; a convolution group that is not cut inside goes whole."""
        sizes, groups = list(self.sizes), self.groups
        for place, width in zip(self.live, widths, strict=True):
            sizes[place] = width
        if groups > 1 and 0 in self.live:
            whole = groups if 1 in self.live else self.sizes[0] // groups  # rows that stay or go together
            sizes[0] = max(1, round(sizes[0] / whole)) * whole
            groups = groups if 1 in self.live else sizes[0] // whole
        return replace(self, sizes=tuple(sizes), groups=groups)


@dataclass(frozen=True)
class SeenLayer:
    """A layer that ran, its multiply-accumulates, and the numbers of the axes that are its live widths."""

    layer: Layer
    macs: int
    axes: tuple[int, ...]


def layers_of(model: nn.Module, coupling: Coupling) -> list[SeenLayer]:
    """Return the layers of a combed model in the order in which they run, each with the axes of its live widths.

    The terms of the MACs formula say which widths are live. A term that no layer here explains is left out: its time
    is part of the rest.

    Example:
        >>> [(seen.layer.sizes, seen.layer.widths) for seen in layers_of(model, coupling)]
        [((8, 3, 2), (8,)), ((4, 8, 2), (4, 8)), ((2, 4, 2), (4,))]
    """
    seen = _Seen()
    with evaluating(model), seen:
        coupling.example.run(model)
    counts = [len(axis) for axis in coupling.axes]
    movable = [bool((axis >= 0).any()) for axis in coupling.axes]
    terms, found, at = coupling.cost_model.macs, [], 0
    for layer, macs in seen.layers:
        dense = ((i, term.constant * math.prod(counts[axis] for axis in term.axes)) for i, term in enumerate(terms))
        number = next((i for i, count in dense if i >= at and count == macs), None)
        if number is None:
            continue
        at = number + 1
        places = _places(layer, terms[number], counts)
        if places is None:
            continue
        pairs = [(place, axis) for place, axis in zip(places, terms[number].axes, strict=True) if movable[axis]]
        live, axes = tuple(place for place, _ in pairs), tuple(axis for _, axis in pairs)
        found.append(SeenLayer(replace(layer, live=live), macs, axes))
    return found


def _places(layer: Layer, term: Term, counts: Sequence[int]) -> tuple[int, ...] | None:
    """Return which sizes of a layer the axes of its term are, the last that fit in a product, else the first."""
    wanted = [counts[axis] for axis in term.axes]
    fitting = [
        places
        for places in combinations(range(len(layer.sizes)), len(wanted))
        if [layer.sizes[place] for place in places] == wanted
    ]
    return fitting[-1 if layer.kind is LayerKind.PRODUCT else 0] if fitting else None


class _Seen(TorchDispatchMode):
    """Note the layers that run, and the multiply-accumulates of each."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Layer, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        named = dict(zip(names, args, strict=False)) | (kwargs or {})
        self.layers.extend(_layers(func._schema.name.split('::')[-1], named, out))
        return out


def _layers(op: str, named: dict[str, Any], out: Any) -> Iterator[tuple[Layer, int]]:
    if op.endswith('convolution') and isinstance(out, Tensor):
        yield _convolution(named, out)
    elif op in ('mm', 'bmm', 'mv', 'dot', 'vdot'):
        yield _product(*(value for value in named.values() if isinstance(value, Tensor)))
    elif op in ('addmm', 'baddbmm', 'addmv'):
        _, left, right = (value for value in list(named.values())[:3])
        yield _product(left, right)
    elif op == 'linear':
        yield _product(named['input'], named['weight'].t())
    elif op.startswith('_scaled_dot_product'):
        query, key, value = (named[name] for name in ('query', 'key', 'value'))
        sizes = (*query.shape[:-1], query.shape[-1], key.shape[-2])
        for layer in (sizes, (*query.shape[:-1], key.shape[-2], value.shape[-1])):
            yield Layer(LayerKind.PRODUCT, tuple(layer), weights=False), math.prod(layer)


def _product(left: Tensor, right: Tensor) -> tuple[Layer, int]:
    rows = left.shape if left.dim() > 1 else (1, *left.shape)
    sizes = tuple(map(int, (*rows, right.shape[-1] if right.dim() > 1 else 1)))
    return Layer(LayerKind.PRODUCT, sizes, weights=right.dim() == 2), math.prod(sizes)


def _convolution(named: dict[str, Any], out: Tensor) -> tuple[Layer, int]:
    x: Tensor = named['input'] if 'input' in named else named['self']
    weight, transposed = named['weight'], bool(named.get('transposed', False))
    dims = weight.dim() - 2
    batch = x.shape[0] if x.dim() > dims + 1 else 1
    options: dict[str, Any] = {
        name: tuple(np.broadcast_to(named.get(name, default), dims).tolist())
        for name, default in (('stride', 1), ('padding', 0), ('dilation', 1), ('output_padding', 0))
    }
    layer = Layer(
        LayerKind.TRANSPOSED if transposed else LayerKind.CONVOLUTION,
        (*weight.shape[:2], batch),
        kernel=tuple(weight.shape[2:]),
        space=tuple(x.shape[-dims:]),
        groups=int(named['groups']),
        **options,
    )
    places = (x if transposed else out).shape[-dims:]
    return layer, math.prod((*weight.shape, batch, *places))


def _plain(value: object) -> str:
    return 'x'.join(map(str, value)) if isinstance(value, tuple) else str(value)
