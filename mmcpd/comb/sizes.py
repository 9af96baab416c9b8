"""Observe which integers of a module must follow when channels go.

A forward pass says `x.reshape(B, N, 3, self.num_heads, self.head_dims)`. While the model is traced, every plain `int`
attribute of every module, and every size read from a tensor, is a `Size`: an `int` that remembers where it came from
and stays so under `+ - * // %`. A `TorchFunctionMode` sees the arguments before C++ does, and writes down an equation:
this expression equals the number of live units on that axis. Slimming solves the equations for the attributes
(`expressions.solve`); what no attribute can satisfy is written into the source (`source.Site`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .expressions import OPERATORS, Expression, follows, leaves
from .source import LEFT, RIGHT, Spot, spot
from .trace import Equation, ScaleSite, Trace


def expression(value: Any) -> Expression:
    """Return where an integer came from; a plain one is itself."""
    return value.expression if isinstance(value, Size) else int(value)


def _fresh(value: Any, trace: Trace | None) -> Any:
    """Return a size, or the plain integer where another run left it in somebody's cache."""
    return int(value) if isinstance(value, Size) and value.trace is not trace else value


def _binary(symbol: str, swap: bool = False) -> Callable[[Size, Any], Any]:
    function: Callable[[Any, Any], Any] = OPERATORS[symbol]

    def method(self: Size, other: Any) -> Any:
        if isinstance(other, (float, Tensor)):
            number = self.number(RIGHT if swap else LEFT)
            return function(other, number) if swap else function(number, other)
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        other = _fresh(other, self.trace)
        left, right = (other, self) if swap else (self, other)
        value = function(int(left), int(right))
        return Size.of(value, (symbol, expression(left), expression(right)), self.trace)

    return method


def _ordered(name: str) -> Callable[[Size, Any], Any]:
    """Compare two sizes, and let a width be what it is where the answer could change: `if x.shape[1] < 8`."""

    def method(self: Size, other: Any) -> Any:
        trace = self.trace
        asked_by_torch = sys._getframe(1).f_globals.get('__name__', '').startswith('torch.')
        if trace is not None and isinstance(other, int) and int(other) > 1 and not asked_by_torch:
            for _, atoms in leaves(self.expression, 'live') + leaves(expression(_fresh(other, trace)), 'live'):
                trace.table.freeze(atoms, f'compared in size in {trace.where}')
        return getattr(int, name)(self, other)

    return method


class Size(int):
    """An integer that remembers its expression."""

    expression: Expression
    trace: Trace | None

    @classmethod
    def of(cls, value: int, expr: Expression, trace: Trace | None) -> Size:
        size = cls(value)
        size.expression, size.trace = expr, trace
        return size

    __add__, __radd__ = _binary('+'), _binary('+', True)
    __sub__, __rsub__ = _binary('-'), _binary('-', True)
    __mul__, __rmul__ = _binary('*'), _binary('*', True)
    __floordiv__, __rfloordiv__ = _binary('//'), _binary('//', True)
    __mod__, __rmod__ = _binary('%'), _binary('%', True)

    def __neg__(self) -> Size:
        return 0 - self

    __hash__ = int.__hash__

    def number(self, side: int) -> int:
        """Note that a forward computes with this width as with any number: as in `x / math.sqrt(d)`."""
        if self.trace is not None and follows(self.expression):
            self.trace.adapts = True
            _number(self.trace, self, side)
        return int(self)

    def __float__(self) -> float:
        return float(self.number(LEFT))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(self.number(LEFT), other, modulo)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(other, self.number(RIGHT), modulo)

    def __truediv__(self, other: Any) -> Any:
        return self.number(LEFT) / (other.number(RIGHT) if isinstance(other, Size) else other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.number(RIGHT)

    def __eq__(self, other: object) -> bool:
        """Compare as integers; that an axis was found equal to something is an equation too."""
        equal = int.__eq__(self, other)
        if equal is True and self.trace is not None and isinstance(other, int):
            pair = (expression(self), expression(_fresh(other, self.trace)))
            if any(leaves(e, 'live') for e in pair):
                self.trace.equal.append(pair)
        return equal

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    __lt__, __le__, __gt__, __ge__ = map(_ordered, ('__lt__', '__le__', '__gt__', '__ge__'))

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)


def _size(trace: Trace, tensor: Tensor, dim: int, value: int) -> int:
    axis = trace.axes(tensor)[dim]
    if axis is None:
        return Size.of(value, ('input', value), trace)
    trace.adapts = True
    return Size.of(value, ('live', axis.atoms), trace)


