"""Run a model once, and write down which rows of its parameters meet in products of activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..example import Example
from ..layer_calls import LayerCall, LayerCalls, LayerKind
from ..nested import tensors_in
from ..slim.compare import evaluating
from .follow import Follow, tensors_of
from .ledger import Ledger, Rows, along, numbers_in
from .report import HeadKind, SkippedHeads

PRODUCTS = {'bmm': 0, 'mm': 0, 'baddbmm': 1, 'addmm': 1}  # and the number of their left operand
ATTENTION = '_scaled_dot_product'  # all kernels: (query, key, value, ...), out first


def observe(model: nn.Module, example: Example) -> Ledger:
    """Observe one forward pass in eval mode, without gradients and without the fused encoder."""
    ledger = Ledger(model)
    watch = _Watch(model, ledger)
    with evaluating(model), watch, LayerCalls(model, watch.layer):
        out = example.run(model)
    for tensor in tensors_in(out):
        watch.read(tensor, 'it is an output of the model')
    return ledger


class _Watch(Follow):
    """Note what layers and products of activations say about rows."""

    # -- products of activations -------------------------------------------------------------------------------------
    def multiply(self, op: str, args: Any, kwargs: Any, out: Any) -> bool:
        if op in PRODUCTS:
            first = PRODUCTS[op]
            operands = left, right = args[first : first + 2]
            self.lose('add', args[:first], out)
            if any(rows is not None and rows.weight for rows in map(self.rows, operands)):
                self.lose(op, operands, out)  # a layer by hand, or learned queries
            else:
                self.mix(self.rows(left), self.rows(right), out)
        elif op.startswith(ATTENTION):
            query, key, value = args[:3]
            for other in tensors_of((*args[3:], *kwargs.values())):
                self.read(other, 'it is added to scores')
            shared = query.shape[-3] // key.shape[-3] if query.dim() > 3 else 1
            key, value = (self.rows_of_heads(tensor, shared) for tensor in (key, value))
            self.mix(self.rows_of_heads(query), _transposed(key), None)
            self.mix(None, value, out[0])
        return op in PRODUCTS or op.startswith(ATTENTION)

    def rows_of_heads(self, tensor: Tensor, shared: int = 1) -> Rows | None:
        """Return the rows of an operand, repeated where several queries share keys or values (grouped queries)."""
        rows = self.rows(tensor)
        if rows is not None and rows.weight:
            self.read(tensor, 'it is multiplied without a layer')
            return Rows(None, lost='a learned query, key or value')
        if rows is None or rows.numbers is None or shared == 1:
            return rows
        return Rows(rows.numbers.repeat_interleave(shared, -3), rows.weight, rows.lost)

    def mix(self, left: Rows | None, right: Rows | None, out: Tensor | None) -> None:
        """Note what a product (..., M, K) x (..., K, N) says; `out` is None where nothing follows its result."""
        if left is not None and right is not None:
            meeting = [_channels(left, -2), _channels(right, -1)]
            if meeting[0] is not None and meeting[1] is not None and not left.lost and not right.lost:
                self.contract(meeting[0], meeting[1])
                return
            # Scores may come out of a layer too; then the other operand has values.
            if left.lost and not right.lost and _channels(right, -2) is not None:
                left = None
            elif right.lost and not left.lost and _channels(left, -1) is not None:
                right = None
            else:
                reason = left.lost or right.lost or 'their product sums over tokens'
                self.give_up(HeadKind.QUERY_KEY, (left, right), meeting, reason)
                return
        rows, tokens = (right, -2) if right is not None else (left, -1)
        heads = None if rows is None else _channels(rows, tokens)
        if rows is not None and rows.lost:
            self.give_up(HeadKind.VALUE_PROJECTION, (rows,), [heads], rows.lost)
        elif rows is not None and rows.numbers is not None and heads is None:
            self.ledger.spoil(numbers_in(rows.numbers), 'it is multiplied with a tensor that no layer makes')
        if rows is None or rows.lost or rows.numbers is None or heads is None:
            return
        for head in np.unique(heads, axis=0):
            self.ledger.add_space(head, HeadKind.VALUE_PROJECTION, self.path())
        if out is not None:
            self.found[out] = Rows(rows.numbers.amax(tokens, keepdim=True).expand(out.shape))

    def contract(self, queries: np.ndarray, keys: np.ndarray) -> None:
        """Pair the channels of queries and keys, (heads, width) each."""
        width = queries.shape[1]
        for both in np.unique(np.concatenate([queries, keys], 1), axis=0):
            self.ledger.pair(both[:width], both[width:])
            self.ledger.add_space(both[:width], HeadKind.QUERY_KEY, self.path())

    def give_up(self, kind: HeadKind, read: Sequence[Rows], heads: Sequence[np.ndarray | None], reason: str) -> None:
        """Leave rows alone, and report the heads."""
        for rows in read:
            if rows.numbers is not None and not rows.lost:
                self.ledger.spoil(numbers_in(rows.numbers), reason)
        count = max((len(np.unique(h, axis=0)) for h in heads if h is not None), default=1)
        self.ledger.skipped[SkippedHeads(self.path(), kind, count, reason)] = None

    # -- layers ------------------------------------------------------------------------------------------------------
    def layer(self, call: LayerCall) -> Tensor:
        """Give a layer's output the numbers of its weight's rows, and pair what it reads with its columns."""
        self.paused = True
        try:
            out = call.run()
            self.layer_rows(call, out)
        finally:
            self.paused = False
        return out

    def layer_rows(self, call: LayerCall, out: Tensor) -> None:
        weight = self.rows(call.weight)
        name = call.rows.tensor if call.rows is not None else ''
        if weight is None or not weight.weight or weight.numbers is None:
            why = f'a computed weight in {self.where}'
        elif call.kind is LayerKind.TRANSPOSED or call.groups > 1:
            why = f'a {"grouped " if call.groups > 1 else ""}{call.kind} in {self.where}'
        else:
            self.read_by_layer(call.input, call.channel, name, weight)
            self.made_by_layer(call, out, call.channel, weight.numbers)
            return
        for tensor in (call.input, call.weight, call.bias):
            self.read(tensor, why)
        given = self.rows(call.input)
        same = given is not None and call.input.shape == out.shape
        self.found[out] = Rows(given.numbers if given is not None and same else None, lost=why)

    def read_by_layer(self, given: Tensor, channel: int, name: str, weight: Rows) -> None:
        numbers = self.turning(given)
        others = [d for d in range(given.dim()) if d != given.dim() + channel]
        columns = numbers if numbers is None else along(numbers, others)
        if name and columns is not None:
            self.ledger.pair(columns.numpy().astype(np.int64), self.ledger.columns(name))
            return
        self.read(given, f'a layer across heads or tokens in {self.where}')
        if name:
            self.ledger.spoil(self.ledger.columns(name), 'its projection reads other channels too')
        elif weight.numbers is not None:
            self.ledger.spoil_tensors(numbers_in(weight.numbers), 'a layer reads a part of its columns')

    def made_by_layer(self, call: LayerCall, out: Tensor, channel: int, numbers: Tensor) -> None:
        made = along(numbers, range(1, numbers.dim()))
        if made is None:
            self.read(call.weight, 'a weight whose rows are mixed')
            return
        rows = made.numpy().astype(np.int64)
        bias = self.rows(call.bias)
        if call.bias is None:
            self.ledger.give_bias(rows, np.zeros_like(rows))
        elif bias is not None and bias.weight and bias.numbers is not None:
            self.ledger.give_bias(rows, bias.numbers.numpy().astype(np.int64))
        else:
            self.ledger.spoil(rows, f'a computed bias in {self.where}')
        self.found[out] = Rows(made.reshape(-1, *[1] * (-1 - channel)).expand(out.shape))


def _transposed(rows: Rows | None) -> Rows | None:
    if rows is None or rows.numbers is None:
        return rows
    return Rows(rows.numbers.transpose(-1, -2), rows.weight, rows.lost)


def _channels(rows: Rows, tokens: int) -> np.ndarray | None:
    """Return the rows of each head, `(heads, width)`, where they are the same for all tokens."""
    numbers = rows.numbers if rows.numbers is None else along(rows.numbers, [rows.numbers.dim() + tokens])
    return None if numbers is None else numbers.reshape(-1, numbers.shape[-1]).numpy().astype(np.int64)
