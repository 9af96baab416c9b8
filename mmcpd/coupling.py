"""The nouns: what belongs together, why the rest may not be pruned, and what slimming does beyond slicing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .cost import Cost, CostModel
from .names import near

Keep: TypeAlias = dict[str, Tensor]
KERNEL = 'a kernel size'


# -- what is coupled ---------------------------------------------------------------------------------------------------
class Role(StrEnum):
    """What the rows of a member do for their units."""

    PRODUCER = 'out'
    CONSUMER = 'in'
    AFFINE = 'affine'
    STATISTIC = 'stat'
    FREE = 'free'


@dataclass(frozen=True, eq=False)
class Member:
    """The rows of one parameter or buffer that belong to each unit of a group.

    Attributes:
        tensor: name in the state dict.
        dim: the dimension that is cut.
        index: `(units, k)` int64 rows of `dim`; k > 1 after a flatten, or tied over heads or convolution groups.
        role: what these rows do for the unit.
    """

    tensor: str
    dim: int
    index: Tensor
    role: Role

    def rows(self, chosen: Tensor) -> Tensor:
        """Return the rows of the chosen units (a BoolTensor of units)."""
        return self.index[chosen].flatten()


@dataclass(frozen=True, eq=False)
class Group:
    """A coupling group: `units` things that are removed one by one, each whole.

    Attributes:
        name: module path of the first producer; unique.
        members: all rows that go with a unit.
        units: how many units there are.
        cut: the rows over which `sum(w * dL/dw)` is the gradient of a gate on the unit's activation: the columns of
            its consumers, and the producer's rows where two activations are multiplied (a query).
    """

    name: str
    members: tuple[Member, ...]
    units: int
    cut: tuple[Member, ...]


@dataclass(frozen=True)
class Frozen:
    """Rows that may not be pruned, and why."""

    tensor: str
    dim: int
    rows: int
    reason: str


class OperationAt(NamedTuple):
    """An operation, and the path of the module that ran it."""

    operation: str
    module: str


# -- size expressions: where an integer of a forward came from ---------------------------------------------------------
@dataclass(frozen=True)
class Attr:
    """An integer attribute of a module, `name` or `name[i]`."""

    module: str
    name: str


@dataclass(frozen=True)
class Live:
    """The number of kept positions of an axis."""

    axis: int


@dataclass(frozen=True)
class Input:
    """A size of an activation that no layer's width decides: a batch, a height."""

    size: int


@dataclass(frozen=True)
class Op:
    """Two expressions joined by `+`, `-`, `*`, `//` or `%`."""

    symbol: str
    left: Expression
    right: Expression


Expression: TypeAlias = Attr | Live | Input | Op | int


# -- what slimming does beyond slicing ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class CallSite:
    """One size in one call, or one operand of one expression, of one method of one module's class.

    Attributes:
        module: its path.
        method: name of the method.
        text: the call as `ast.unparse` writes it.
        index: which of the sizes; of an operand `LEFT` or `RIGHT` (`mmcpd.slim.call_sites`).
        count: how many sizes the call has, 0 where it is an operand.
        inferable: whether torch can work the size out from the others, as where none of a reshape is -1 yet.
    """

    module: str
    method: str
    text: str
    index: int
    count: int
    inferable: bool = False


@dataclass(frozen=True)
class CodePlace:
    """Where a method of a module is: found again in the next run, without its source.

    Attributes:
        module: path of the module.
        function: qualified name of the module's method.
        instructions: offsets in byte code, from that method inward through the helper functions that it calls.
    """

    module: str
    function: str
    instructions: tuple[int, ...]


@dataclass(frozen=True)
class SizeRule:
    """A size that a forward asks for or computes with: `expression` must equal `target`.

    Where no attribute makes it so, the size is written into the source at `site`, if there is one.
    """

    expression: Expression
    target: Live | int
    site: CallSite | None


@dataclass(frozen=True)
class Statistic:
    """A statistic over channels (a norm's, a mean, a softmax), which masking takes over the kept ones.

    Attributes:
        place: where the forward takes it.
        axis: its channels.
        dim: where they are, counted from the end: -1 is the last dimension.
    """

    place: CodePlace
    axis: int
    dim: int


