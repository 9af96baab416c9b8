"""What a unit's removal saves, to divide its score by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..names import look_up

if TYPE_CHECKING:
    from ..comb.groups import Coupling

# Name -> field of what `Coupling.marginal` gives, and whether the units that stay in the group multiply it.
NORMALIZERS: dict[str, tuple[str, bool] | None] = {
    'memory': ('memory', True),
    'channel_memory': ('memory', False),
    'macs': ('macs', False),
    'params': ('params', False),
    'none': None,
}


def normalize(
    scores: dict[str, Tensor], comb: Coupling, keep: dict[str, Tensor], by: str = 'memory'
) -> dict[str, Tensor]:
    """Divide scores by what the unit's removal saves now, in float64 on the CPU.

    Args:
        scores: one tensor (units,) per group.
        comb: what belongs together.
        keep: the units that stay now.
        by: `memory` (bytes of the group's outputs over all units that stay), `channel_memory` (bytes of this
            unit's outputs), `macs`, `params` or `none`.

    Returns:
        One float64 tensor (units,) per group; infinite where removal saves nothing.

    Source: CPD, the memory regularisation I / M with M = dM * (units that stay); `channel_memory` is I / dM
    of Group Fisher Pruning.

    Example:
        >>> normalize(score.scores(), c, c.keep(), by="macs")
    """
    saving = look_up(NORMALIZERS, by, 'normalizer')
    doubles = {name: score.detach().double().cpu() for name, score in scores.items()}
    if saving is None:
        return doubles
    field, times_live = saving
    marginal = comb.marginal(keep)
    result = {}
    for name, score in doubles.items():
        saved = torch.as_tensor(getattr(marginal[name], field), dtype=torch.float64)
        if times_live:
            saved = saved * int(keep[name].sum())
        result[name] = torch.where(saved > 0, score / saved, torch.full_like(score, torch.inf))
    return result
