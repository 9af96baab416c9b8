"""Sizes as expressions of module attributes and live widths: what they are, and how they are solved."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

# ('attr', module path, name) | ('live', atoms or axis number) | ('input', size) | (operator, left, right) | int
Expression = Any
OPERATORS: dict[str, Callable[[int, int], int]] = {
    '+': operator.add, '-': operator.sub, '*': operator.mul, '//': operator.floordiv, '%': operator.mod,
}  # fmt: skip


def leaves(expr: Expression, kind: str) -> list[tuple[Any, ...]]:
    """Return the leaves of one kind: 'attr', 'live' or 'input'."""
    if not isinstance(expr, (tuple, list)):
        return []
    if expr[0] in ('attr', 'live', 'input'):
        return [tuple(expr)] if expr[0] == kind else []
    return leaves(expr[1], kind) + leaves(expr[2], kind)


def follows(expr: Expression) -> bool:
    """Say whether an expression may change when channels go: it hangs on an attribute or on a width."""
    return bool(leaves(expr, 'attr') or leaves(expr, 'live'))


# -- attributes by name --------------------------------------------------------------------------------------------
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
def evaluate(expr: Expression, attributes: Mapping[tuple[str, str], int], live: Sequence[int]) -> int:
    """Evaluate an expression at the given attributes and live counts by axis number."""
    if not isinstance(expr, (tuple, list)):
        return int(expr)
    if expr[0] == 'attr':
        return attributes[(expr[1], expr[2])]
    if expr[0] == 'live':
        return int(live[expr[1]])
    if expr[0] == 'input':
        return int(expr[1])
    return OPERATORS[expr[0]](evaluate(expr[1], attributes, live), evaluate(expr[2], attributes, live))


def solve(
    equations: Sequence[tuple[Expression, int]], attributes: Mapping[tuple[str, str], int], live: Sequence[int]
) -> tuple[dict[tuple[str, str], int], list[int]]:
    """Find the attributes for which each expression equals its target.

    Only expressions of attributes alone decide an attribute: those that name one first, products are then solved for
    what is left. What reads a tensor's width as well is only checked.

    Args:
        equations: `(expression, target)`.
        attributes: the present value of each attribute that occurs, by (module path, name).
        live: the live count of each axis.

    Returns:
        The attributes that change, with their new values; and the numbers of the equations that no value satisfies.
    """
    values, known = dict(attributes), set[tuple[str, str]]()

    def order(number: int) -> tuple[int, bool]:
        expr = equations[number][0]
        return len(leaves(expr, 'attr')), not (isinstance(expr, (tuple, list)) and expr[0] == 'attr')

    for number in sorted(range(len(equations)), key=order):
        expr, target = equations[number]
        names = dict.fromkeys((leaf[1], leaf[2]) for leaf in leaves(expr, 'attr'))
        if evaluate(expr, values, live) == target:
            if len(names) == 1:
                known.update(names)
            continue
        for name in names if not leaves(expr, 'live') else ():
            found = _value(expr, name, values, target, live) if name not in known else None
            if found is not None:
                values[name] = found
                known.add(name)
                break
    failed = [i for i, (expr, target) in enumerate(equations) if evaluate(expr, values, live) != target]
    return {name: value for name, value in values.items() if value != attributes[name]}, failed


def _value(
    expr: Expression, name: tuple[str, str], values: dict[tuple[str, str], int], target: int, live: Sequence[int]
) -> int | None:
    """Find the one value of an attribute for which the expression is `target`: it is monotonic in each attribute."""
    old = values[name]
    for candidate in (target, *range(old - 1, 0, -1)):
        if evaluate(expr, {**values, name: candidate}, live) == target:
            return candidate
    return None


def show(expr: Expression) -> str:
    """Write an expression as source."""
    if not isinstance(expr, (tuple, list)):
        return str(expr)
    if expr[0] == 'attr':
        return f'{expr[1]}.{expr[2]}' if expr[1] else str(expr[2])
    if expr[0] == 'live':
        return 'channels'
    if expr[0] == 'input':
        return f'size {expr[1]} of the input'
    return f'({show(expr[1])} {expr[0]} {show(expr[2])})'
