"""Put a number in place of one size of a call, of a bound, an operand or a comparison, in a syntax tree.

An integer `index` says which, as `CallSite` and the structure of a slim model hold it; with `count` sizes it is

- `i`: the i-th of sizes that are arguments themselves, `x.view(a, b)`, also behind stars, `x.view(*shape)`;
- `i + count * (p + 1)`: the i-th of a sequence that is argument `p`, `torch.zeros((a, b))`, `x.view(shape)`;

and without (`count` is 0) an operand, the outcome of a comparison, the scale of an attention, a whole argument, or a
bound of a slice.
"""

from __future__ import annotations

import ast
import sys

from .call_arguments import RANGES, names_of

LEFT, RIGHT = -1, -2  # which operand
SCALE = -3  # of an attention: the number is the width whose square root it divides by
OUTCOME = -4  # of a comparison: 1 where it holds (of `!=`, where its sides are equal), 0 where it does not
_ARGUMENT, _BOUND = -100, -1000
_MOST = 64  # arguments of a call, and items of a subscript
_FUNCTIONS = ('torch', 'F', 'functional', 'Tensor', 'nn')  # `torch.reshape(x, s)` has one argument more than a method


def argument(position: int) -> int:
    """Return the index of a size that is one whole argument; the tensor of a method counts as argument 0."""
    return _ARGUMENT - position


def in_sequence(position: int, i: int, count: int) -> int:
    """Return the index of the i-th of `count` sizes that are one argument together."""
    return i + count * (position + 1)


def bound(item: int, stop: bool, from_end: bool) -> int:
    """Return the index of one bound of the slice that is the `item`-th of a subscript."""
    return _BOUND - (4 * item + stop + 2 * from_end)


def is_place(index: int, count: int) -> bool:
    """Say whether an index names a place, of a call with `count` sizes or of an operand (0).

    Example:
        >>> is_place(1, 2), is_place(7, 0), is_place(SCALE, 0), is_place(in_sequence(0, 1, 2), 2)
        (True, False, True, True)
    """
    if count:
        return 0 <= index < count * (_MOST + 1)
    named = _ARGUMENT - _MOST < index <= _ARGUMENT or _BOUND - 4 * _MOST < index <= _BOUND
    return named or index in (LEFT, RIGHT, SCALE, OUTCOME)


def put(node: ast.AST, index: int, count: int, number: int) -> bool:
    """Write a number into a node, in place; say whether the place was found.

    Example:
        >>> node = ast.parse('x.view(*shape)', mode='eval').body
        >>> put(node, 1, 2, 8), ast.unparse(node)
        (True, 'x.view(*(lambda s: [*s[:1], 8, *s[2:]])([*shape]))')
    """
    if isinstance(node, ast.Subscript):
        return index <= _BOUND and _put_bound(node, _BOUND - index, number)
    if index == OUTCOME:
        return isinstance(node, ast.Compare) and _put_outcome(node, bool(number))
    if index == SCALE:
        return _put_scale(node, constant(number))
    if count:
        return isinstance(node, ast.Call) and _put_size(node, index, count, number)
    if index <= _BOUND:
        return False
    if index <= _ARGUMENT:
        return isinstance(node, ast.Call) and _set_argument(node, _ARGUMENT - index, constant(number))
    return _put_operand(node, index, constant(number))


def constant(number: int) -> ast.expr:
    """Return a number as source has it."""
    return ast.UnaryOp(ast.USub(), ast.Constant(-number)) if number < 0 else ast.Constant(number)


# -- calls -------------------------------------------------------------------------------------------------------------
def _put_size(node: ast.Call, index: int, count: int, number: int) -> bool:
    held, index = divmod(index, count)
    if not held:
        return _put_into(node.args, index, count, number)
    found = _argument(node, held - 1)
    if found is None:
        return False
    sequence = (
        found if isinstance(found, (ast.Tuple, ast.List)) else ast.List([ast.Starred(found, ast.Load())], ast.Load())
    )
    return _put_into(sequence.elts, index, count, number) and _set_argument(node, held - 1, sequence)


