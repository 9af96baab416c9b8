"""See each call of a layer's function in a forward: which parameter, which of its rows, with which input.

Modules are not asked: a net may pad in its own forward, call `F.linear` with a part of a weight, or attend by
`nn.MultiheadAttention`, which calls its projections as functions.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .compat import StrEnum


class LayerKind(StrEnum):
    LINEAR = 'linear'
    CONVOLUTION = 'convolution'
    TRANSPOSED = 'transposed convolution'
    NORM = 'norm'


# Function -> kind, and its arguments after the input in their order.
_CONVOLUTION = (LayerKind.CONVOLUTION, ('weight', 'bias', 'stride', 'padding', 'dilation', 'groups'))
_TRANSPOSED = (
    LayerKind.TRANSPOSED,
    ('weight', 'bias', 'stride', 'padding', 'output_padding', 'groups', 'dilation'),
)
FUNCTIONS: dict[Any, tuple[LayerKind, tuple[str, ...]]] = {
    F.linear: (LayerKind.LINEAR, ('weight', 'bias')),
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _CONVOLUTION),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
}

_NORM = ('weight', 'bias', 'eps')
NORMS: dict[Any, tuple[LayerKind, tuple[str, ...]]] = {
    F.layer_norm: (LayerKind.NORM, ('normalized_shape', *_NORM)),
    F.rms_norm: (LayerKind.NORM, ('normalized_shape', 'weight', 'eps')),
    F.group_norm: (LayerKind.NORM, ('num_groups', *_NORM)),
    F.batch_norm: (LayerKind.NORM, ('running_mean', 'running_var', 'weight', 'bias', 'training', 'momentum', 'eps')),
}


def storage(tensor: Tensor) -> int:
    """Return what two tensors have in common that share memory."""
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class ParameterRows:
    """Rows `start` to `stop` of the first dimension of a parameter."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class LayerCall:
    """One call of a layer's function.

    `number` counts the calls with these rows in one forward, from 0. `weight` and `bias` are what the function was
    given; `rows` and `bias_rows` say where they are in the model, None where a tensor was computed.
    """

    function: Any
    kind: LayerKind
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    arguments: Mapping[str, Any] = field(repr=False)  # stride, padding, ...
    rows: ParameterRows | None
    bias_rows: ParameterRows | None
    number: int

    @property
    def channel(self) -> int:
        """The dimension of the channels in the output, counted from the end."""
        if self.kind is LayerKind.LINEAR or 'normalized_shape' in self.arguments:
            return -1
        return 1 - (self.input if self.kind is LayerKind.NORM else self.weight).dim()

    @property
    def groups(self) -> int:
        return int(self.arguments.get('groups', 1))

    def run(self, **changed: Any) -> Tensor:
        """Call the function, with another `input`, `weight` or `bias` where given."""
        call = replace(self, **changed) if changed else self
        return call.function(call.input, call.weight, call.bias, **call.arguments)


class LayerCalls(TorchFunctionMode):
    """Hand each call of a layer's function to `on_call`, which returns its output; within a `with`.

    Call `restart` before each forward: calls are numbered anew.

    Args:
        model: whose parameters are recognised, views of whole rows too.
        on_call: gets a `LayerCall` and returns what the layer gives out, as `call.run()` does.
        norms: hand over norms that have a weight as well.

    Example:
        >>> seen = []
        >>> def note(call):
        ...     seen.append(call.rows.tensor)
        ...     return call.run()
        >>> with LayerCalls(model, note):
        ...     out = model(images)
        >>> seen
        ['conv1.weight', 'conv2.weight', 'fc.weight']
    """

    def __init__(self, model: nn.Module, on_call: Callable[[LayerCall], Tensor], *, norms: bool = False) -> None:
        super().__init__()
        self.on_call, self.functions = on_call, FUNCTIONS | NORMS if norms else FUNCTIONS
        self._numbers: Counter[ParameterRows] = Counter()
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}
        for name, parameter in model.named_parameters():
            if parameter.device.type != 'meta':
                self._by_storage.setdefault(storage(parameter), []).append((name, parameter))

    def restart(self) -> None:
        """Count calls from 0 again."""
        self._numbers.clear()

    def rows_of(self, tensor: Tensor | None) -> ParameterRows | None:
        """Return where a tensor is among the model's parameters, or None: whole rows of one of them only."""
        if tensor is None or tensor.dim() == 0 or tensor.numel() == 0:
            return None
        for name, parameter in self._by_storage.get(storage(tensor), ()):
            offset = tensor.storage_offset() - parameter.storage_offset()
            like = tensor.shape[1:] == parameter.shape[1:] and tensor.stride() == parameter.stride()
            if like and tensor.dtype == parameter.dtype and offset >= 0 and offset % max(1, parameter.stride(0)) == 0:
                start = int(offset) // max(1, parameter.stride(0))
                if start + len(tensor) <= len(parameter):
                    return ParameterRows(name, start, start + len(tensor))
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.multi_head_attention_forward, torch.autograd.grad):
            # To a mode it is one function; opened, its projections are seen, whatever its options, and what a
            # checkpoint runs once more, which must save the same.
            with self:
                return _opened(inspect.unwrap(func))(*args, **kwargs)
        if func not in self.functions:
            return func(*args, **kwargs)
        kind, names = self.functions[func]
        named = dict(zip(('input', *names), args, strict=False)) | kwargs
        given, weight, bias = named.pop('input'), named.pop('weight', None), named.pop('bias', None)
        if weight is None:  # a norm without one
            return func(*args, **kwargs)
        function = functools.partial(_norm, func) if kind is LayerKind.NORM else func
        rows = self.rows_of(weight)
        number = 0
        if rows is not None:
            number = self._numbers[rows]
            self._numbers[rows] += 1
        return self.on_call(LayerCall(function, kind, given, weight, bias, named, rows, self.rows_of(bias), number))


def _norm(function: Any, given: Tensor, weight: Tensor, bias: Tensor | None, **arguments: Any) -> Tensor:
    """Call a norm's function, whose weight and bias are not its first arguments."""
    return function(given, weight=weight, **({} if bias is None else {'bias': bias}), **arguments)


@functools.cache
def _opened(function: types.FunctionType) -> Callable[..., Any]:
    """Return a copy of a function of torch that does not hand itself to the mode that runs, but does what it does.

    Raises:
        RuntimeError: this version of torch decides otherwise who the function is handed to.
    """
    if 'has_torch_function' not in getattr(getattr(function, '__code__', None), 'co_names', ()):
        raise RuntimeError(
            f'the layers inside {function.__module__}.{function.__name__} cannot be seen with torch '
            f'{torch.__version__}, whose function does not ask has_torch_function: use an earlier torch, '
            '2.4 or later, or an attention module that calls its projections itself'
        )
    space = {**function.__globals__, 'has_torch_function': lambda _: False}
    opened = types.FunctionType(
        function.__code__, space, function.__name__, function.__defaults__, function.__closure__
    )
    opened.__kwdefaults__ = function.__kwdefaults__
    return opened
