"""The gradient of a multiplicative gate on each unit, read from weights and their gradients.

A gate m on a unit turns the rows w of its cut into m * w, so dL/dm at m = 1 is the sum of w * dL/dw over
them. Coupled tensors are summed first, a score may square afterwards. `Coupling` names the cut, in its groups.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..coupling import Group, Role

# Elements per step on a CPU: the product stays in the cache, and is just too small for torch to wake its thread pool.
_CACHED = (1 << 15) - 1


class Cut(NamedTuple):
    """A dimension of a tensor over which gates are read."""

    tensor: str
    dim: int


class CutRows(NamedTuple):
    """The rows of a cut, and the unit that each belongs to (numbered through all groups): int64, (rows,) each."""

    rows: Tensor
    units: Tensor


def row_dot(w: Tensor, g: Tensor, dim: int) -> Tensor:
    """Sum `w * g`, two tensors of one shape, over every dimension except `dim`: (C,), in at least float32."""
    if w.dtype in (torch.float16, torch.bfloat16):
        w, g = w.float(), g.float()
    if w.device.type != 'cpu' or not (w.is_contiguous() and g.is_contiguous()):
        return sum_except(w * g, dim)
    channels = w.shape[dim]
    before = w.shape[:dim].numel()
    if before == 1:
        w, g = w.reshape(channels, -1), g.reshape(channels, -1)
        step = max(1, _CACHED // max(1, w.shape[1]))
        return torch.cat([(w[i : i + step] * g[i : i + step]).sum(1) for i in range(0, channels, step)])
    w, g = w.reshape(before, -1), g.reshape(before, -1)  # (before, C * after)
    step = min(before, max(1, _CACHED // max(1, w.shape[1])))
    total = w.new_zeros(step, w.shape[1])
    for start in range(0, before, step):
        stop = min(start + step, before)
        total[: stop - start].addcmul_(w[start:stop], g[start:stop])
    return total.sum(0).reshape(channels, -1).sum(1)


def sum_except(x: Tensor, *dims: int) -> Tensor:
    """Sum over every dimension except `dims`."""
    others = [d for d in range(x.dim()) if d not in dims]
    return x.sum(others) if others else x


class Gates:
    """All units of the groups of a `Coupling` in one flat vector, and the rows that each of them cuts.

    Attributes:
        left_alone: the groups that nobody chooses from by gradients: tensors of their cut may be frozen.

    Raises:
        ValueError: a group has no cut.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self.slices: dict[str, slice] = {}
        self.units = 0
        self.left_alone: set[str] = set()
        self.groups: dict[Cut, list[str]] = {}  # whose units a cut shows
        self.roles: dict[Cut, Role] = {}
        found: dict[Cut, list[CutRows]] = {}
        for group in groups:
            if not group.cut:
                raise ValueError(
                    f"group '{group.name}' has no cut to read a gate's gradient from: {never_prune([group.name])}"
                )
            stop = self.units + group.units
            self.slices[group.name] = slice(self.units, stop)
            for member in group.cut:
                cut = Cut(member.tensor, member.dim)
                self.groups.setdefault(cut, []).append(group.name)
                self.roles[cut] = member.role
                units = torch.arange(self.units, stop).repeat_interleave(member.index.shape[1])
                found.setdefault(cut, []).append(CutRows(member.index.reshape(-1).cpu(), units))
            self.units = stop
        self.cuts = {cut: CutRows(*map(torch.cat, zip(*parts, strict=True))) for cut, parts in found.items()}

    def frozen(self, model: nn.Module) -> dict[str, str]:
        """Return the groups that cannot be scored, each with the first tensor of its cut that needs no gradient."""
        found: dict[str, str] = {}
        for cut in [cut for cut, weight in self._weights(model) if not weight.requires_grad]:
            for group in self.groups[cut]:
                found.setdefault(group, cut.tensor)
        return found

    def check(self, model: nn.Module) -> None:
        """Refuse a model in which a tensor of the cut gets no gradient: nothing is known about its units.

        Raises:
            ValueError: tensors of the cut have `requires_grad=False`; the message lists their groups.
        """
        frozen = {group: tensor for group, tensor in self.frozen(model).items() if group not in self.left_alone}
        if frozen:
            groups, tensors = list(frozen), ', '.join(dict.fromkeys(frozen.values()))
            raise ValueError(
                f'groups {groups} cannot be scored, because requires_grad=False on {tensors} (frozen_stages does '
                f"that): train them, score by importance='magnitude', or {never_prune(groups)}"
            )

    def gradient(self, model: nn.Module) -> Tensor:
        """Return dL/dm of every gate at m = 1: (units,), from the weights and gradients as they are now.

        A tensor that took no part in the loss has no gradient and adds nothing.

        Raises:
            ValueError: as in `check`.
        """
        self.check(model)
        total = torch.zeros(0)
        for cut, weight in self._weights(model):
            if total.numel() == 0:
                total = weight.new_zeros(self.units, dtype=torch.promote_types(weight.dtype, torch.float32))
            if weight.grad is not None:
                rows, units = self.rows(cut, total.device)
                sums = row_dot(weight.detach(), weight.grad, cut.dim).to(total)
                total.index_add_(0, units, sums[rows])
        return total

    @torch.no_grad()
    def scale_(self, model: nn.Module, gates: Tensor) -> None:
        """Multiply the cut's rows by their gates, (units,), in place."""
        for cut, weight in self._weights(model):
            rows, units = self.rows(cut, weight.device)
            factors = torch.ones(weight.shape[cut.dim], dtype=weight.dtype, device=weight.device)
            factors[rows] = gates[units].to(weight)
            weight.movedim(cut.dim, -1).mul_(factors)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut a flat vector (units,) into one tensor per group."""
        return {name: flat[part] for name, part in self.slices.items()}

    def rows(self, cut: Cut, device: torch.device) -> CutRows:
        """Return the rows of a cut, and the unit that each belongs to, on `device`."""
        found = self.cuts[cut]
        if found.rows.device != device:
            found = self.cuts[cut] = CutRows(found.rows.to(device), found.units.to(device))
        return found

    def _weights(self, model: nn.Module) -> Iterator[tuple[Cut, nn.Parameter]]:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for cut in self.cuts:
            if cut.tensor not in parameters:
                raise ValueError(
                    f"the model has no parameter '{cut.tensor}': give the very model that was combed, without a wrapper"
                )
            yield cut, parameters[cut.tensor]


def never_prune(groups: list[str]) -> str:
    """Say how a user excludes groups from pruning, for the end of a message."""
    return f'never prune them: ignore={groups} of comb or PruneHook'


@contextmanager
def untouched(*modules: nn.Module, weights: bool = True) -> Iterator[None]:
    """Give back, bit by bit, parameters, gradients, buffers and torch's random state as they were on entry.

    With `weights=False`, where nothing writes parameters and gradients, only buffers and the random state.
    """
    parameters = list(dict.fromkeys(p for module in modules for p in module.parameters() if weights))
    held = parameters + list(dict.fromkeys(b for module in modules for b in module.buffers()))
    values = [t.detach().clone() for t in held]
    grads = [(p.grad, None if p.grad is None else p.grad.detach().clone()) for p in parameters]
    devices = sorted({t.device.index for t in held if t.device.type == 'cuda'})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(held, values, strict=True):
                tensor.copy_(value)
            for parameter, (grad, saved) in zip(parameters, grads, strict=True):
                # The same tensor object: a bucket of a data-parallel wrapper may look at it.
                parameter.grad = grad
                if grad is not None and saved is not None:
                    grad.copy_(saved)
