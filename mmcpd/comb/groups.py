"""The nouns: what belongs together, what it costs, and why the rest may not be pruned."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from ..names import near
from .cost import COSTS, Cost, Formula
from .source import Site

Keep = dict[str, Tensor]
KERNEL = 'a kernel size'


@dataclass(frozen=True)
class Member:
    """The rows of one parameter or buffer that belong to each unit of a group.

    Attributes:
        tensor: name in the state dict.
        dim: the dimension that is cut.
        index: `(units, k)` int64 rows of `dim`; k > 1 after a flatten, or tied over heads or convolution groups.
        role: 'out' (a producer's rows), 'in' (a consumer's columns), 'affine', 'stat' or 'free'.
    """

    tensor: str
    dim: int
    index: Tensor
    role: str

    def rows(self, chosen: Tensor) -> Tensor:
        """Return the rows of the chosen units (a BoolTensor of units)."""
        return self.index[chosen].flatten()


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class SizeRule:
    """A size that the forward asks for: `expression` equals `target`, the live count of that axis, or that number.

    Where it cannot, the number is written into the source at `site`, if there is one.
    """

    expression: Any
    target: int
    constant: bool
    site: Site | None


@dataclass
class Comb:
    """A whole model, combed.

    Attributes:
        groups: the coupling groups in the order in which their producers run.
        frozen: what may not be pruned, with reasons.
        unsupported: `(operation, module path) -> count` of operations without a rule.
        axes: for each dimension that something refers to, the unit of each position, or -1 where it is fixed. Units
            are numbered through all groups.
        macs, memory, params: closed formulas, sums of (factor, axes): the factor times the live counts of the axes.
            Multiply-adds, elements of activations, elements of parameters.
        norms: statistics over channels, which masking takes over those that stay.
        scales: queries whose forward divides by the square root of its own width.
        sizes, numbers: widths that a forward asks for, and that it computes with.
        equal: pairs of expressions that a forward compares.
        shapes: the shape of every parameter and buffer.
        parameters: the names of those that are parameters.
        inputs, forward: what it was combed with; absent after `from_json`.
    """

    groups: list[Group]
    frozen: list[Frozen]
    unsupported: dict[tuple[str, str], int]
    axes: list[np.ndarray]
    macs: list[tuple[int, tuple[int, ...]]]
    memory: list[tuple[int, tuple[int, ...]]]
    params: list[tuple[int, tuple[int, ...]]]
    norms: list[tuple[str, int, int]]  # module path, axis, dimension counted from the end
    scales: list[tuple[list[tuple[str, int, list[int]]], int, str]]  # query's rows, axis of width, module
    sizes: list[SizeRule]
    numbers: list[SizeRule]  # widths that the forward computes with: they are written into the source where they change
    equal: list[tuple[Any, Any]]
    shapes: dict[str, tuple[int, ...]]
    parameters: tuple[str, ...]
    inputs: tuple[Any, ...] = field(default=(), repr=False)
    forward: Callable[..., Any] | None = field(default=None, repr=False)

    @cached_property
    def start(self) -> dict[str, int]:
        """The number of each group's first unit."""
        starts = np.cumsum([0, *(g.units for g in self.groups)])
        return {g.name: int(s) for g, s in zip(self.groups, starts, strict=False)}

    @property
    def units(self) -> int:
        """The number of units of all groups."""
        return sum(g.units for g in self.groups)

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
        """Return a keep in which every unit stays: `{group name: BoolTensor(units)}`."""
        return {g.name: torch.ones(g.units, dtype=torch.bool) for g in self.groups}

    def check(self, keep: Mapping[str, Tensor]) -> None:
        """Check that a keep fits this model and leaves a unit in each group.

        Raises:
            ValueError: with the group's name and what is wrong.
        """
        for name in keep:
            self.group(name)
        for group in self.groups:
            mine = keep.get(group.name)
            if mine is None:
                raise ValueError(f'keep has no entry for group {group.name!r}; start from comb.keep()')
            if mine.dtype != torch.bool or mine.shape != (group.units,):
                raise ValueError(
                    f'keep[{group.name!r}] must be a BoolTensor of {group.units}, not {mine.dtype} {tuple(mine.shape)}'
                )
            if not bool(mine.any()):
                raise ValueError(f'keep[{group.name!r}] removes every unit; at least one must stay')

    # -- cost --------------------------------------------------------------------------------------------------------
    @cached_property
    def _counts(self) -> tuple[csr_array, np.ndarray]:
        rows = [np.full(int((a >= 0).sum()), i) for i, a in enumerate(self.axes)]
        columns = [a[a >= 0] for a in self.axes]
        row, column = np.concatenate([[], *rows]).astype(int), np.concatenate([[], *columns]).astype(int)
        matrix = csr_array((np.ones(len(row), np.int64), (row, column)), shape=(len(self.axes), max(self.units, 1)))
        return matrix, np.array([int((a < 0).sum()) for a in self.axes], np.int64)

    @cached_property
    def _formulas(self) -> dict[str, Formula]:
        dummy = len(self.axes)
        return {metric: Formula.of(getattr(self, metric), dummy) for metric in COSTS}

    def flat(self, keep: Mapping[str, Tensor]) -> np.ndarray:
        """Return a keep as one boolean vector over all units."""
        parts = [keep[g.name].numpy() for g in self.groups]
        return np.concatenate(parts) if parts else np.ones(1, bool)

    def live(self, keep: Mapping[str, Tensor]) -> np.ndarray:
        """Return the number of positions of each axis that stay, `(axes,)` int64."""
        return self._live(self.flat(keep))

    def _live(self, flat: np.ndarray) -> np.ndarray:
        matrix, fixed = self._counts
        return matrix @ flat.astype(np.int64) + fixed

    def cost(self, keep: Mapping[str, Tensor]) -> Cost:
        """Return what the model costs once it is slimmed, in closed form.

        Example:
            >>> keep = c.keep()
            >>> keep['layer1.0.conv1'][:32] = False
            >>> c.cost(keep).macs / c.cost(c.keep()).macs
        """
        return self.cost_flat(self.flat(keep))

    def cost_flat(self, flat: np.ndarray) -> Cost:
        """Return the cost for a boolean vector over all units (see `flat`)."""
        live = np.append(self._live(flat), 1)
        values = {metric: formula(live) for metric, formula in self._formulas.items()}
        return Cost(values['macs'], values['params'], 4 * values['memory'])

    def marginal(self, keep: Mapping[str, Tensor]) -> dict[str, Cost]:
        """Return, for each group, what removing one more of its units would save now (units of a group are alike).

        MACs, parameters and bytes of activations, as in `cost`.

        Example:
            >>> c.marginal(c.keep())['layer1.0.conv1'].macs
        """
        flat = self.flat(keep)
        now = self.cost_flat(flat)
        saved = {}
        for group in self.groups:
            start = self.start[group.name]
            unit = start + int(np.argmax(flat[start : start + group.units]))
            flat[unit] = False
            then = self.cost_flat(flat)
            flat[unit] = True
            saved[group.name] = Cost(*(float(now[m] - then[m]) for m in COSTS))
        return saved

    # -- what could be pruned ----------------------------------------------------------------------------------------
    def prunable(self) -> tuple[int, int]:
        """Return (elements in rows of at least one unit, all elements) of the parameters."""
        touched: dict[str, list[tuple[int, Tensor]]] = {}
        for group in self.groups:
            for member in group.members:
                touched.setdefault(member.tensor, []).append((member.dim, member.index.flatten()))
        prunable = total = 0
        for name in self.parameters:
            shape = self.shapes[name]
            size = int(np.prod(shape, dtype=np.int64))
            total += size
            free = 1.0
            for dim in range(len(shape)):
                rows = sum(len(i) for d, i in touched.get(name, []) if d == dim)
                free *= 1 - rows / shape[dim]
            prunable += round(size * (1 - free))
        return prunable, total

    def __str__(self) -> str:
        from .report import table

        return table(self)

    # -- JSON --------------------------------------------------------------------------------------------------------
    def to_json(self, path: str | Path | None = None) -> str:
        """Write everything but the example inputs as JSON; return it, and save it where a path is given."""
        from .serial import dump

        text = json.dumps(dump(self))
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> Comb:
        """Read what `to_json` wrote: a path, or the text itself.

        Raises:
            ValueError: the text is no JSON, or of another version of mmcpd.
            OSError: the file cannot be read.
        """
        from .serial import load

        text = source if isinstance(source, str) and source.lstrip().startswith('{') else Path(source).read_text()
        return load(json.loads(text))

    def reasons(self) -> Counter[str]:
        """Return how many rows each reason freezes, kernel sizes left out."""
        counts: Counter[str] = Counter()
        for frozen in self.frozen:
            if frozen.reason != KERNEL:
                counts[frozen.reason] += frozen.rows
        return counts
