"""Which heads can be rotated, and the change of basis itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .ledger import FREE, ZERO, Ledger, Position, Space
from .report import HeadKind, SkippedHeads


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a head: rows (`dim` 0) or columns (`dim` 1) of a weight, and of its bias where it has one."""

    weight: str
    dim: int
    index: Tensor
    bias: str = ''
    bias_index: Tensor | None = None

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return it as `(width, n)`, a bias as one more column."""
        flat = tensors[self.weight].movedim(self.dim, 0)[self.index].flatten(1)
        return flat if self.bias_index is None else torch.cat([flat, tensors[self.bias][self.bias_index, None]], 1)

    def write_(self, tensors: Mapping[str, Tensor], matrix: Tensor) -> None:
        """Write it back."""
        rows = tensors[self.weight].movedim(self.dim, 0)
        if self.bias_index is not None:
            tensors[self.bias][self.bias_index], matrix = matrix[:, -1], matrix[:, :-1]
        rows[self.index] = matrix.reshape(-1, *rows.shape[1:])


@dataclass(frozen=True, eq=False)
class Head:
    """Two sides of which only the product matters, `left^T right`, in one basis of `width` dimensions."""

    attention: str
    kind: HeadKind
    left: Side
    right: Side

    @property
    def names(self) -> set[str]:
        """The parameters that it writes."""
        return {self.left.weight, self.left.bias, self.right.weight, self.right.bias} - {''}


@dataclass(frozen=True)
class Plan:
    """Heads to rotate, and those that are left alone."""

    heads: tuple[Head, ...]
    skipped: tuple[SkippedHeads, ...]


def plan(ledger: Ledger) -> Plan:
    """Choose the heads whose rows have no other reader."""
    heads: list[Head] = []
    skipped = list(ledger.skipped)
    taken: set[int] = set()
    for space in ledger.spaces:
        partner = ledger.partner[space.rows]
        reason = _obstacle(ledger, space, partner)
        if reason:
            skipped.append(SkippedHeads(space.attention, space.kind, 1, reason))
        elif taken.isdisjoint(space.rows.tolist()):
            taken.update(space.rows.tolist(), partner.tolist())
            own, other = _side(ledger, space.rows), _side(ledger, partner)
            sides = (own, other) if space.kind is HeadKind.QUERY_KEY else (other, own)
            heads.append(Head(space.attention, space.kind, *sides))
    return Plan(tuple(heads), tuple(skipped))


def _obstacle(ledger: Ledger, space: Space, partner: np.ndarray) -> str:
    """Return why a head is left alone, or ''."""
    if why := ledger.reason(space.rows) or ledger.reason(partner):
        return why
    if len(space.rows) < 2:
        return 'heads of one dimension'
    if bool((partner == FREE).any()):
        return 'no layer reads the result directly'
    columns = ledger.position(int(partner[0])).dim == 1
    if columns != (space.kind is HeadKind.VALUE_PROJECTION):
        return 'it is used twice: keys or values that several heads share, or a second reader'
    for numbers in (space.rows, partner):
        if len({ledger.position(int(n)).tensor for n in numbers}) > 1 or len(np.unique(numbers)) < len(numbers):
            return 'its rows are those of several weights'
        bias = ledger.bias[numbers]
        if bool((bias > ZERO).any()) and (bool((bias <= ZERO).any()) or ledger.reason(bias)):
            return ledger.reason(bias) or 'a part of its rows has no bias'
        if len({ledger.position(int(n)).tensor for n in bias if n > ZERO}) > 1:
            return 'its biases are those of several parameters'
    return ''


def _side(ledger: Ledger, numbers: np.ndarray) -> Side:
    where = [ledger.position(int(n)) for n in numbers]
    name, dim, _ = where[0]
    bias: list[Position] = [ledger.position(int(n)) for n in ledger.bias[numbers] if n > ZERO]
    index = torch.tensor([w.row for w in where])
    return Side(name, dim, index, *(bias[0].tensor, torch.tensor([b.row for b in bias])) if bias else ())


# -- the change of basis -----------------------------------------------------------------------------------------------
def balanced(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return two matrices with the same `left^T right`, whose rows are sorted by what they carry, most first.

    With left^T right = U S V^T of rank at most `width`: S^1/2 U^T and S^1/2 V^T. Both are `(width, n)`, in float64.

    Example:
        >>> left, right = balanced(torch.eye(2, dtype=torch.float64), torch.diag(torch.tensor([1.0, 9.0])).double())
        >>> left, right
        (tensor([[0., 3.],
                [1., 0.]], dtype=torch.float64), tensor([[0., 3.],
                [1., 0.]], dtype=torch.float64))
    """
    (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left.T), torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    u, v = q_left @ u, q_right @ vh.T
    sign = torch.sign(u.gather(0, u.abs().argmax(0, keepdim=True)))  # a basis is unique up to signs
    new = [left.new_zeros(left.shape), right.new_zeros(right.shape)]
    for target, basis in zip(new, (u, v), strict=True):
        target[: len(s)] = (basis * sign * s.sqrt()).T
    return new[0], new[1]


@torch.no_grad()
def rotated(tensors: Mapping[str, Tensor], heads: Iterable[Head]) -> dict[str, Tensor]:
    """Return the new values, in float64 on the CPU, of the parameters that these heads write.

    Matrices of a head's width are decomposed faster there than on a GPU, and some devices have no float64.
    """
    heads = tuple(heads)
    names = {name for head in heads for name in head.names}
    values = {name: tensors[name].detach().cpu().double().clone() for name in names}
    for head in heads:
        left, right = balanced(head.left.matrix(values), head.right.matrix(values))
        head.left.write_(values, left)
        head.right.write_(values, right)
    return values
