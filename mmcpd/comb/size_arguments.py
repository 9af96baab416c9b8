"""Observe the sizes that a forward asks for: which integers of a module must follow when channels go.

A forward pass says `x.reshape(B, N, 3, self.num_heads, self.head_dims)`. While the model is traced, every plain `int`
attribute of every module, and every size read from a tensor, is a `TracedInt`. A `TorchFunctionMode` sees the arguments
before C++ does, and writes down an equation: this expression equals the live count of that axis. Slimming solves the
equations for the attributes (`size_expressions.solve`); what no attribute can satisfy is written into the source.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..fixes import Attr, Input, Live
from ..slim.call_arguments import PARAMETERS, RANGES
from ..slim.replace_sizes import LEFT, RIGHT, argument
from ..slim.shape_attributes import Shapes, are_sizes, described, local_shapes
from . import another_size  # noqa: F401  (its handlers)
from .fresh import FACTORIES, factory
from .record import Note
from .rules.pointwise import MULTI_HEAD
from .size_equations import HANDLERS, in_order, pairs_of
from .trace import Run
from .traced_int import TracedInt, as_int


def _size(run: Run, tensor: Tensor, dim: int, value: int) -> int:
    axes = run.axes(tensor)
    if (axis := axes[dim]) is not None:
        return TracedInt.of(value, run.width(axis), run)
    of_weights = any(axes) and run.of_weights(tensor)  # a kernel's size is no input's
    return TracedInt.of(value, value if of_weights else Input(value), run)


class _Observe(TorchFunctionMode):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', '')
        if func == _SHAPE or name == 'size':
            return self.shape(func, args, kwargs)
        if name in COUNTING:
            return math.prod(_size(self.run, args[0], d, s) for d, s in enumerate(args[0].shape))
        ordered, others = in_order(name, args, kwargs) if name in HANDLERS or name in FACTORIES else ([], kwargs)
        cursor = self.run.cursor
        cursor.function, cursor.pairs = name, pairs_of(name, ordered)
        padding = (kwargs['pad'] if 'pad' in kwargs else args[1]) if func is F.pad else ()
        cursor.padded = len(padding) // 2
        for number in padding:
            if isinstance(number, TracedInt):
                number.keep_zero()
        if name in ARITHMETIC:  # a width on the right; on the left it is asked itself
            for side, value in zip((LEFT, RIGHT), args, strict=False):
                if isinstance(value, TracedInt):
                    value.as_number(side)
        for position, (keyword,) in enumerate(PARAMETERS[name] if name in RANGES else ()):  # as many as before
            value = args[position] if position < len(args) else kwargs.get(keyword)
            if isinstance(value, TracedInt):
                value.as_number(argument(position))
        if name == '__len__' and self.run.axes(args[0])[0] is not None:
            self.run.record.notes.add(Note.WIDTH_READ)  # as a number: a trial tells what comes of it
        if name in LEAVING:
            self.run.ran.read(name, args[:1])
            self.run.freeze_all(args[0], f'its values leave torch by {name} in {self.run.where}')
        if name == 'lstm':
            _keep_projected(self.run, args)
        given = map(_plain, args) if name == MULTI_HEAD else args  # it compares them with sizes that it reads itself
        with _decomposed(name):
            out = func(*given, **kwargs)
        for handler in HANDLERS.get(name, ()) if ordered and isinstance(ordered[0], Tensor) else ():
            handler(self.run, ordered, others, out)
        if name in FACTORIES and isinstance(out, Tensor):
            factory(self.run, name, ordered, out)
        return out

    def shape(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        tensor = args[0]
        if isinstance(out, int):
            dim = args[1] if len(args) > 1 else kwargs['dim']
            return _size(self.run, tensor, dim, out)
        return torch.Size(_size(self.run, tensor, d, s) for d, s in enumerate(out))  # it keeps each `TracedInt`


_SHAPE = Tensor.shape.__get__  # type: ignore[attr-defined]
ARITHMETIC = set(
    'tensor as_tensor new_tensor add add_ sub sub_ mul mul_ div div_ true_divide pow pow_ __pow__ __rpow__ fmod '
    'floor_divide __floordiv__ remainder __mod__ clamp clamp_ clamp_min clamp_max lt le gt ge eq ne'.split()
)
INTEGRAL = ('log', 'log2', 'log10', 'isqrt', 'gcd', 'lcm', 'comb', 'perm', 'factorial')  # of `math`, which is C
_MATH = RLock()  # one run at a time has them ask
COUNTING = set('numel nelement'.split())
RECURRENT = set('lstm gru rnn_tanh rnn_relu lstm_cell gru_cell'.split())
LEAVING = set('numpy __array__ tolist __dlpack__'.split())  # what is made of the values is not seen


def _keep_projected(run: Run, args: Any) -> None:
    """Freeze the hidden units of an LSTM with a projection: torch takes one that is as wide as it for one without."""
    states = next((a for a in args if isinstance(a, (list, tuple)) and len(a) == 2), ())
    if states and states[0].shape[-1] != states[1].shape[-1]:
        reason = f'an LSTM must have more hidden units than its projection has channels, in {run.where}'
        run.freeze(run.axes(states[1])[-1], reason)


@contextmanager
def _numbers_of_math() -> Iterator[None]:
    """Let functions of `math` ask a width for its number, as `math.sqrt` does."""

    def asking(function: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*args: Any) -> Any:
            return function(*(each.as_number(LEFT) if isinstance(each, TracedInt) else each for each in args))

        return asked

    with _MATH:
        kept = {name: getattr(math, name) for name in INTEGRAL}
        for name, function in kept.items():
            setattr(math, name, asking(function))
        try:
            yield
        finally:
            for name, function in kept.items():
                setattr(math, name, function)


@contextmanager
def _decomposed(name: str) -> Iterator[None]:
    """Let a recurrent layer run as products and point-wise operations, not as one kernel of a library."""
    if name not in RECURRENT:
        yield
        return
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        torch._C._set_mkldnn_enabled(before)


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


def _widths(module: nn.Module, run: Run) -> Shapes:
    """Return the shapes of a module's own tensors, with what is a width as a traced integer."""
    own: dict[str, Any] = {**module._parameters, **module._buffers}
    return {
        name: tuple(
            size if axis is None else TracedInt.of(size, Live(run.record.number(axis.atoms)), run)
            for size, axis in zip(shape, run.axes(own[name]), strict=True)
        )
        for name, shape in local_shapes(module).items()
    }


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
                elif are_sizes(value):
                    kept.append((vars(module), name, value))
                    sizes = (TracedInt.of(v, Attr(path, f'{name}[{i}]'), run) for i, v in enumerate(value))
                    vars(module)[name] = type(value)(sizes)
            for name, width in described(module, _widths(module, run)).items():
                if isinstance(width, TracedInt) and isinstance(vars(module).get(name), TracedInt):
                    vars(module)[name] = width
        with _Observe(run), _without_caches(), _numbers_of_math():
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
        return as_int(value)
    if type(value) in (list, tuple, torch.Size):
        plain = [_plain(v) for v in value]
        return value if all(a is b for a, b in zip(plain, value, strict=True)) else type(value)(plain)
    if type(value) is dict:
        entries = {k: _plain(v) for k, v in value.items()}
        return value if all(entries[k] is v for k, v in value.items()) else entries
    return value
