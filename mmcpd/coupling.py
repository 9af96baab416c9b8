"""The nouns of combing: what belongs together, what it costs, and why the rest may not be pruned."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .compat import StrEnum
from .cost import Cost, CostModel
from .example import Cache, Example
from .files import whole
from .fixes import Attr, Fixes, Input, Live, Op
from .names import in_short, near

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
    """The rows of one parameter or buffer that belong to each unit of a group."""

    tensor: str  # name in the state dict
    dim: int  # the dimension that is cut
    index: Tensor  # `(units, k)` int64 rows of `dim`; k > 1 after a flatten, or tied over heads or convolution groups
    role: Role


@dataclass(frozen=True, eq=False)
class Group:
    """A coupling group: `units` things that are removed one by one, each whole."""

    name: str  # module path of the first producer; unique
    members: tuple[Member, ...]  # all rows that go with a unit
    units: int
    # The rows over which `sum(w * dL/dw)` is the gradient of a gate on the unit's activation: the columns of its
    # consumers, and the producer's rows where two activations are multiplied (a query).
    cut: tuple[Member, ...]

    def count(self, role: Role) -> int:
        """Return how many tensors have this role, biases left out."""
        return len({m.tensor for m in self.members if m.role is role and not m.tensor.endswith('bias')})


@dataclass(frozen=True)
class Frozen:
    """Rows that may not be pruned, and why."""

    tensor: str
    dim: int
    rows: int
    reason: str


class LayerKind(StrEnum):
    """What a layer does, as reports tell them apart."""

    ATTENTION = 'attention'  # queries, keys and values
    CONVOLUTION = 'convolution'
    LINEAR = 'linear'
    NORM = 'norm'


@dataclass(frozen=True)
class Widths:
    """How many channels the layers of one kind have, and how many of them can go; the model's outputs left out."""

    kind: LayerKind
    prunable: int
    total: int


class OperationAt(NamedTuple):
    """An operation, and the path of the module that ran it."""

    operation: str
    module: str


