"""A toy net per rule: its groups written by hand, and every invariant put to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling

from .helpers import check_cost, check_equal, check_structure, members, randomise_, sample


@dataclass
class Toy:
    """One net, and what combing must say about it.

    Attributes:
        build: makes the net.
        inputs: shapes of its inputs, or the tensors themselves.
        groups: units by group name: all of them, and no other.
        members: by group name, rows per unit by 'tensor:dim': all members, and no other.
        frozen: text that occurs in a reason; with a tensor's 'name:dim', in that of this tensor's dimension.
        unsupported: operations without a rule.
        heads: as `comb` takes it.
        trial: whether the trial is meant to find something.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]
    groups: dict[str, int]
    members: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    frozen: dict[str, str] = field(default_factory=dict)
    unsupported: tuple[str, ...] = ()
    heads: str = 'dim'
    trial: bool = False


def combed(toy: Toy) -> tuple[nn.Module, Coupling]:
    """Build the net with reproducible random weights, and comb it."""
    torch.manual_seed(0)
    model = randomise_(toy.build())
    inputs = tuple(sample(i) if isinstance(i, tuple) else i for i in toy.inputs)
    return model, comb(model, inputs, heads=toy.heads, unused='leave')  # nets share a base with parts for others


def check_toy(toy: Toy) -> tuple[nn.Module, Coupling]:
    """Hold combing against what is written by hand, then masking, slimming, cost, structure and JSON."""
    model, found = combed(toy)
    assert {g.name: g.units for g in found.groups} == toy.groups, found.reasons()
    for name, expected in toy.members.items():
        assert members(found, name) == expected
    reasons = {f'{f.tensor}:{f.dim}': f.reason for f in found.frozen}
    for where, text in toy.frozen.items():
        assert text in reasons[where], reasons
    assert tuple(op for op, _ in found.unsupported) == toy.unsupported
    assert toy.trial or not any('trial' in r for r in reasons.values()), reasons
    if toy.groups:
        check_numbers(model, found, toy.build)
    return model, found


def check_numbers(model: nn.Module, found: Coupling, build: Callable[[], nn.Module]) -> None:
    """Check masked == slimmed, the cost, the structure and JSON."""
    small = check_equal(model, found)
    check_cost(model, found)
    check_structure(model, found, small, build)
    data = json.loads(found.to_json())
    assert [(g['name'], g['units']) for g in data['groups']] == [(g.name, g.units) for g in found.groups]
    assert data['tensors'].keys() == found.tensors.keys()


def pooled(x: Tensor) -> Tensor:
    """Average over all but (N, C)."""
    return x.flatten(2).mean(2)
