"""Follow each layer's output through a forward: which norm reads it, and in which sum it ends.

A trail is the chain of functions from a layer's output to a tensor, as long as each only moves elements (a reshape, a
roll), scales them (a norm in eval mode, a layer scale) or adds constants. So it is affine, and can be undone exactly.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..layer_calls import FUNCTIONS, ParameterRows, storage
from ..nested import tensors_in

# Names of functions, those of operators and properties of a tensor included. A move takes one tensor and keeps each
# element at most once; the others may take a constant: a number, or what shares the storage of a parameter.
MOVES = frozenset(
    'view reshape permute transpose swapaxes swapdims movedim moveaxis flatten unflatten squeeze unsqueeze roll flip '
    'narrow select __getitem__ pad contiguous clone to float double T mT'.split()
)
ADDS = frozenset('add add_ __add__ __radd__ __iadd__'.split())
SCALES = frozenset('mul mul_ multiply __mul__ __rmul__ __imul__ div div_ __truediv__ __itruediv__'.split()) | ADDS
SMALL_GAIN = 1e-2  # below, nothing that the layer puts out can mend a sum
_BATCH_NORM = inspect.signature(F.batch_norm)


class CallKey(NamedTuple):
    """One call of a layer in a forward: the rows of its weight, and the running number of the call."""

    rows: ParameterRows
    number: int


class Norm(NamedTuple):
    """The arguments of a call of batch norm."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    momentum: float
    eps: float

    @classmethod
    def of(cls, args: Any, kwargs: Any) -> Norm:
        bound = _BATCH_NORM.bind(*args, **kwargs)
        bound.apply_defaults()
        return cls(**bound.arguments)


@dataclass(eq=False)
class Origin:
    """A call of a layer whose output is followed, and who reads what."""

    key: CallKey
    order: int
    shape: torch.Size  # of the output
    input: weakref.ref[Tensor]
    version: int  # of the input when the layer was called
    reads: int = 0  # of the output and of all that its trails lead to
    output_reads: int = 0  # of the output itself
    mean: Tensor | None = None  # the running mean of the batch norm that reads the output itself

    @property
    def overwritten(self) -> bool:
        """Whether the layer's input has changed since."""
        given = self.input()
        return given is not None and given._version != self.version


