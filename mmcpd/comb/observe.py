"""Run a model once, and write down for each operation which atoms it makes equal and which it freezes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..coupling import Role
from ..errors import CombError
from ..example import Example
from ..nested import named_tensors_in, tensors_in
from ..slim.compare import evaluating
from ..slim.mask import named_tensors
from ..slim.references import plain_attributes
from .comparing import settle_
from .computed import note_computed_
from .fresh import resolve_
from .record import Note, Record
from .renewed import RENEWED, freeze_renewed_, renewed_by
from .rules import apply
from .size_arguments import observing_sizes
from .trace import AXES, INPUT, Call, Cursor, Policy, Run
from .transparent import transparent_ints
from .unused import Ran, Unused

PLAIN = '{} is neither a parameter nor a buffer: `register_buffer` lets it be cut'


def observe(model: nn.Module, example: Example, policy: Policy) -> Record:
    """Trace one forward pass, in eval mode and without gradients.

    Raises:
        CombError: if the output holds no tensor, so that nothing could be compared.
    """
    run = Run(policy, Cursor({module: name for name, module in model.named_modules()}), Ran(model))
    marked: list[Tensor] = []
    given = tensors_in(example.inputs)
    try:
        for tensor in given:
            setattr(tensor, INPUT, True)
        for name, tensor in named_tensors(model).items():
            if not hasattr(tensor, AXES):  # a parameter that two modules share has one set of atoms
                zero = name not in policy.divisors
                run.set(tensor, [axis and replace(axis, zero=zero) for axis in run.record.table.add(name, tensor)])
                marked.append(tensor)
        run.real, run.record.divisors = run.record.table.size, set(policy.divisors)
        run.record.pictures = np.zeros(run.real, np.int64) if policy.pictures is None else policy.pictures.copy()
        plain = _mark_plain(model, run)
        marked += [each.tensor for each in plain]
        with (
            evaluating(model),
            _module_paths(model, run),
            observing_sizes(model, run),
            transparent_ints(model, policy.transparent) if policy.transparent else nullcontext(),
            _own_backwards(run),
            _Dispatch(run),
        ):
            out = example.run(model)
            run.counts = False
            others = example.run_also(model)
        if not tensors_in(out):
            raise CombError(f'the forward pass returned {type(out).__name__} without a tensor; give `forward=` one')
        results = tensors_in([out, others])
        for tensor in results:
            run.freeze_all(tensor, 'model output')
        _forget_cached(model, run, marked)
        unused = Unused(run.ran, {len(found.atoms) for found in run.record.roles if found.role is Role.PRODUCER})
        run.record.unread, run.record.unused = frozenset(run.ran.unread_names), unused.names
        if not policy.leave_unused:
            unused.freeze_(run.record.table)
            freeze_renewed_(model, run.record.table)
        for each in plain:  # what else freezes their channels is the better reason
            run.freeze_all(each.tensor, each.reason)
        settle_(run.record)
        resolve_(run.record, run.real)
        said = (each for each in plain if run.record.table.says(each.reason))
        run.record.plain = frozenset(each.name for each in said if each.reason == PLAIN.format(each.name))
    finally:
        for tensor in marked + given:
            for name in (AXES, INPUT):
                if hasattr(tensor, name):
                    delattr(tensor, name)
    return run.record


class _Dispatch(TorchDispatchMode):
    """Give every operation to its rule."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run
        self.names: dict[Any, tuple[str, bool, tuple[str, ...]]] = {}  # and whether it works in place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():  # composite operations arrive whole there
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func not in self.names:
            schema = func._schema
            op = schema.name.split('::')[-1]
            inplace = op.endswith('_') and not op.startswith('__')
            self.names[func] = (op[:-1] if inplace else op, inplace, tuple(a.name for a in schema.arguments))
        op, inplace, names = self.names[func]
        inplace &= bool(args) and isinstance(args[0], Tensor)  # not a list of them
        seen = (self._before(args[0]), *args[1:]) if inplace else args
        given = {name: value for name, value in kwargs.items() if name != 'out' or not self.run.is_bare(value)}
        out = func(*args, **kwargs)
        named = dict(zip(names, seen, strict=False)) | given
        call = Call(op, func, seen, given, named, out)
        self.run.ran.read(op, call.tensors())
        apply(self.run, call)
        if inplace:
            axes = zip(self.run.axes(seen[0]), self.run.axes(out), strict=False)
            if any(a is not None and b is not None and a.zero and not b.zero for a, b in axes):
                self.run.record.notes.add(Note.OVERWRITTEN)
        return out

    def _before(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is before an operation in place, which may change its shape: `transpose_`."""
        alias = tensor.detach()
        self.run.set(alias, self.run.axes(tensor))
        if hasattr(tensor, INPUT):
            setattr(alias, INPUT, True)
        return alias


@contextmanager
def _module_paths(model: nn.Module, run: Run) -> Iterator[None]:
    """Keep `cursor.path` at the path of the running module.

    Raises:
        CombError: at a scripted or traced module, whose Python code does not run.
    """
    cursor = run.cursor
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                where = name or 'the model itself'
                raise CombError(
                    f'{where} is compiled by torch.jit, and cannot be observed; comb the module it was made of'
                )

            def enter(_m: nn.Module, inputs: Any, named: Any, name: str = name) -> None:
                cursor.path.append(name)
                cursor.widths.append(_widths(run, inputs))
                _meet(run, name, [inputs, named])

            def leave(m: nn.Module, inputs: Any, named: Any, out: Any, name: str = name) -> None:
                cursor.path.pop()
                cursor.widths.pop()
                cursor.widths[-1].update(_widths(run, out))
                _meet(run, name, out)
                with torch._C.DisableTorchFunction():
                    note_computed_(run, name, m, [inputs, named], out)

            stack.callback(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True, always_call=True).remove)
        yield


def _widths(run: Run, values: Any) -> set[int]:
    """Return the numbers of channels of what a module was given or gave."""
    values = values if isinstance(values, (list, tuple)) else (values,)
    with torch._C.DisableTorchFunction():  # sizes that nobody asked for are no sizes of the forward
        axes = [axis for tensor in values if isinstance(tensor, Tensor) for axis in run.axes(tensor)]
    return {len(axis) for axis in axes if axis is not None}


def _meet(run: Run, name: str, values: Any) -> None:
    """Note the axes of what a module was given or gave, in dictionaries and samples too."""
    with torch._C.DisableTorchFunction():
        run.ran.meet(name, [axis for tensor in tensors_in(values) for axis in run.axes(tensor)])


class _NotedApply:
    """The `apply` of functions with a backward of their own, which notes that it ran."""

    def __init__(self, notes: set[Note], apply: Any) -> None:
        self.notes, self.apply = notes, apply

    def __get__(self, _: None, kind: Any) -> Any:
        return partial(self._noted, kind)  # called from C, so that the caller's instruction is what it is without

    def _noted(self, kind: Any, *args: Any, **kwargs: Any) -> Any:
        self.notes.add(Note.OWN_BACKWARD)
        return self.apply.__get__(None, kind)(*args, **kwargs)


@contextmanager
def _own_backwards(run: Run) -> Iterator[None]:
    """Note when a function runs that has a backward of its own; `checkpoint` is one of them."""
    function: Any = torch.autograd.Function
    apply = vars(function)['apply']
    function.apply = _NotedApply(run.record.notes, apply)
    try:
        yield
    finally:
        function.apply = apply


class _Plain(NamedTuple):
    """A tensor that a module holds beside parameters and buffers, and why its channels freeze."""

    name: str
    tensor: Tensor
    reason: str


def _mark_plain(model: nn.Module, run: Run) -> list[_Plain]:
    """Give axes to the tensors that modules hold beside parameters and buffers."""
    held: list[_Plain] = []
    for path, module in model.named_modules():
        renewed = {} if run.policy.leave_unused else renewed_by(module.__class__)
        for name, tensor in named_tensors_in(plain_attributes(module)).items():
            if tensor.dim() and not hasattr(tensor, AXES):
                full = f'{path}.{name}'.lstrip('.')
                reason = RENEWED.format(renewed[name]) if name in renewed else PLAIN.format(full)
                held.append(_Plain(full, tensor, reason))
                run.set(tensor, [run.new_axis(size, False) if size > 1 else None for size in tensor.shape])
    return held


def _forget_cached(model: nn.Module, run: Run, marked: list[Tensor]) -> None:
    """Remove marks from tensors that the forward cached on modules: they keep the dense width, so a trial is due."""
    own = set(map(id, marked))
    for module in model.modules():
        for tensor in tensors_in(list(vars(module).values())):
            if any(run.axes(tensor)) and id(tensor) not in own:
                vars(tensor).pop(AXES, None)
                run.record.notes.add(Note.CACHED)
