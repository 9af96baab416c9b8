"""Evaluate size expressions, and solve them for the module attributes that must follow."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from ..fixes import Attr, Expression, Input, Live, Op

OPERATORS: dict[str, Callable[[int, int], int]] = {
    '+': operator.add, '-': operator.sub, '*': operator.mul, '//': operator.floordiv, '%': operator.mod,
    '==': operator.eq, '<': operator.lt, '<=': operator.le, '>': operator.gt, '>=': operator.ge,
}  # fmt: skip
Attributes = Mapping[Attr, int]
_Leaf = TypeVar('_Leaf', Attr, Live, Input)


def leaves(expr: Expression, kind: type[_Leaf]) -> list[_Leaf]:
    """Return the leaves of one kind."""
    if isinstance(expr, Op):
        return leaves(expr.left, kind) + leaves(expr.right, kind)
    return [expr] if isinstance(expr, kind) else []


def may_change(expr: Expression) -> bool:
    """Say whether an expression may change when channels go: it depends on an attribute or on a width."""
    return bool(leaves(expr, Attr) or leaves(expr, Live))


# -- attributes by name ------------------------------------------------------------------------------------------------
def read_attribute(module: nn.Module, name: str) -> int:
    """Read `name` or `name[i]`."""
    base, _, index = name.partition('[')
    value = getattr(module, base)
    return int(value[int(index[:-1])] if index else value)


def write_attribute(module: nn.Module, name: str, value: int) -> None:
    """Write `name` or `name[i]`; a list or tuple is replaced, never changed, since others may hold it."""
    base, _, index = name.partition('[')
    if index:
        items = list(getattr(module, base))
        items[int(index[:-1])] = value
        setattr(module, base, type(getattr(module, base))(items))
    else:
        setattr(module, name, value)


# -- solving -----------------------------------------------------------------------------------------------------------
def evaluate(expr: Expression, attributes: Attributes, live: Sequence[int]) -> int:
    """Evaluate an expression at the given attributes and live counts by axis number."""
    if isinstance(expr, Op):
        return OPERATORS[expr.symbol](evaluate(expr.left, attributes, live), evaluate(expr.right, attributes, live))
    if isinstance(expr, Attr):
        return attributes[expr]
    if isinstance(expr, Live):
        return int(live[expr.axis])
    return expr.size if isinstance(expr, Input) else int(expr)


def solve(
    equations: Sequence[tuple[Expression, int]],
    attributes: Attributes,
    live: Sequence[int],
    ranks: Sequence[int] = (),
) -> tuple[dict[Attr, int], list[int]]:
    """Find the attributes for which each expression equals its target, from their present values.

    Only expressions without a width decide an attribute: those of a lower rank first, and of these those that name one
    attribute; products are then solved for what is left. What reads a tensor's width as well is only checked.

    Returns:
        The attributes that change, with their new values; and the numbers of the equations that no value satisfies.

    Example:
        >>> heads, width = Attr('attn', 'num_heads'), Attr('attn', 'head_dim')
        >>> solve([(width, 6), (Op('*', heads, width), 24)], {heads: 4, width: 8}, [])
        ({Attr(module='attn', name='head_dim'): 6}, [])
    """
    values, known = dict(attributes), set[Attr]()

    def order(number: int) -> tuple[int, int, bool]:
        expr = equations[number][0]
        return ranks[number] if ranks else 0, len(leaves(expr, Attr)), not isinstance(expr, Attr)

    for number in sorted(range(len(equations)), key=order):
        expr, target = equations[number]
        names = dict.fromkeys(leaves(expr, Attr))
        if evaluate(expr, values, live) == target:
            if len(names) == 1:
                known.update(names)
            continue
        for name in names if not leaves(expr, Live) else ():
            found = _value(expr, name, values, target, live) if name not in known else None
            if found is not None:
                values[name] = found
                known.add(name)
                break
    failed = [i for i, (expr, target) in enumerate(equations) if evaluate(expr, values, live) != target]
    return {name: value for name, value in values.items() if value != attributes[name]}, failed


def _value(expr: Expression, name: Attr, values: dict[Attr, int], target: int, live: Sequence[int]) -> int | None:
    """Find the one value of an attribute for which the expression is `target`: it is monotonic in each attribute."""
    for candidate in (target, *range(values[name] - 1, 0, -1)):
        if evaluate(expr, {**values, name: candidate}, live) == target:
            return candidate
    return None


def show(expr: Expression) -> str:
    """Write an expression as source.

    Example:
        >>> show(Op('//', Live(0), Attr('attn', 'num_heads')))
        '(channels // attn.num_heads)'
    """
    if isinstance(expr, Op):
        return f'({show(expr.left)} {expr.symbol} {show(expr.right)})'
    if isinstance(expr, Attr):
        return f'{expr.module}.{expr.name}' if expr.module else expr.name
    if isinstance(expr, Input):
        return f'size {expr.size} of the input'
    return 'channels' if isinstance(expr, Live) else str(expr)