class _Observe(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if func == _SHAPE or name == 'size':
            return self.shape(func, args, kwargs)
        self.trace.function = name
        if name in ARITHMETIC:  # a width on the right; on the left it is asked itself
            for side, value in zip((LEFT, RIGHT), args, strict=False):
                if isinstance(value, Size):
                    value.number(side)
        out = func(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None and args and isinstance(args[0], Tensor):
            handler(self.trace, args, kwargs, out)
        return out

    def shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        tensor = args[0]
        if isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs['dim']
            return _size(self.trace, tensor, dim, out)
        return torch.Size(_size(self.trace, tensor, d, s) for d, s in enumerate(out))  # it keeps each `Size` as it is


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
ARITHMETIC = set('tensor as_tensor new_tensor add add_ sub sub_ mul mul_ div div_ true_divide pow pow_'.split())
HANDLERS: dict[str, Callable[[Trace, Any, Any, Any], None]] = {}


def _handles(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def _equation(trace: Trace, value: Any, atoms: np.ndarray | None, place: Spot | None = None) -> None:
    """State that a size argument is the number of live units, or without atoms that it stays."""
    value = _fresh(value, trace)
    if isinstance(value, Size):
        if atoms is None and not follows(value.expression):
            return
        trace.sizes.append(Equation(value.expression, int(value) if atoms is None else atoms, trace.path[-1], place))
    elif atoms is not None:  # a literal cannot follow, but may be replaced where it stands
        trace.sizes.append(Equation(int(value), atoms, trace.path[-1], place))


def _number(trace: Trace, size: Size, side: int) -> None:
    place = spot(side, 0)
    if place is not None:
        trace.numbers.append(Equation(size.expression, int(size), trace.path[-1], place))


def _sizes(args: Any, kwargs: Any, names: Sequence[str]) -> list[Any]:
    rest = list(args[1:]) or [kwargs[n] for n in names if n in kwargs]
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest


@_handles('expand', 'broadcast_to')
def _expand(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes, source = _sizes(args, kwargs, ('shape', 'size')), args[0].shape
    for back, size in enumerate(reversed(sizes), 1):
        axis = trace.axes(out)[-back]
        if int(size) != -1 and back <= len(source) and source[-back] != 1:  # else it may be of any size
            _equation(trace, size, None if axis is None else axis.atoms)


@_handles('view', 'reshape')
def _reshape(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = _sizes(args, kwargs, ('shape', 'size'))
    if len(sizes) != out.dim():  # view(dtype)
        return
    for i, (size, axis) in enumerate(zip(sizes, trace.axes(out), strict=True)):
        if int(size) != -1 and (axis is not None or (isinstance(size, Size) and follows(size.expression))):
            _equation(trace, size, None if axis is None else axis.atoms, spot(i, len(sizes)))


@_handles('unflatten')  # unflatten(dim, sizes)
def _unflatten(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs['dim']) % args[0].dim()
    sizes = list(args[2] if len(args) > 2 else kwargs['sizes'])
    for size, axis in zip(sizes, trace.axes(out)[dim : dim + len(sizes)], strict=True):
        if int(size) != -1:
            _equation(trace, size, None if axis is None else axis.atoms)


def _tie_pieces(trace: Trace, source: np.ndarray, count: int) -> None:
    """Couple equal pieces of one dimension position by position, so that they stay equally long."""
    trace.tie(source.reshape(count, -1).T)


@_handles('chunk', 'tensor_split')  # chunk(chunks, dim=0)
def _chunk(trace: Trace, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    dim = kwargs.get('dim', args[2] if len(args) > 2 else 0)
    axis = trace.axes(args[0])[dim]
    if axis is None:
        return
    if len(axis) % len(out) or len({t.shape[dim] for t in out}) > 1:
        trace.freeze(axis, f'a dimension cut into unequal chunks in {trace.where}')
    else:
        _tie_pieces(trace, axis.atoms, len(out))


@_handles('split', 'split_with_sizes')  # split(size or sizes, dim=0)
def _split(trace: Trace, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    dim = kwargs.get('dim', args[2] if len(args) > 2 else 0)
    axis = trace.axes(args[0])[dim]
    sizes = args[1] if len(args) > 1 else kwargs.get('split_size_or_sizes', kwargs.get('split_size'))
    if axis is None:
        return
    if isinstance(sizes, int):
        if len(axis) % len(out) == 0 and len({t.shape[dim] for t in out}) == 1:
            _tie_pieces(trace, axis.atoms, len(out))
            _equation(trace, sizes, axis.atoms[: int(sizes)])
        else:
            trace.freeze(axis, f'a dimension split into unequal pieces in {trace.where}')
        return
    start = 0
    for size in sizes:
        _equation(trace, size, axis.atoms[start : start + int(size)])
        start += int(size)


@_handles('narrow')  # narrow(dim, start, length)
def _narrow(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    dim, start, length = (args[i] if len(args) > i else kwargs[n] for i, n in ((1, 'dim'), (2, 'start'), (3, 'length')))
    axis, begin = trace.axes(args[0])[dim], int(start) % args[0].shape[dim]
    if axis is not None:
        _cut(trace, args[0], dim % args[0].dim(), start, None)
        _equation(trace, length, axis.atoms[begin : begin + int(length)])


@_handles('__getitem__')
def _getitem(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    source, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(i, slice) for i in index):
        return
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    dim = 0
    for item in index:
        if item is Ellipsis:
            dim += source.dim() - used
        elif item is not None:
            if isinstance(item, slice) and item.step in (None, 1):
                _cut(trace, source, dim, item.start, item.stop)
            dim += 1


def _cut(trace: Trace, source: Tensor, dim: int, start: Any, stop: Any) -> None:
    """Read a slice: each bound is the number of live units before it, or behind it where it counts from the end."""
    axis = trace.axes(source)[dim]
    if axis is None:
        return
    n = len(axis)
    for bound in (start, stop):
        if bound is None or int(bound) == 0 or int(bound) >= n:
            continue
        place = int(bound) % n
        expr = expression(bound)
        if any(np.array_equal(leaf[1], axis.atoms) for leaf in leaves(expr, 'live')) and n % place == 0:
            _tie_pieces(trace, axis.atoms, n // place)  # x[:, : x.shape[1] // 2]
        if int(bound) < 0:
            flipped = Size.of(-int(bound), ('-', 0, expr), trace) if isinstance(bound, Size) else -bound
            _equation(trace, flipped, axis.atoms[place:])
        else:
            _equation(trace, bound, axis.atoms[:place])


@_handles('conv1d', 'conv2d', 'conv3d')  # conv2d(input, weight, bias, stride, padding, dilation, groups)
def _conv(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get('groups', 1)
    axis = trace.axes(args[0])[1] if args[0].dim() == args[1].dim() else None
    if axis is not None and groups != 1:
        stays = trace.path[-1] in trace.inside
        _equation(trace, groups, None if stays else axis.atoms[:: len(axis) // int(groups)])


@_handles('conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d')  # (..., padding, output_padding, groups)
def _conv_transpose(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get('groups', 1)
    _conv(trace, args[:6], {'groups': groups}, out)


@_handles('layer_norm', 'rms_norm')  # layer_norm(input, normalized_shape, ...)
def _layer_norm(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = list(args[1] if len(args) > 1 else kwargs['normalized_shape'])
    for size, axis in zip(sizes, trace.axes(args[0])[-len(sizes) :], strict=True):
        _equation(trace, size, None if axis is None else axis.atoms)


@_handles('scaled_dot_product_attention')  # (query, key, value, attn_mask, dropout_p, is_causal, *, scale=None)
def _attention(trace: Trace, args: Any, kwargs: Any, out: Tensor) -> None:
    axis = trace.axes(args[0])[-1]
    if kwargs.get('scale') is None and axis is not None:
        site = ScaleSite(axis.everything(), axis.atoms, trace.path[-1])
        if not any(np.array_equal(s.query, site.query) for s in trace.scales):
            trace.scales.append(site)


@contextmanager
def _without_caches() -> Iterator[None]:
    """Let einops work its shapes out anew: its cache takes a `Size` for any integer that equals it."""
    einops: Any = sys.modules.get('einops.einops')
    cached = getattr(einops, '_reconstruct_from_shape', None)
    plain = getattr(einops, '_reconstruct_from_shape_uncached', None)
    if einops is None or cached is None or plain is None:
        yield
        return
    einops._reconstruct_from_shape = plain
    try:
        yield
    finally:
        einops._reconstruct_from_shape = cached


@contextmanager
def observing_sizes(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Let every plain `int` attribute of every module remember its name while the model runs; restore them all."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    kept.append((vars(module), name, value))
                    vars(module)[name] = Size.of(value, ('attr', path, name), trace)
                elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                    kept.append((vars(module), name, value))
                    sizes = (Size.of(v, ('attr', path, f'{name}[{i}]'), trace) for i, v in enumerate(value))
                    vars(module)[name] = type(value)(sizes)
        with _Observe(trace), _without_caches():
            yield
    finally:
        for module in model.modules():  # what the forward stored, and what stood there before
            for name, value in vars(module).items():
                vars(module)[name] = _plain(value)
        for attributes, name, value in kept:
            if attributes.get(name) == value:  # else the forward set another, which stays
                attributes[name] = value


def _plain(value: Any) -> Any:
    """Return a value without sizes; whatever holds none is returned as it is."""
    if isinstance(value, Size):
        return int(value)
    if type(value) in (list, tuple, torch.Size):
        plain = [_plain(v) for v in value]
        return value if all(a is b for a, b in zip(plain, value, strict=True)) else type(value)(plain)
    if type(value) is dict:
        entries = {k: _plain(v) for k, v in value.items()}
        return value if all(entries[k] is v for k, v in value.items()) else entries
    return value