def _put_into(sizes: list[ast.expr], index: int, count: int, number: int) -> bool:
    """Put the number into a list of sizes, some of which may be starred."""
    stars = [i for i, size in enumerate(sizes) if isinstance(size, ast.Starred)]
    if len(stars) > 1:
        sizes[:], stars = [ast.Starred(ast.List(list(sizes), ast.Load()), ast.Load())], [0]
    if not stars:
        index += len(sizes) - count
        if len(sizes) - count not in (0, 1):  # `Tensor.view(x, a, b)`
            return False
        sizes[index] = constant(number)
        return True
    star, below = stars[0], count - len(sizes) + 1
    if index < star:
        sizes[index] = constant(number)
    elif index >= star + below:
        sizes[index - count] = constant(number)
    else:
        nth = index - star
        call = ast.parse(f'(lambda s: [*s[:{nth}], {number:d}, *s[{nth + 1}:]])([*_])', mode='eval').body
        held, starred = call.args[0].elts[0], sizes[star]  # type: ignore[attr-defined]
        held.value, starred.value = starred.value, call  # type: ignore[attr-defined]
    return True


def _positional(node: ast.Call, position: int) -> int | None:
    """Return which positional argument this is, or None where it is given by its name, or unknown."""
    owner = node.func.value if isinstance(node.func, ast.Attribute) and node.func.attr not in RANGES else None
    name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ''
    position -= owner is not None and name not in _FUNCTIONS
    plain = not any(isinstance(a, ast.Starred) for a in node.args[: position + 1])
    return position if 0 <= position < len(node.args) and plain else None


def _argument(node: ast.Call, position: int) -> ast.expr | None:
    place = _positional(node, position)
    if place is not None:
        return node.args[place]
    return next((k.value for k in node.keywords if k.arg in _names(node, position)), None)


def _names(node: ast.Call, position: int) -> tuple[str, ...]:
    """Return the names under which this argument may be given."""
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, 'id', '')
    return names_of(function, position)


def _set_argument(node: ast.Call, position: int, value: ast.expr) -> bool:
    place = _positional(node, position)
    if place is not None:
        node.args[place] = value
        return True
    for keyword in node.keywords:
        if keyword.arg in _names(node, position):
            keyword.value = value
            return True
    return False


def _put_scale(node: ast.AST, width: ast.expr) -> bool:
    """Let an attention that takes `scale` divide by the square root of this width."""
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        return False  # `**options` may have it
    value = ast.BinOp(width, ast.Pow(), ast.UnaryOp(ast.USub(), ast.Constant(0.5)))
    node.keywords = [*(k for k in node.keywords if k.arg != 'scale'), ast.keyword('scale', value)]
    return True


# -- slices and operands -----------------------------------------------------------------------------------------------
def _put_bound(node: ast.Subscript, which: int, number: int) -> bool:
    item, kind = divmod(which, 4)
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    found = items[item] if item < len(items) else None
    if not isinstance(found, ast.Slice) or any(isinstance(i, ast.Starred) for i in items):
        return False
    # Nothing from the end, `x[-0:]`, would be everything.
    value = constant((-number or sys.maxsize) if kind >= 2 else number)
    if kind % 2:
        found.upper = value
    else:
        found.lower = value
    return True


def _counts(node: ast.BinOp, side: int) -> bool:
    """Say whether an operator computes with a number on this side, and does not make many of it: `[0] * n`, `2**n`."""
    other = node.right if side == LEFT else node.left
    if isinstance(node.op, (ast.Pow, ast.LShift)) and side == RIGHT:
        return False
    if isinstance(other, ast.Constant):
        return isinstance(other.value, (int, float))
    return not isinstance(other, (ast.List, ast.Tuple, ast.JoinedStr))


def _put_outcome(node: ast.Compare, holds: bool) -> bool:
    """Let a comparison of two come out so; its sides are still computed: `(x.shape[1], 8) is not None` holds."""
    if len(node.ops) > 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)):
        return False
    holds ^= isinstance(node.ops[0], ast.NotEq)
    node.left = ast.Tuple([node.left, *node.comparators], ast.Load())
    node.ops, node.comparators = [ast.IsNot() if holds else ast.Is()], [ast.Constant(None)]
    return True


def _put_operand(node: ast.AST, side: int, new: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and not _counts(node, side):
        return False
    if isinstance(node, ast.BinOp) and side == LEFT:
        node.left = new
    elif isinstance(node, ast.BinOp):
        node.right = new
    elif isinstance(node, ast.AugAssign) and side == RIGHT:
        node.value = new
    elif isinstance(node, ast.Call) and len(node.args) == 1:
        node.args = [new]
    else:
        return False
    return True