@dataclass(frozen=True, eq=False)
class Step:
    """A function with its arguments, of which the one at `place` is the tensor that is followed."""

    function: Callable[..., Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    place: int | str
    moves: bool

    def run(self, x: Tensor) -> Tensor:
        if isinstance(self.place, str):
            return self.function(*self.args, **{**self.kwargs, self.place: x})
        return self.function(*self.args[: self.place], x, *self.args[self.place + 1 :], **self.kwargs)


@dataclass(frozen=True, eq=False)
class Trail:
    """What happened to a layer's output until it became this version of a tensor."""

    origin: Origin
    version: int
    steps: tuple[Step, ...] = ()

    def replay(self, output: Tensor) -> Tensor:
        """Take another output of the layer the same way; `output` may be overwritten."""
        for step in self.steps:
            output = step.run(output)
        return output

    def back(self, value: Tensor) -> Tensor:
        """Move what lies at the trail's end to where it lies in the layer's output, without scaling it."""
        moves = [step for step in self.steps if step.moves]
        if not moves:
            return value
        with torch.enable_grad():
            start = value.new_zeros(self.origin.shape).requires_grad_()
            end = start
            for step in moves:
                end = step.run(end)
        return torch.autograd.grad(end, start, value)[0]

    def gain(self, value: Tensor) -> Tensor:
        """Return by what each element of the layer's output is multiplied until it is a `value`; 0 if it is dropped."""
        ends = (self.replay(value.new_full(self.origin.shape, start)) for start in (1.0, 0.0))
        return self.back(next(ends) - next(ends))


class Trails(TorchFunctionMode):
    """Follow outputs of layers through a forward, within a `with`.

    Args:
        model: its parameters and buffers are constants.
        on_sum: called as `on_sum(trail, operand, stream)` just before the sum of what a trail leads to and an
            activation, of one shape; of two trails the one whose layer ran last is given. It may write into `operand`.
        on_break: called as `on_break(trail, reason)` where a trail leads to a sum that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        on_sum: Callable[[Trail, Tensor, Tensor], None],
        on_break: Callable[[Trail, str], None] | None = None,
    ) -> None:
        super().__init__()
        self.on_sum, self.on_break = on_sum, on_break
        self.norms: dict[int, list[Origin | None]] = {}  # storage of a running mean -> whose outputs it normalises
        self.readers: dict[int, str] = {}  # storage of a parameter -> a function other than a layer's that reads it
        self._trails: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._count = 0
        self._parameters = {storage(p) for p in model.parameters()}
        self._constants = self._parameters | {storage(b) for b in model.buffers()}

    def start(self, output: Tensor, key: CallKey, given: Tensor) -> Origin:
        """Follow the output of a call from here on; `given` is the layer's input."""
        self._count += 1
        origin = Origin(key, self._count, output.shape, weakref.ref(given), given._version)
        self._trails[output] = Trail(origin, output._version)
        return origin

    def close(self, outputs: object) -> None:
        """End a forward, whose outputs are read by someone else."""
        for tensor in tensors_in(outputs):
            if trail := self.of(tensor):
                self._read(trail)
        self._trails = WeakIdKeyDictionary()

    def of(self, tensor: Tensor) -> Trail | None:
        """Return the trail that leads to a tensor as it is now, if there is one."""
        trail = self._trails.get(tensor)
        return trail if trail is not None and trail.version == tensor._version else None

    def _read(self, trail: Trail) -> None:
        trail.origin.reads += 1
        trail.origin.output_reads += not trail.steps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        given = tensors_in((args, kwargs))
        found = [(tensor, trail) for tensor in given if (trail := self.of(tensor))]
        if name in ADDS and found:
            self._sum(args, kwargs, found)
        result = func(*args, **kwargs)
        self._note_parameters(func, name, given, result)
        if func is F.batch_norm:
            self._note_norm(Norm.of(args, kwargs))
        if not found or (result is not None and not tensors_in(result)):  # a size, a number
            return result
        if len(found) == 1 and result is found[0][0] and self.of(result):  # a dropout in eval mode
            return result
        for _, trail in found:
            self._read(trail)
        if isinstance(result, Tensor):
            step = self._step(func, name, args, kwargs, found) if len(found) == 1 else None
            if step is not None and (step.moves or result.shape == found[0][0].shape):
                self._trails[result] = replace(found[0][1], version=result._version, steps=(*found[0][1].steps, step))
            else:
                self._trails.pop(result, None)
        return result

    def _sum(self, args: Any, kwargs: Any, found: list[tuple[Tensor, Trail]]) -> None:
        """Report a sum of an activation and what a trail leads to."""
        operands = [*args, kwargs['other']] if 'other' in kwargs else list(args)
        if len(operands) != 2 or set(kwargs) - {'other'} or not all(isinstance(x, Tensor) for x in operands):
            return
        if any(storage(x) in self._constants for x in operands) or operands[0] is operands[1]:
            return
        operand, trail = max(found, key=lambda pair: pair[1].origin.order)
        stream = operands[operands[0] is operand]
        origin = trail.origin
        reasons = {
            'its output is broadcast in the sum': operand.shape != torch.broadcast_shapes(*(x.shape for x in operands)),
            'its output is also read by something else than the sum': origin.reads != len(trail.steps),
            'its input is overwritten before the sum': origin.overwritten,
        }
        with torch._C.DisableTorchFunction():
            if not any(reasons.values()):
                self.on_sum(trail, operand, stream.expand_as(operand))
            elif self.on_break is not None:
                self.on_break(trail, next(reason for reason, holds in reasons.items() if holds))

    def _step(self, func: Any, name: str, args: Any, kwargs: Any, found: list[tuple[Tensor, Trail]]) -> Step | None:
        """Return this call as a step of the trail that it reads, or None where it ends the trail."""
        tensor = found[0][0]
        places: list[int | str] = [i for i, x in enumerate(args) if x is tensor]
        places += [key for key, x in kwargs.items() if x is tensor]
        others = [x for x in tensors_in((args, kwargs)) if x is not tensor]
        constant = all(storage(x) in self._constants for x in others)
        if len(places) != 1 or not constant or 'out' in kwargs:
            return None
        if func is F.batch_norm:
            norm = Norm.of(args, kwargs)
            return Step(func, args, kwargs, places[0], False) if _fixed(norm) and norm.input is tensor else None
        if name in MOVES and not others:
            mode = kwargs.get('mode', args[2] if len(args) > 2 else 'constant') if name == 'pad' else 'constant'
            return Step(func, args, kwargs, places[0], True) if mode == 'constant' else None
        divides = 'div' in name and places[0] not in (0, 'input')
        return Step(func, args, kwargs, places[0], False) if name in SCALES and not divides else None

    def _note_norm(self, norm: Norm) -> None:
        if norm.running_mean is None:
            return
        trail = self.of(norm.input)
        origin = trail.origin if trail and not trail.steps and _fixed(norm) else None
        self.norms.setdefault(storage(norm.running_mean), []).append(origin)
        if origin is not None:
            origin.mean = norm.running_mean

    def _note_parameters(self, func: Any, name: str, given: list[Tensor], result: object) -> None:
        if func in FUNCTIONS:
            return
        results = {storage(tensor) for tensor in tensors_in(result)}
        for parameter in {storage(tensor) for tensor in given} & self._parameters:
            if results - {parameter}:  # else a view of it
                self.readers.setdefault(parameter, name)


def _fixed(norm: Norm) -> bool:
    """Say whether a batch norm takes its statistics from its buffers."""
    return not norm.training and norm.running_mean is not None


def _name(func: Any) -> str:
    """Return the name of a function, or of a property that is read."""
    name = getattr(func, '__name__', '')
    return getattr(getattr(func, '__self__', None), '__name__', name) if name == '__get__' else name
