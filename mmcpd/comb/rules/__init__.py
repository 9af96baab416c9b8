"""The table of operations: what each one says about the axes of its inputs and outputs.

Four kinds of operation, looked up in this order:

1. those with a rule in this folder, by the operation's name (in-place and out-of-place forms share it);
2. point-wise ones (the dispatcher tags them): broadcast dimensions meet and are equal;
3. data movement (`MOVEMENT`): run the very same operation on the atoms;
4. everything else: if an axis goes in, freeze it, count the operation and report it. Never guess.

A rule takes the `Trace` and the `Call` and sets the axes of `call.out`. To add one: write it, decorate it, and test it
with a toy net whose groups are written by hand (`docs/design.md`, "How to add an operation").
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
