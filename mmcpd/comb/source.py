"""Find the call in a module's source that asked for a size which no attribute holds.

`x.reshape(B, N, 3, self.num_heads, C // self.num_heads)` divides the *embedding's* width by the heads. Once both are
pruned, no value of any attribute makes that the width of a head, but a number in its place does. A `Site` names that
place: by the text of the call, so that it is found again in another release as long as the line is the same.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from torch import nn

_OURS, _TORCH = 'mmcpd.comb.', 'torch.'
LEFT, RIGHT = -1, -2  # which operand
NODES = (ast.Call, ast.BinOp, ast.AugAssign)


@dataclass(frozen=True)
class Spot:
    """Where a running forward is: the module, the code, its instruction, and what is meant there, as in `Site`."""

    module: nn.Module | None
    code: CodeType
    instruction: int
    index: int
    count: int


@dataclass(frozen=True)
class Site:
    """One size in one call, or one operand of one expression, of one method of one module's class."""

    module: str
    method: str
    call: str  # its text
    index: int  # which size; LEFT or RIGHT
    count: int  # sizes in the call; 0 for an operand


def spot(index: int, count: int) -> Spot | None:
    """Return the place in the nearest caller outside this package; torch's own code, which cannot change, has none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get('__name__', '') + '.'
        if name.startswith(_TORCH):
            return None
        if not name.startswith(_OURS):
            return Spot(asking(frame), frame.f_code, frame.f_lasti, index, count)
        frame = frame.f_back
    return None


def asking(frame: FrameType | None = None) -> nn.Module | None:
    """Return the module whose method runs in the nearest frame: no hook tells where a caller says `head.forward(x)`."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get('self')
        if isinstance(module, nn.Module):
            return module
        frame = frame.f_back
    return None


def site(module: nn.Module, path: str, place: Spot) -> Site | None:
    """Name a place by method and call text, or None where the code is not a method of the module's class."""
    positions = list(place.code.co_positions())[place.instruction // 2]
    for name, function in methods(type(module)):
        if place.code not in _codes(function.__code__):
            continue
        tree = parsed(function)
        for node in ast.walk(tree) if tree is not None else ():
            if not isinstance(node, NODES):
                continue
            if (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == tuple(positions):
                found = Site(path, name, ast.unparse(node), place.index, place.count)
                return found if put(copy.deepcopy(node), place.index, place.count, 1) else None
    return None


def methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the plain methods and static methods of a class, as its instances find them, without their decorators."""
    for name in dir(kind):
        raw = inspect.getattr_static(kind, name)
        function = inspect.unwrap(raw.__func__ if isinstance(raw, staticmethod) else raw)
        if inspect.isfunction(function) and not (function.__module__ or '').startswith('torch.'):
            yield name, function


def _codes(code: CodeType) -> set[CodeType]:
    inner = {c for const in code.co_consts if isinstance(const, CodeType) for c in _codes(const)}
    return {code} | inner


@lru_cache(maxsize=256)
def parsed(function: Any) -> ast.Module | None:
    """Parse the source of a function; lines and columns are those of its file. None where there is no source."""
    try:
        lines, start = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent(''.join(lines)))
    except (OSError, SyntaxError):
        return None
    ast.increment_lineno(tree, start - 1)
    indent = len(lines[0]) - len(lines[0].lstrip())
    placed: Iterator[Any] = (node for node in ast.walk(tree) if hasattr(node, 'col_offset'))
    for node in placed:
        node.col_offset += indent
        node.end_col_offset += indent
    return tree


def put(node: ast.AST, index: int, count: int, number: int) -> bool:
    """Write a number in place of one size, or of one operand, of a call or an arithmetic expression, in place.

    Args:
        node: a call; for an operand a binary operation or an augmented assignment too.
        index: which of the sizes; of an operand `LEFT` or `RIGHT`.
        count: how many sizes the call has, 0 where it is an operand.
        number: what is written.

    Returns:
        Whether the place was found.

    Understands `x.view(a, b)`, `x.view((a, b))`, `torch.reshape(x, (a, b))`, `x.view(a, *rest)` where the size is not
    one of the starred, and `x.view(shape)`; `d ** -0.5`, `x / d`, `x /= d`, `math.sqrt(d)`, `torch.tensor(d)`.
    """
    new = ast.Constant(number)
    if count == 0:
        return _put_operand(node, index, new)
    if not isinstance(node, ast.Call):
        return False
    if len(node.args) == 1 and isinstance(node.args[0], (ast.Name, ast.Attribute)) and count > 1:  # a whole shape
        shape = node.args[0]
        parts: list[ast.expr] = [ast.Subscript(copy.deepcopy(shape), ast.Constant(i), ast.Load()) for i in range(count)]
        node.args = [ast.Tuple(parts, ast.Load())]
    for candidate in ([a for a in node.args if isinstance(a, (ast.Tuple, ast.List))], [node]):
        if len(candidate) != 1:
            continue
        sizes = candidate[0].args if isinstance(candidate[0], ast.Call) else candidate[0].elts
        stars = [i for i, s in enumerate(sizes) if isinstance(s, ast.Starred)]
        if (not stars and len(sizes) == count) or (len(stars) == 1 and index < stars[0]):
            sizes[index] = new
            return True
        if len(stars) == 1 and index - count > stars[0] - len(sizes):  # counted from the end
            sizes[index - count] = new
            return True
    return False


def _put_operand(node: ast.AST, side: int, new: ast.Constant) -> bool:
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
