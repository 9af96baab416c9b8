"""Look operations up in the table, and apply their rules."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...errors import CombError
from ..record import Record
from ..trace import INPUT, Call, Run
from .movement import movement
from .pointwise import MULTI_HEAD, fresh, pointwise, same, unknown
from .products import ATTENTION, add_product, attention, convolution, embedding, linear, product
from .table import OPERATIONS, UNTAGGED, VISION, Operation

TAGGED = Operation(pointwise())
UNKNOWN = Operation(unknown)
MOVEMENTS = (movement, same, fresh, attention)  # no arithmetic; `attention` says itself what it reads beside the query
PRODUCTS = (convolution, product, add_product, linear, embedding)  # weights produce there


def apply(run: Run, call: Call) -> None:
    """Apply the rule of one operation; passed by at once where no axis goes in.

    One without a row is point-wise where torch says so. Everything else: freeze the axes that go in, count the
    operation and report it. Never guess.
    """
    operation = OPERATIONS.get(call.op) or VISION.get(call.op)
    if operation is None:
        operation = TAGGED if torch.Tag.pointwise in call.func.tags or call.op in UNTAGGED else UNKNOWN
    inputs = call.tensors()
    if operation.counted or any(any(run.axes(tensor)) for tensor in inputs):
        run.record.operations.add(call.op)
        function = run.cursor.function
        own_bias = call.op == 'add' and function == 'linear'  # not in one kernel where the input is not contiguous
        if operation.rule not in MOVEMENTS and function not in (ATTENTION, MULTI_HEAD) and not own_bias:
            run.reads(inputs, weights=operation.rule not in PRODUCTS)
        operation.rule(run, call)
        return
    if is_view(call.func):
        for out in call.outputs():
            run.storages.note_view(out)
    if any(hasattr(tensor, INPUT) for tensor in inputs):
        for out in call.outputs():
            setattr(out, INPUT, True)


@lru_cache(maxsize=4096)
def is_view(func: Any) -> bool:
    """Say whether an operator's output lies in the memory of its input, which it does not write.

    Example:
        >>> is_view(torch.ops.aten.slice.Tensor), is_view(torch.ops.aten.add_.Tensor)
        (True, False)
    """
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def check_strict(record: Record) -> None:
    """Raise on the operations that have no rule.

    Raises:
        CombError: with each operation and the module that ran it.
    """
    if record.unsupported:
        rows = ', '.join(f'{op} in {where} (x{n})' for (op, where), n in record.unsupported.items())
        raise CombError(f'no rule for {rows}; write one in mmcpd/comb/rules, or comb with strict=False to freeze them')
