"""Whether all processes prune the same: they compare a hash of the coupling and of the kept units."""

from __future__ import annotations

import hashlib
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn

from ..coupling import Coupling, Keep
from ..errors import PruneError
from ..names import in_short

BYTES = 8  # of a hash: an integer that every backend sends


def coupling_hash(coupling: Coupling) -> int:
    """Return a number that stands for the groups of a coupling and all their rows.

    Example:
        >>> coupling_hash(coupling) == coupling_hash(comb(build(), images))
        True
    """
    found = hashlib.sha256()
    for group in coupling.groups:
        found.update(f'{group.name} {group.units}'.encode())
        for member in group.members:
            found.update(f'{member.tensor} {member.dim} {member.role}'.encode())
            found.update(member.index.cpu().numpy().tobytes())
    return _number(found.digest())


def keep_hash(keep: Keep) -> int:
    """Return a number that stands for the kept units.

    Example:
        >>> keep_hash(coupling.keep()) == keep_hash(keep)
        False
    """
    found = hashlib.sha256()
    for name in sorted(keep):
        found.update(name.encode())
        found.update(keep[name].cpu().numpy().tobytes())
    return _number(found.digest())


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:BYTES], 'little', signed=True)


class Agreement:
    """See at each event that all processes prune the same.

    Example:
        >>> Agreement(model, coupling).check(keep, 10)    # one process agrees with itself
    """

    def __init__(self, model: nn.Module, coupling: Coupling) -> None:
        self.model, self.coupling = model, coupling

    @cached_property
    def _coupling_hash(self) -> int:
        return coupling_hash(self.coupling)

    def check(self, keep: Keep, iteration: int) -> None:
        """Compare coupling, kept units and finished iterations: all processes call this.

        Raises:
            PruneError: with the processes that differ from the first.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        device = next(self.model.parameters()).device
        ours = torch.tensor([self._coupling_hash, keep_hash(keep), iteration], device=device)
        found = [torch.zeros_like(ours) for _ in range(dist.get_world_size())]
        dist.all_gather(found, ours)
        table = torch.stack(found).cpu()
        for column, what in enumerate(('combed other groups', 'keep other units', 'count other iterations')):
            others = (table[:, column] != table[0, column]).nonzero().flatten().tolist()
            if others:
                raise PruneError(
                    f'processes {in_short(map(str, others), 8)} {what} than process 0 at iteration {iteration}: all '
                    'of them must run the same code and config, build the same model and start from the same weights'
                )
