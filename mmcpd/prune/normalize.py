"""What a unit's removal saves, to divide its score by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from ..cost import Cost
from ..coupling import Coupling
from ..names import look_up
from .schedule import LATENCY, check_quantities

# Name -> divisor, from what removing one unit saves now and the number of kept units of its group.
NORMALIZERS: dict[str, Callable[[Cost, int], float]] = {
    'memory': lambda saved, kept: saved.memory * kept,
    'channel_memory': lambda saved, _: saved.memory,
    'macs': lambda saved, _: saved.macs,
    'params': lambda saved, _: saved.params,
    'latency': lambda saved, _: saved.latency,
    'none': lambda *_: 1,
}
TREAD = 16  # units over which time is averaged: kernels work in blocks of up to so many channels


def default_normalizer(target: Iterable[str], otherwise: str) -> str:
    """Return by what scores are divided where nothing is asked for: by time where the target is one.

    Example:
        >>> default_normalizer({'latency': 0.6}, 'macs'), default_normalizer({'params': 0.5}, 'macs')
        ('latency', 'macs')
    """
    return LATENCY if LATENCY in target else otherwise


def normalize(
    scores: Mapping[str, Tensor], coupling: Coupling, keep: Mapping[str, Tensor], *, by: str = 'memory'
) -> dict[str, Tensor]:
    """Divide scores, (units,) per group, by what the unit's removal saves under `keep`: float64 tensors on the CPU.

    `by` is `memory` (bytes of the group's outputs over all kept units), `channel_memory` (bytes of this unit's
    outputs), `macs`, `params`, `none`, or `latency` (milliseconds, of a coupling with timed layers: the mean over the
    next 16 units, as one alone may save nothing). The result is infinite where removal saves nothing.

    Raises:
        ValueError: an unknown normalizer, or latency without times.

    Source: CPD, the memory regularisation I / M with M = dM * (kept units); `channel_memory` is I / dM of Group
    Fisher Pruning.

    Example:
        >>> scores = {'conv1': torch.ones(8), 'conv2': torch.ones(4)}
        >>> normalize(scores, coupling, coupling.keep(), by='none')['conv2'].tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    divisor = look_up(NORMALIZERS, by, 'normalizer')
    if by == LATENCY:
        check_quantities(coupling, [by])
    marginal = _time_bought(coupling, keep) if by == LATENCY else coupling.marginal(keep)
    result = {}
    for name, score in scores.items():
        saved = divisor(marginal[name], int(keep[name].sum()))
        score = score.detach().cpu().double()  # not every device has float64
        result[name] = score / saved if saved > 0 else torch.full_like(score, torch.inf)
    return result


def _time_bought(coupling: Coupling, keep: Mapping[str, Tensor]) -> dict[str, Cost]:
    """Return, for each group, what a unit saves in the mean over the next that go; only its latency is set."""
    kept = coupling.flat(keep)
    now, saved = coupling.cost_model(kept).latency, {}
    for name, start in coupling.start.items():
        units = start + np.flatnonzero(keep[name].numpy())[1:][:TREAD]  # one is always kept
        fewer = kept.copy()
        fewer[units] = False
        saved[name] = Cost(0, 0, 0, (now - coupling.cost_model(fewer).latency) / max(1, len(units)))
    return saved
