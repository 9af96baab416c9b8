"""One check for many nets: the groups are those written by hand, and masked == slimmed without the trial's help."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling, Keep
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import CONTROL, call, gap, masked, randomise_, rotated


def exact(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], groups: Mapping[str, int]) -> Coupling:
    """Comb a net in float64 without a trial, and check its groups and masked == slimmed, with a control that fails."""
    found = comb(randomise_(model), inputs, trial=False, unused='leave')  # nets share a base with parts for others
    assert {g.name: g.units for g in found.groups} == groups, found.reasons()
    assert not found.unsupported
    for seed in (0, 1):
        check_keep(model, found, random_keep(found, 0.5, seed, awkward=True))
    return found


def check_keep(model: nn.Module, found: Coupling, keep: Keep) -> None:
    """Check masked == slimmed for one keep; another keep of each group is told apart."""
    assert compare(model, found, keep) < 1e-12
    out = call(found, masked(model, found, keep))
    assert gap(call(found, model), out) > CONTROL, 'masking changed nothing'
    for group in found.groups:
        other = rotated(found, group.name, keep)
        if bool((other[group.name] != keep[group.name]).any()):
            assert gap(out, call(found, masked(model, found, other))) > CONTROL, f'{group.name} goes unnoticed'
