"""Observe the sizes that a forward asks for: which integers of a module must follow when channels go.

A forward pass says `x.reshape(B, N, 3, self.num_heads, self.head_dims)`. While the model is traced, every plain `int`
attribute of every module, and every size read from a tensor, is a `TracedInt`. A `TorchFunctionMode` sees the arguments
before C++ does, and writes down an equation: this expression equals the live count of that axis. Slimming solves the
equations for the attributes (`size_expressions.solve`); what no attribute can satisfy is written into the source.
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

from ..fixes import Attr, Input, Live, Op
from ..nested import tensors_in
from ..slim.call_sites import INFER, LEFT, RIGHT, SCALE, Spot, spot
from ..slim.size_expressions import leaves, may_change
from .record import Equation
from .trace import Run
from .traced_int import TracedInt, expression, of_run


def _size(run: Run, tensor: Tensor, dim: int, value: int) -> int:
    axis = run.axes(tensor)[dim]
    return TracedInt.of(value, Input(value) if axis is None else run.width(axis), run)


class _Observe(TorchFunctionMode):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if func == _SHAPE or name == 'size':
            return self.shape(func, args, kwargs)
        self.run.cursor.function = name
        if name in ARITHMETIC:  # a width on the right; on the left it is asked itself
            for side, value in zip((LEFT, RIGHT), args, strict=False):
                if isinstance(value, TracedInt):
                    value.as_number(side)
        if name in LEAVING:
            self.run.freeze_all(args[0], f'its values leave torch by {name} in {self.run.where}')
        out = func(*args, **kwargs)
        handler = HANDLERS.get(name)
        if handler is not None and args and isinstance(args[0], Tensor):
            handler(self.run, args, kwargs, out)
        return out

    def shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        tensor = args[0]
        if isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs['dim']
            return _size(self.run, tensor, dim, out)
        return torch.Size(_size(self.run, tensor, d, s) for d, s in enumerate(out))  # it keeps each `TracedInt`


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
ARITHMETIC = set('tensor as_tensor new_tensor add add_ sub sub_ mul mul_ div div_ true_divide pow pow_'.split())
LEAVING = set('numpy __array__ tolist __dlpack__'.split())  # what is made of the values is not seen
HANDLERS: dict[str, Callable[[Run, Any, Any, Any], None]] = {}


def _handles(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(function: Callable[..., None]) -> Callable[..., None]:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return register


def _equation(
    run: Run, value: Any, atoms: np.ndarray | None, place: Spot | None = None, inferable: bool = False
) -> None:
    """State that a size argument is the live count of these atoms, or without atoms that it stays.

    A literal cannot follow, but may be replaced where it stands.
    """
    value = of_run(value, run)
    if atoms is not None or (isinstance(value, TracedInt) and may_change(value.expression)):
        target = int(value) if atoms is None else Live(run.record.number(atoms))
        run.record.sizes.append(Equation(expression(value), target, run.module, place, inferable))


def _sizes(args: Any, kwargs: Any, names: Sequence[str]) -> list[Any]:
    rest = list(args[1:]) or [kwargs[n] for n in names if n in kwargs]
    return list(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest


@_handles('expand', 'broadcast_to')
def _expand(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes, source = _sizes(args, kwargs, ('shape', 'size')), args[0].shape
    for back, size in enumerate(reversed(sizes), 1):
        axis = run.axes(out)[-back]
        if int(size) != -1 and back <= len(source) and source[-back] != 1:  # else it may be of any size
            _equation(run, size, None if axis is None else axis.atoms)


@_handles('view', 'reshape')
def _reshape(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = _sizes(args, kwargs, ('shape', 'size'))
    if len(sizes) != out.dim():  # view(dtype)
        return
    inferable = all(int(size) != INFER for size in sizes)
    for i, (size, axis) in enumerate(zip(sizes, run.axes(out), strict=True)):
        if int(size) != INFER and (axis is not None or (isinstance(size, TracedInt) and may_change(size.expression))):
            _equation(run, size, None if axis is None else axis.atoms, spot(i, len(sizes)), inferable)


@_handles('unflatten')  # unflatten(dim, sizes)
def _unflatten(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = (args[1] if len(args) > 1 else kwargs['dim']) % args[0].dim()
    sizes = list(args[2] if len(args) > 2 else kwargs['sizes'])
    for size, axis in zip(sizes, run.axes(out)[dim : dim + len(sizes)], strict=True):
        if int(size) != -1:
            _equation(run, size, None if axis is None else axis.atoms)


def _tie_pieces(run: Run, source: np.ndarray, count: int) -> None:
    """Couple equal pieces of one dimension position by position, so that they stay equally long."""
    run.tie(source.reshape(count, -1).T)


@_handles('chunk', 'tensor_split')  # chunk(chunks, dim=0)
def _chunk(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    dim = kwargs.get('dim', args[2] if len(args) > 2 else 0)
    axis = run.axes(args[0])[dim]
    if axis is None:
        return
    if len(axis) % len(out) or len({t.shape[dim] for t in out}) > 1:
        run.freeze(axis, f'a dimension cut into unequal chunks in {run.where}')
    else:
        _tie_pieces(run, axis.atoms, len(out))


@_handles('split', 'split_with_sizes')  # split(size or sizes, dim=0)
def _split(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    dim = kwargs.get('dim', args[2] if len(args) > 2 else 0)
    axis = run.axes(args[0])[dim]
    sizes = args[1] if len(args) > 1 else kwargs.get('split_size_or_sizes', kwargs.get('split_size'))
    if axis is None:
        return
    if isinstance(sizes, int):
        if len(axis) % len(out) == 0 and len({t.shape[dim] for t in out}) == 1:
            _tie_pieces(run, axis.atoms, len(out))
            _equation(run, sizes, axis.atoms[: int(sizes)])
        else:
            run.freeze(axis, f'a dimension split into unequal pieces in {run.where}')
        return
    start = 0
    for size in sizes:
        _equation(run, size, axis.atoms[start : start + int(size)])
        start += int(size)


@_handles('narrow')  # narrow(dim, start, length)
def _narrow(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    dim, start, length = (args[i] if len(args) > i else kwargs[n] for i, n in ((1, 'dim'), (2, 'start'), (3, 'length')))
    axis, begin = run.axes(args[0])[dim], int(start) % args[0].shape[dim]
    if axis is not None:
        _cut(run, args[0], dim % args[0].dim(), start, None)
        _equation(run, length, axis.atoms[begin : begin + int(length)])


@_handles('__getitem__')
def _getitem(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
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
                _cut(run, source, dim, item.start, item.stop)
            dim += 1


def _cut(run: Run, source: Tensor, dim: int, start: Any, stop: Any) -> None:
    """Read a slice: each bound is the number of live units before it, or behind it where it counts from the end."""
    axis = run.axes(source)[dim]
    if axis is None:
        return
    n = len(axis)
    for bound in (start, stop):
        if bound is None or int(bound) == 0 or int(bound) >= n:
            continue
        place = int(bound) % n
        expr = expression(bound)
        if n % place == 0 and any(np.array_equal(run.atoms_of(w), axis.atoms) for w in leaves(expr, Live)):
            _tie_pieces(run, axis.atoms, n // place)  # x[:, : x.shape[1] // 2]
        if int(bound) < 0:
            flipped = TracedInt.of(-int(bound), Op('-', 0, expr), run) if isinstance(bound, TracedInt) else -bound
            _equation(run, flipped, axis.atoms[place:])
        else:
            _equation(run, bound, axis.atoms[:place])


# conv2d(input, weight, bias, stride, padding, dilation, groups), transposed (..., padding, output_padding, groups)
@_handles('conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d')
def _conv(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = args[6] if len(args) > 6 else kwargs.get('groups', 1)
    axis = run.axes(args[0])[1] if args[0].dim() == args[1].dim() else None
    if axis is not None and groups != 1:
        narrowed = run.module in run.policy.narrowed
        _equation(run, groups, None if narrowed else axis.atoms[:: len(axis) // int(groups)])


@_handles('layer_norm', 'rms_norm')  # layer_norm(input, normalized_shape, ...)
def _layer_norm(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = list(args[1] if len(args) > 1 else kwargs['normalized_shape'])
    for size, axis in zip(sizes, run.axes(args[0])[-len(sizes) :], strict=True):
        _equation(run, size, None if axis is None else axis.atoms)


@_handles('scaled_dot_product_attention')  # (query, key, value, attn_mask, dropout_p, is_causal, *, scale=None)
def _attention(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    axis, own = run.axes(args[0])[-1], kwargs.get('scale') is None
    run.reads(tensors_in([*args[1 if own else 0 :], kwargs]))
    if own and axis is not None:
        run.scaled(axis, spot(SCALE, 0))


@contextmanager
def _without_caches() -> Iterator[None]:
    """Let einops work its shapes out anew: its cache takes a `TracedInt` for any integer that equals it."""
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
def observing_sizes(model: nn.Module, run: Run) -> Iterator[None]:
    """Let every plain `int` attribute of every module remember its name while the model runs; restore them all."""
    kept: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for path, module in model.named_modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    kept.append((vars(module), name, value))
                    vars(module)[name] = TracedInt.of(value, Attr(path, name), run)
                elif type(value) in (list, tuple) and value and all(type(v) is int for v in value):
                    kept.append((vars(module), name, value))
                    sizes = (TracedInt.of(v, Attr(path, f'{name}[{i}]'), run) for i, v in enumerate(value))
                    vars(module)[name] = type(value)(sizes)
        with _Observe(run), _without_caches():
            yield
    finally:
        for module in model.modules():  # what the forward stored, and what stood there before
            for name, value in vars(module).items():
                vars(module)[name] = _plain(value)
        for attributes, name, value in kept:
            if attributes.get(name) == value:  # else the forward set another, which is kept
                attributes[name] = value


def _plain(value: Any) -> Any:
    """Return a value without sizes; whatever holds none is returned as it is."""
    if isinstance(value, TracedInt):
        return int(value)
    if type(value) in (list, tuple, torch.Size):
        plain = [_plain(v) for v in value]
        return value if all(a is b for a, b in zip(plain, value, strict=True)) else type(value)(plain)
    if type(value) is dict:
        entries = {k: _plain(v) for k, v in value.items()}
        return value if all(entries[k] is v for k, v in value.items()) else entries
    return value