@dataclass(frozen=True)
class Rows:
    """Some rows of one dimension of a tensor."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class QueryScale:
    """A query whose forward divides by the square root of its own width; its rows take up the difference.

    Attributes:
        rows: what produces the query, all heads and the bias.
        axis: the width of one head.
        module: path of the module that divides.
    """

    rows: tuple[Rows, ...]
    axis: int
    module: str


@dataclass(frozen=True)
class Equality:
    """Two sizes that a forward compares and finds equal."""

    left: Expression
    right: Expression


@dataclass(frozen=True)
class Fixes:
    """What slimming does beyond slicing.

    Attributes:
        statistics: over channels; masking needs them.
        scales: of queries, to be folded into their rows.
        sizes: that a forward asks for.
        constants: widths that a forward computes with, and that must stay what they are in the dense model.
        equalities: that must hold afterwards.
    """

    statistics: tuple[Statistic, ...] = ()
    scales: tuple[QueryScale, ...] = ()
    sizes: tuple[SizeRule, ...] = ()
    constants: tuple[SizeRule, ...] = ()
    equalities: tuple[Equality, ...] = ()


@dataclass(frozen=True)
class TensorInfo:
    """The shape of a tensor of the state dict, and whether it is a parameter or a buffer."""

    shape: tuple[int, ...]
    is_parameter: bool


@dataclass(frozen=True, eq=False)
class Example:
    """What a model was combed with: `forward(model, *inputs)`."""

    inputs: tuple[object, ...]
    forward: Callable[..., object]

    def run(self, model: torch.nn.Module) -> object:
        return self.forward(model, *self.inputs)


# -- a whole model -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Coupling:
    """A whole model, combed.

    Attributes:
        groups: the coupling groups in the order in which their producers run.
        frozen: what may not be pruned, with reasons.
        unsupported: how often each operation without a rule ran, by `OperationAt(operation, module)`.
        cost_model: closed formulas of what is left; its axes are those that all fixes refer to by number.
        fixes: what slimming does beyond slicing.
        tensors: every parameter and buffer, by name.
        example: what it was combed with.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unsupported: Mapping[OperationAt, int]
    cost_model: CostModel
    fixes: Fixes
    tensors: Mapping[str, TensorInfo]
    example: Example = field(repr=False)

    @property
    def axes(self) -> tuple[np.ndarray, ...]:
        """The unit of each position of each axis, -1 where it is fixed; units are numbered through all groups."""
        return self.cost_model.axes

    @property
    def units(self) -> int:
        """The number of units of all groups."""
        return self.cost_model.units

    @cached_property
    def start(self) -> dict[str, int]:
        """The number of each group's first unit."""
        starts = np.cumsum([0, *(g.units for g in self.groups)])
        return {g.name: int(s) for g, s in zip(self.groups, starts, strict=False)}

    def group(self, name: str) -> Group:
        """Return one group by its name.

        Raises:
            ValueError: if there is none; the message lists the near ones.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise ValueError(f'no group {name!r}: did you mean {near(name, [g.name for g in self.groups])}?')

    def keep(self) -> Keep:
        """Return a keep of all units: `{group name: BoolTensor(units)}`.

        Example:
            >>> keep = coupling.keep()
            >>> keep['conv1'][::2] = False    # every other unit of this group goes
        """
        return {g.name: torch.ones(g.units, dtype=torch.bool) for g in self.groups}

    def check(self, keep: Mapping[str, Tensor]) -> None:
        """Check that a keep fits this model and leaves a unit in each group.

        Raises:
            ValueError: with the group's name and what is wrong.
        """
        for name in keep:
            self.group(name)
        for group in self.groups:
            kept = keep.get(group.name)
            if kept is None:
                raise ValueError(f'keep has no entry for group {group.name!r}; start from coupling.keep()')
            if kept.dtype != torch.bool or kept.shape != (group.units,):
                raise ValueError(
                    f'keep[{group.name!r}] must be a BoolTensor of {group.units}, not {kept.dtype} {tuple(kept.shape)}'
                )
            if not bool(kept.any()):
                raise ValueError(f'keep[{group.name!r}] removes every unit; at least one must stay')

    def flat(self, keep: Mapping[str, Tensor]) -> np.ndarray:
        """Return a keep as one boolean vector over all units."""
        return np.concatenate([np.empty(0, bool), *(keep[g.name].numpy() for g in self.groups)])

    def live(self, keep: Mapping[str, Tensor]) -> np.ndarray:
        """Return the number of kept positions of each axis, `(axes,)` int64."""
        return self.cost_model.live(self.flat(keep))

    def cost(self, keep: Mapping[str, Tensor]) -> Cost:
        """Return what the model costs once it is slimmed, in closed form.

        Example:
            >>> keep = coupling.keep()
            >>> keep['conv1'][:2] = False
            >>> coupling.cost(keep).macs < coupling.cost(coupling.keep()).macs
            True
        """
        return self.cost_model(self.flat(keep))

    def marginal(self, keep: Mapping[str, Tensor]) -> dict[str, Cost]:
        """Return, for each group, what removing one more of its units would save now (units of a group are alike).

        Example:
            >>> coupling.marginal(coupling.keep())['conv1'].params > 0
            True
        """
        kept = self.flat(keep)
        now = self.cost_model(kept)
        saved = {}
        for group in self.groups:
            start = self.start[group.name]
            unit = start + int(np.argmax(kept[start : start + group.units]))
            kept[unit] = False
            saved[group.name] = now - self.cost_model(kept)
            kept[unit] = True
        return saved

    def prunable(self) -> tuple[int, int]:
        """Return (elements in rows of at least one unit, all elements) of the parameters."""
        rows: Counter[tuple[str, int]] = Counter()
        for group in self.groups:
            for member in group.members:
                rows[member.tensor, member.dim] += member.index.numel()
        prunable = total = 0
        for name, info in self.tensors.items():
            if info.is_parameter:
                size = int(np.prod(info.shape, dtype=np.int64))
                fixed = np.prod([1 - rows[name, dim] / n for dim, n in enumerate(info.shape)])
                total += size
                prunable += round(size * (1 - float(fixed)))
        return prunable, total

    def reasons(self) -> Counter[str]:
        """Return how many rows each reason freezes, kernel sizes left out."""
        counts: Counter[str] = Counter()
        for frozen in self.frozen:
            if frozen.reason != KERNEL:
                counts[frozen.reason] += frozen.rows
        return counts

    def __str__(self) -> str:
        from .summary import table

        return table(self)

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything but the example as JSON, and save it where a path is given."""
        text = json.dumps(_plain({f.name: getattr(self, f.name) for f in fields(self) if f.name != 'example'}))
        if path is not None:
            Path(path).write_text(text)
        return text


def _plain(value: object) -> object:
    """Return any of these nouns in JSON types; a size expression says of which kind it is."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if is_dataclass(value):
        kind = {'type': type(value).__name__} if isinstance(value, Attr | Live | Input | Op) else {}
        return kind | {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {' in '.join(k) if isinstance(k, tuple) else k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value
