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

_LIBRARIES = ('torch.', 'mmcpd.comb.')


@dataclass(frozen=True)
class Spot:
    """Where a running forward is: the module, the code, its instruction, and which size of the call is meant."""

    module: nn.Module | None
    code: CodeType
    instruction: int
    index: int
    count: int  # sizes in the call


@dataclass(frozen=True)
class Site:
    """One size in one call of one method of one module's class."""

    module: str
    method: str
    call: str
    index: int
    count: int


def spot(index: int, count: int) -> Spot | None:
    """Return the place in the nearest caller that is neither torch nor this package."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get('__name__', '') + '.'
        if not name.startswith(_LIBRARIES):
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
        for call in ast.walk(tree) if tree is not None else ():
            if not isinstance(call, ast.Call):
                continue
            if (call.lineno, call.end_lineno, call.col_offset, call.end_col_offset) == tuple(positions):
                found = Site(path, name, ast.unparse(call), place.index, place.count)
                spelled = spread(copy.deepcopy(call), place.count)
                return found if size_at(spelled, place.index, place.count) is not None else None
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


def size_at(call: ast.Call, index: int, count: int) -> tuple[list[ast.expr], int] | None:
    """Find one of `count` sizes in a call: the list of expressions that holds it, and its place there.

    Understands `x.view(a, b)`, `x.view((a, b))`, `torch.reshape(x, (a, b))` and `x.view(a, *rest)` where the size is
    not one of the starred.
    """
    for candidate in ([a for a in call.args if isinstance(a, (ast.Tuple, ast.List))], [call]):
        if len(candidate) == 1:
            node = candidate[0]
            sizes = node.args if isinstance(node, ast.Call) else node.elts
            stars = [i for i, s in enumerate(sizes) if isinstance(s, ast.Starred)]
            if not stars and len(sizes) == count:
                return sizes, index
            if len(stars) == 1 and index < stars[0]:
                return sizes, index
            if len(stars) == 1 and index - count > stars[0] - len(sizes):
                return sizes, index - count
    return None


def spread(call: ast.Call, count: int) -> ast.Call:
    """Write a shape in one variable as its sizes, in place: `x.view(shape)` as `x.view((shape[0], shape[1]))`."""
    if len(call.args) == 1 and isinstance(call.args[0], (ast.Name, ast.Attribute)) and count > 1:
        shape = call.args[0]
        sizes: list[ast.expr] = [ast.Subscript(copy.deepcopy(shape), ast.Constant(i), ast.Load()) for i in range(count)]
        call.args = [ast.copy_location(ast.Tuple(sizes, ast.Load()), shape)]
    return call
