"""The table of operations: what each one says about the axes of its inputs and outputs.

What `apply` looks an operation up in, by its name (in-place and out-of-place forms share it), in this order:

1. `FRESH`: its output has nothing to do with the channels that went in; so has one that no axis goes into;
2. `RULES`: it has a rule in this folder;
3. `SAME`: its output has the axes of its first input;
4. point-wise (`POINTWISE`, and what the dispatcher tags so): broadcast dimensions meet and are equal;
5. `MOVEMENT`: data movement, the very same operation runs on the atoms;
6. `POOLS`: positions are pooled, channels stay;
7. everything else: freeze the axes that go in, count the operation and report it. Never guess.

An operation outside `PLAIN` makes slimming more than slicing, so that combing ends with a trial.

A rule takes the `Trace` and the `Call` and sets the axes of `call.out`. To add one: write it, decorate it, and test it
with a toy net whose groups are written by hand (`docs/design.md`, "How to add").
"""

from __future__ import annotations

import torch

from ..errors import CombError
from ..trace import Call, Trace
from . import statistics  # noqa: F401 - its rules register themselves
from .movement import movement
from .pointwise import pointwise
from .products import pool
from .table import COUNTED, FRESH, MOVEMENT, PLAIN, POINTWISE, POOLS, RULES, SAME, same, unknown


def apply(trace: Trace, call: Call) -> None:
    """Apply the rule of one operation; passed by at once where no axis goes in."""
    if call.op in FRESH or not (call.op in COUNTED or any(any(trace.axes(t)) for t in call.tensors())):
        return
    trace.adapts |= call.op not in PLAIN
    if call.op in RULES:
        RULES[call.op](trace, call)
    elif call.op in SAME:
        same(trace, call)
    elif call.op in POINTWISE or torch.Tag.pointwise in call.func.tags:
        pointwise(trace, call)
    elif call.op in MOVEMENT:
        movement(trace, call)
    elif call.op in POOLS:
        pool(trace, call)
    else:
        unknown(trace, call)


def check_strict(trace: Trace) -> None:
    """Raise on the operations that have no rule.

    Raises:
        CombError: with each operation and the module that ran it.
    """
    if trace.unsupported:
        rows = ', '.join(f'{op} in {where} (x{n})' for (op, where), n in trace.unsupported.items())
        raise CombError(f'no rule for {rows}; write one in mmcpd/comb/rules, or comb with strict=False to freeze them')