@dataclass(frozen=True)
class TensorInfo:
    """The shape of a tensor of the state dict, and whether it is a parameter or a buffer."""

    shape: tuple[int, ...]
    is_parameter: bool


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
        widths: how many channels can go, by the kinds of layers.
        caches: what its forwards keep on modules, which no copy takes along.
        unused: layers that no pass ran, by their paths, and single tensors that nothing read.
        untried: why no trial was held where one was due; empty if it was.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unsupported: Mapping[OperationAt, int]
    cost_model: CostModel
    fixes: Fixes
    tensors: Mapping[str, TensorInfo]
    example: Example = field(repr=False)
    widths: tuple[Widths, ...] = ()
    caches: tuple[Cache, ...] = ()
    unused: tuple[str, ...] = ()
    untried: str = ''

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

    @cached_property
    def floors(self) -> dict[str, int]:
        """The least number of units of each group: two where a norm or `squeeze` goes over them."""
        axes = [statistic.axis for statistic in self.fixes.statistics]
        axes += filter(self._may_be_one, self.fixes.squeezed)
        several = np.unique(np.concatenate([np.empty(0, np.int64), *(self.axes[axis] for axis in axes)]))
        return {g.name: 1 + int(np.isin(self.start[g.name] + np.arange(g.units), several).any()) for g in self.groups}

    def _may_be_one(self, axis: int) -> bool:
        """Say whether one position of an axis may be left: all are units of one group."""
        groups = np.searchsorted(list(self.start.values()), self.axes[axis], side='right')
        return bool((self.axes[axis] >= 0).all() and (groups == groups[0]).all())

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
        """Check that a keep fits this model and leaves each group a unit, or two under a norm (see `floors`).

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
                got = f'{kept.dtype} {tuple(kept.shape)}'
                raise ValueError(f'keep[{group.name!r}] must be a BoolTensor of {group.units}, not {got}')
            if not bool(kept.any()):
                raise ValueError(f'keep[{group.name!r}] removes every unit; at least one must be kept')
            if (count := int(kept.sum())) < min(group.units, self.floors[group.name]):
                raise ValueError(
                    f'keep[{group.name!r}] leaves {count} of {group.units} units, {self._why_several(group)}: keep at '
                    f'least {self.floors[group.name]}'
                )

    def _why_several(self, group: Group) -> str:
        """Say what needs more than one unit of a group."""
        units = self.start[group.name] + np.arange(group.units)
        for seen in self.fixes.statistics:
            if np.isin(self.axes[seen.axis], units).any():
                where = seen.place.module or 'the model itself'
                return f'which {where} takes a statistic over, and of one value a norm makes nothing'
        return 'and the forward squeezes their dimension, which would drop it'

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
        for member in (m for group in self.groups for m in group.members):
            rows[member.tensor, member.dim] += member.index.numel()
        prunable = total = 0
        for name, info in self.tensors.items():
            size = int(np.prod(info.shape, dtype=np.int64))
            if info.is_parameter and size:  # tokens of which a configuration asks for none hold nothing
                fixed = np.prod([1 - rows[name, dim] / n for dim, n in enumerate(info.shape)])
                total += size
                prunable += round(size * (1 - float(fixed)))
        return prunable, total

    def prunable_channels(self) -> tuple[int, int]:
        """Return (channels that can go, all channels) of the layers' outputs, those of the model itself left out."""
        made = [widths for widths in self.widths if widths.kind is not LayerKind.NORM]
        return sum(widths.prunable for widths in made), sum(widths.total for widths in made)

    def reasons(self) -> Counter[str]:
        """Return how many rows each reason freezes, kernel sizes left out."""
        counts: Counter[str] = Counter()
        for frozen in (f for f in self.frozen if f.reason != KERNEL):
            counts[frozen.reason] += frozen.rows
        return counts

    def summary(self) -> str:
        """Return in one line how much of the model can be pruned: of the channels that layers give out, and parameters.

        Example:
            >>> coupling.summary()
            '2 groups, 12 units; 100 % of the units and 100 % of the parameters can be pruned'
        """
        units, params = (100 * part / max(all_, 1) for part, all_ in (self.prunable_channels(), self.prunable()))
        return (
            f'{len(self.groups)} groups, {self.units} units; {units:.0f} % of the units and {params:.0f} % of the '
            'parameters can be pruned'
        )

    def table(self) -> list[tuple[str, ...]]:
        """Return a row for each group, and a header: its width, who makes and reads it, and what one unit costs.

        Example:
            >>> coupling.table()[1]
            ('conv1', '8', '1', '1', '8.1 k', '64', '0.50 KiB')
        """
        saved = self.marginal(self.keep())
        head = ('group', 'units', 'producers', 'consumers', 'MACs of one unit', 'parameters', 'activations')
        rows: list[tuple[str, ...]] = [head]
        for group in self.groups:
            ends, cost = (str(group.count(role)) for role in (Role.PRODUCER, Role.CONSUMER)), saved[group.name]
            worth = f'{cost.macs / 1e3:,.1f} k', f'{cost.params:,}', f'{cost.memory / 2**10:,.2f} KiB'
            rows.append((group.name, str(group.units), *ends, *worth))
        return rows

    def __str__(self) -> str:
        """Return the groups, what is frozen and why, and the operations without a rule, as a table."""
        cost = self.cost(self.keep())
        costs = (
            f'{cost.macs / 1e6:,.1f} M MACs, {cost.params / 1e6:,.2f} M parameters, '
            f'{cost.memory / 2**20:,.1f} MiB of activations'
        )
        frozen = [('frozen because', 'rows'), *((why, str(n)) for why, n in self.merged_reasons())]
        kinds = [('channels of', 'prunable', 'frozen')]
        kinds += [(w.kind, str(w.prunable), str(w.total - w.prunable)) for w in self.widths]
        lines = [self.summary(), costs, '', *aligned(self.table()), '']
        for table in (kinds, frozen):
            lines += [*aligned(table), ''] if len(table) > 1 else []
        lines = lines[: -1 if lines[-1] == '' else None]
        for (op, where), n in self.unsupported.items():
            lines.append(
                f'no rule for {op} in {where} (x{n}): what goes through it is frozen until it has one (docs/design.md)'
            )
        if self.unused:
            lines.append(f'never ran, and keep their widths: {in_short(self.unused, 5)}')
        if self.untried:
            lines.append(f'not tried out: {self.untried}')
        return '\n'.join(lines)

    def merged_reasons(self) -> list[tuple[str, int]]:
        """Return the reasons and how many rows each freezes, most rows first; one line for many modules."""
        places: dict[str, list[str]] = {}
        rows: Counter[str] = Counter()
        for reason, count in self.reasons().items():
            text = re.sub(r' (in|\((?:read|used) by) ([\w.]+|the model itself)\)?( \([\w.<>-]+:\d+\))?$', '', reason)
            places.setdefault(text, []).append(reason)
            rows[text] += count
        more = {text: f' and {len(found) - 1} more' if len(found) > 1 else '' for text, found in places.items()}
        return [(places[text][0] + more[text], count) for text, count in rows.most_common()]

    def to_json(self, path: str | Path | None = None) -> str:
        """Return everything but the example and the caches as JSON, and save it where a path is given."""
        left_out = ('example', 'caches')
        text = json.dumps(_plain({f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}))
        if path is not None:
            with whole(Path(path)) as unfinished:
                unfinished.write_text(text, encoding='utf-8')
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


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table with a header: the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0], '-' * len(lines[0]), *lines[1:]]
