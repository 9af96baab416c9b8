"""What a unit's removal saves, to divide its score by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..cost import Cost
from ..coupling import Coupling
from ..names import look_up

# Name -> divisor, from what removing one unit saves now and the number of kept units of its group.
NORMALIZERS: dict[str, Callable[[Cost, int], int]] = {
    'memory': lambda saved, kept: saved.memory * kept,
    'channel_memory': lambda saved, _: saved.memory,
    'macs': lambda saved, _: saved.macs,
    'params': lambda saved, _: saved.params,
    'none': lambda *_: 1,
}


def normalize(
    scores: Mapping[str, Tensor], coupling: Coupling, keep: Mapping[str, Tensor], *, by: str = 'memory'
) -> dict[str, Tensor]:
    """Divide scores, (units,) per group, by what the unit's removal saves under `keep`: float64 tensors on the CPU.

    `by` is `memory` (bytes of the group's outputs over all kept units), `channel_memory` (bytes of this unit's
    outputs), `macs`, `params` or `none`. The result is infinite where removal saves nothing.

    Source: CPD, the memory regularisation I / M with M = dM * (kept units); `channel_memory` is I / dM of Group
    Fisher Pruning.

    Example:
        >>> scores = {'conv1': torch.ones(8), 'conv2': torch.ones(4)}
        >>> normalize(scores, coupling, coupling.keep(), by='none')['conv2'].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    divisor = look_up(NORMALIZERS, by, 'normalizer')
    marginal = coupling.marginal(keep)
    result = {}
    for name, score in scores.items():
        saved = divisor(marginal[name], int(keep[name].sum()))
        score = score.detach().cpu().double()  # not every device has float64
        result[name] = score / saved if saved > 0 else torch.full_like(score, torch.inf)
    return result
