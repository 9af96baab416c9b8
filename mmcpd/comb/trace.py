"""Run a model once and write down, for each operation, which atoms it makes equal and which it freezes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .atoms import AtomTable, Axes, Axis
from .errors import CombError
from .source import Spot, asking

_AXES = '_mmcpd_axes'  # the attribute of a running tensor that holds its axes


@dataclass
class Term:
    """One product `constant * live(axis) * live(axis) ...` of a closed cost formula."""

    constant: int
    axes: tuple[np.ndarray, ...]  # atoms


# Functions that may run over the live channels alone: their result is then what it is in the slimmed model. The second
# kind keeps the channels. All of them take `(input, dim, ...)`, dim an integer, several, or none for all of them.
REDUCTIONS = set('mean sum var std var_mean std_mean amax amin max min prod logsumexp'.split())
SOFTMAXES = set('softmax log_softmax'.split())
ROOT_MEAN_SQUARE = 'rms_norm'  # the same, where it normalises one dimension


@dataclass
class NormSite:
    """A statistic over channels (a norm's, a mean, a softmax), which must be that of the units that stay."""

    module: str
    axis: np.ndarray  # atoms, (C,)
    dim: int  # where the channels are, counted from the end: -1 is the last dimension


@dataclass
class ScaleSite:
    """An attention that divides by the square root of its own width; the query's rows take up the difference."""

    query: np.ndarray  # atoms of the query's producer, all heads
    width: np.ndarray  # atoms of one head
    module: str


@dataclass
class Equation:
    """A size that a forward asked for, and what it must be: the live count of an axis, or a number."""

    expression: Any
    target: np.ndarray | int
    module: str
    place: Spot | None


@dataclass
class Call:
    """One operation as the dispatcher saw it, its arguments by their names in the schema."""

    op: str  # 'add', 'convolution', ...: in-place and out-of-place forms share a name
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: dict[str, Any]
    out: Any

    def tensors(self) -> list[Tensor]:
        """Return every tensor among the arguments, lists included."""
        found: list[Tensor] = []
        for value in self.named.values():
            if isinstance(value, Tensor):
                found.append(value)
            elif isinstance(value, (list, tuple)):
                found.extend(v for v in value if isinstance(v, Tensor))
        return found


@dataclass
class Trace:
    """All that one run says about a model."""

    heads: str = 'dim'  # which dimension of a rectangle keeps the atoms: the width of each head, or whole heads
    table: AtomTable = field(default_factory=AtomTable)
    macs: list[Term] = field(default_factory=list)
    memory: list[Term] = field(default_factory=list)  # elements of the outputs of convolutions and matrix products
    norms: list[NormSite] = field(default_factory=list)
    scales: list[ScaleSite] = field(default_factory=list)
    sizes: list[Equation] = field(default_factory=list)
    numbers: list[Equation] = field(default_factory=list)  # widths that became a factor, and must stay what they were
    equal: list[tuple[Any, Any]] = field(default_factory=list)  # expressions that the forward compared
    roles: list[tuple[np.ndarray, str]] = field(default_factory=list)
    gates: list[np.ndarray] = field(default_factory=list)  # producers' rows at products of two activations
    inside: frozenset[str] = frozenset()  # grouped convolutions that lose channels inside each group, not whole groups
    grouped: list[tuple[str, np.ndarray]] = field(default_factory=list)  # those that lose whole groups: module, rows
    biases: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # weight rows beside their bias
    function: str = ''  # the Python function that runs, as its caller sees it
    adapts: bool = False  # it asked for a width, computed with one, or ran more than plain operations: worth a trial
    unsupported: Counter[tuple[str, str]] = field(default_factory=Counter)
    names: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # one of the atoms tied to each
    paths: dict[int, str] = field(default_factory=dict)  # of each module, by its id
    path: list[str] = field(default_factory=lambda: [''])

    @property
    def asking(self) -> str:
        """The path of the module whose method runs, also where it was called without its hooks."""
        return self.paths.get(id(asking()), self.path[-1])

    @property
    def where(self) -> str:
        """The path of the module that is running, for messages."""
        return self.path[-1] or 'the model itself'

    # -- axes of running tensors -------------------------------------------------------------------------------------
    def axes(self, tensor: Tensor) -> Axes:
        found: Axes | None = getattr(tensor, _AXES, None)
        return found if found is not None else (None,) * tensor.dim()

    def set(self, tensor: Tensor, axes: Axes) -> None:
        assert len(axes) == tensor.dim(), (len(axes), tensor.shape)
        setattr(tensor, _AXES, tuple(axis and axis.fitting(tensor.shape) for axis in axes))

    # -- equations ---------------------------------------------------------------------------------------------------
    def equate(self, left: Axis | None, right: Axis | None, what: str) -> None:
        """Make two axes equal; an axis that meets nothing, or one of another length, is frozen."""
        if left is not None and right is not None and len(left) != len(right):
            for axis in (left, right):
                self.freeze(axis, f'{what} of {len(left)} with {len(right)} channels in {self.where}')
        elif left is not None and right is not None:
            self.table.equate(left.atoms, right.atoms, f'{what} with a fixed position in {self.where}')
        else:
            self.freeze(left or right, f'{what} with an activation that has no channels in {self.where}')

    def freeze(self, axis: Axis | None, reason: str) -> None:
        if axis is not None:
            self.table.freeze(axis.atoms, reason)

    def freeze_all(self, tensor: Tensor, reason: str) -> None:
        for axis in self.axes(tensor):
            self.freeze(axis, reason)

    def tie(self, atoms: np.ndarray) -> None:
        """Make all columns of `(n, k)` atoms equal, row by row; fixed positions are passed over."""
        first = atoms.max(axis=1)  # an atom wherever the row has one
        if len(self.names) < self.table.size:
            self.names = np.arange(self.table.size)
        for column in atoms.T:
            both = (column >= 0) & (first >= 0)
            self.table.equate(column[both], first[both], '')
            self.names[column[both]] = self.names[first[both]]

    def named(self, atoms: Tensor) -> Tensor:
        """Return one name for atoms that were tied, as int32; `FIXED` stays."""
        if not len(self.names):
            return atoms
        names = torch.from_numpy(self.names.astype(np.int32))
        return torch.where(atoms >= 0, names[atoms.clamp(min=0)], atoms)

    def over_live(self, axis: Axis, dim: int, what: str) -> None:
        """Note a statistic over channels that masking can take over the live ones; freeze one that it cannot.

        It can where a module calls the function itself, and does not go through another one that calls it.
        """
        if self.function in REDUCTIONS | SOFTMAXES or (self.function == ROOT_MEAN_SQUARE and dim == -1):
            self.norms.append(NormSite(self.asking, axis.atoms, dim))
        else:
            self.freeze(axis, f'{what} over channels in {self.where}')

    def role(self, axis: Axis | None, role: str) -> None:
        if axis is not None:
            self.roles.append((axis.atoms, role))

    def cost(self, constant: int, *axes: Axis | None) -> None:
        self.macs.append(Term(constant, tuple(a.atoms for a in axes if a is not None)))

    def output(self, tensor: Tensor, axes: Axes) -> None:
        """Set the axes of an output that is stored for the backward pass, and count its elements."""
        self.set(tensor, axes)
        constant = 1
        for size, axis in zip(tensor.shape, axes, strict=True):
            constant *= 1 if axis is not None else size
        self.memory.append(Term(constant, tuple(a.atoms for a in axes if a is not None)))


class _Dispatch(TorchDispatchMode):
    """Give every operation to its rule."""

    def __init__(self, trace: Trace, apply: Callable[[Trace, Call], None]) -> None:
        super().__init__()
        self.trace, self.apply = trace, apply
        self.names: dict[Any, tuple[str, bool, tuple[str, ...]]] = {}  # and whether it works in place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.names:
            schema = func._schema
            op = schema.name.split('::')[-1]
            inplace = op.endswith('_') and not op.startswith('__')
            self.names[func] = (op[:-1] if inplace else op, inplace, tuple(a.name for a in schema.arguments))
        op, inplace, names = self.names[func]
        inplace &= bool(args) and isinstance(args[0], Tensor)  # not a list of them
        seen = (self._before(args[0]), *args[1:]) if inplace else args
        out = func(*args, **kwargs)
        named = dict(zip(names, seen, strict=False)) | kwargs
        self.apply(self.trace, Call(op, func, seen, kwargs, named, out))
        if inplace:  # views of it still say that it vanishes where a unit is removed
            axes = zip(self.trace.axes(seen[0]), self.trace.axes(out), strict=False)
            self.trace.adapts |= any(a is not None and b is not None and a.zero and not b.zero for a, b in axes)
        return out

    def _before(self, tensor: Tensor) -> Tensor:
        """Return a tensor as it is before an operation in place, which may change its shape: `transpose_`."""
        alias = tensor.detach()
        self.trace.set(alias, self.trace.axes(tensor))
        return alias


@contextmanager
def _module_paths(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Keep `trace.path` at the path of the running module.

    Raises:
        CombError: at a scripted module, which takes no hooks (a traced one does).
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.RecursiveScriptModule):
                where = name or 'the model itself'
                raise CombError(f'{where} is scripted by torch.jit, and takes no hooks; comb the module it was made of')

            def enter(_m: nn.Module, _i: Any, name: str = name) -> None:
                trace.path.append(name)

            def leave(_m: nn.Module, _i: Any, _o: Any) -> None:
                trace.path.pop()

            stack.callback(module.register_forward_pre_hook(enter, prepend=True).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients or the fused encoder, and put everything back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    fastpath = torch.backends.mha.get_fastpath_enabled()
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for module, training in modes:
            module.training = training


def tensors_in(value: Any) -> list[Tensor]:
    """Return all tensors in nested tuples, lists, dictionaries and data classes."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in tensors_in(v)]
    if is_dataclass(value) and not isinstance(value, type):
        return [t for f in fields(value) for t in tensors_in(getattr(value, f.name))]
    return []


def _forget_cached(model: nn.Module, trace: Trace, marked: list[Tensor]) -> None:
    """Unmark what a forward stored on its modules: the slimmed model has it in its old width, so a trial is due."""
    own = set(map(id, marked))
    for module in model.modules():
        for tensor in tensors_in(list(vars(module).values())):
            if hasattr(tensor, _AXES) and id(tensor) not in own:
                delattr(tensor, _AXES)
                trace.adapts = True


def run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    forward: Callable[..., Any],
    heads: str = 'dim',
    inside: frozenset[str] = frozenset(),
) -> Trace:
    """Trace one forward pass.

    Args:
        model: runs in eval mode without gradients.
        inputs: its arguments.
        forward: `callable(model, *inputs)`.
        heads: which dimension of a rectangle keeps the atoms, see `Trace`.
        inside: paths of the grouped convolutions that lose channels inside each group, see `Trace`.

    Raises:
        CombError: if the output holds no tensor, so that nothing could be compared.
    """
    from .rules import apply
    from .sizes import observing_sizes

    trace = Trace(heads=heads, inside=inside, paths={id(module): name for name, module in model.named_modules()})
    marked: list[Tensor] = []
    try:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not hasattr(tensor, _AXES):  # a parameter that two modules share has one set of atoms
                setattr(tensor, _AXES, trace.table.add(name, tensor))
                marked.append(tensor)
        with (
            evaluating(model),
            _module_paths(model, trace),
            observing_sizes(model, trace),
            _Dispatch(trace, apply),
        ):
            out = forward(model, *inputs)
        results = tensors_in(out)
        if not results:
            raise CombError(f'the forward pass returned {type(out).__name__} without a tensor; give `forward=` one')
        for tensor in results:
            trace.freeze_all(tensor, 'model output')
        _forget_cached(model, trace, marked)
    finally:
        for tensor in marked:
            if hasattr(tensor, _AXES):
                delattr(tensor, _AXES)
    return trace
