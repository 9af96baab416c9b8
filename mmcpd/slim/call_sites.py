"""Find, name and change a size in the source of a forward, and name where a statistic is taken.

`x.reshape(B, N, 3, self.num_heads, C // self.num_heads)` divides the *embedding's* width by the heads. Once both are
pruned, no value of any attribute makes that the width of a head, but -1 in its place does, or a number where the call
has a -1 already. A `CallSite` names that place by the text of the call, so that it is found again in another release as
long as the line is the same.

The module's class becomes a subclass with the same name, whose method is compiled from the same source with the one
size replaced. Only numbers are ever written: an untrusted structure can change no code.
"""

from __future__ import annotations

import ast
import copy
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.autograd.function import FunctionCtx

from ..errors import SlimError
from ..fixes import CallSite, CodePlace
from .pickling import copy_methods

_OURS, _TORCH = ('mmcpd.comb.', 'mmcpd.slim.'), ('torch.',)
LEFT, RIGHT = -1, -2  # which operand
SCALE = -3  # of an attention: the number is the width whose square root it divides by
INFER = -1  # let torch work out the size
_NODES = (ast.Call, ast.BinOp, ast.AugAssign)
_DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)  # a lambda has no name to be compiled under


# -- find --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Spot:
    """Where a running forward is: the module, the code, its instruction, and what is meant there, as in `CallSite`."""

    module: nn.Module | None
    code: CodeType
    instruction: int
    index: int
    count: int


def spot(index: int, count: int) -> Spot | None:
    """Return the place in the nearest caller outside this package; torch's own code, which cannot change, has none."""
    for frame in _frames():
        if _of(frame, _TORCH):
            return None
        if not _of(frame, _OURS):
            # The module whose method runs in the nearest frame: no hook sees a call like `head.forward(x)`.
            module = next((module for f in _frames(frame) if (module := _module(f)) is not None), None)
            return Spot(module, frame.f_code, frame.f_lasti, index, count)
    return None


def code_place(path: str = '') -> tuple[nn.Module | None, CodePlace]:
    """Return the module whose method runs, and the instructions from that method inward to where this is called.

    Frames of torch's functions and of this package do not count: they differ from one kind of run to another.
    """
    inward: list[int] = []
    for frame in _frames():
        module = _module(frame)
        if module is not None:
            return module, CodePlace(path, frame.f_code.co_qualname, (frame.f_lasti, *inward))
        if not _of(frame, _TORCH) and not _of(frame, _OURS):
            inward.insert(0, frame.f_lasti)
    return None, CodePlace(path, '', tuple(inward))


def in_own_function() -> bool:
    """Say whether the forward of an `autograd.Function` runs, which has a backward of its own."""
    first = (frame.f_locals.get(next(iter(frame.f_code.co_varnames), '')) for frame in _frames())
    return any(isinstance(value, FunctionCtx) for value in first)


def _frames(frame: FrameType | None = None) -> Iterator[FrameType]:
    frame = frame or sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _of(frame: FrameType, packages: tuple[str, ...]) -> bool:
    return f'{frame.f_globals.get("__name__", "")}.'.startswith(packages)


def _module(frame: FrameType) -> nn.Module | None:
    module = frame.f_locals.get('self')
    return module if isinstance(module, nn.Module) else None


# -- name --------------------------------------------------------------------------------------------------------------
def call_site(module: nn.Module, path: str, place: Spot, inferable: bool = False) -> CallSite | None:
    """Name a place by method and call text, or None where the code is not a method of the module's class."""
    positions = list(place.code.co_positions())[place.instruction // 2]
    for name, function in _methods(type(module)):
        if place.code not in _codes(function.__code__):
            continue
        tree = _parsed(function)
        for node in ast.walk(tree) if tree is not None else ():
            if not isinstance(node, _NODES):
                continue
            if (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == tuple(positions):
                found = CallSite(path, name, ast.unparse(node), place.index, place.count, inferable)
                return found if _put(copy.deepcopy(node), place.index, place.count, 1) else None
    return None


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the plain methods and static methods of a class, as its instances find them, without their decorators."""
    for name in dir(kind):
        raw = inspect.getattr_static(kind, name)
        function = inspect.unwrap(raw.__func__ if isinstance(raw, staticmethod) else raw)
        if inspect.isfunction(function) and not (function.__module__ or '').startswith(_TORCH):
            yield name, function


def _codes(code: CodeType) -> set[CodeType]:
    inner = {c for const in code.co_consts if isinstance(const, CodeType) for c in _codes(const)}
    return {code} | inner


@lru_cache(maxsize=256)
def _parsed(function: Any) -> ast.Module | None:
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


# -- change ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Rewrite:
    """A number in place of one size of a call, or of one operand; the fields are those of `CallSite`."""

    method: str
    text: str
    index: int
    count: int
    number: int

    @property
    def place(self) -> tuple[str, str, int, int]:
        return self.method, self.text, self.index, self.count


class _Replace(ast.NodeTransformer):
    def __init__(self, rewrites: list[Rewrite]) -> None:
        self.rewrites, self.texts, self.done = rewrites, {r.text for r in rewrites}, set[Rewrite]()

    def generic_visit(self, node: ast.AST) -> ast.AST:
        text = ast.unparse(node) if isinstance(node, _NODES) else ''
        super().generic_visit(node)
        for rewrite in self.rewrites if text in self.texts else ():
            if rewrite.text == text and _put(node, rewrite.index, rewrite.count, rewrite.number):
                self.done.add(rewrite)
        return node


def rewrite_(module: nn.Module, rewrites: Iterable[Rewrite]) -> None:
    """Replace sizes in the methods of one module, beside those that were replaced before.

    Raises:
        SlimError: if a call is not found (another release of the module's class), or asked to have two values.
    """
    wanted = list(dict.fromkeys(rewrites))
    kind = type(module)
    by_place: dict[tuple[str, str, int, int], Rewrite] = {}
    for rewrite in wanted:
        if by_place.setdefault(rewrite.place, rewrite) != rewrite:
            raise SlimError(f'{kind.__name__}.{rewrite.method} runs {rewrite.text} with different sizes')
    if 'rewrites' in vars(kind):  # made by an earlier call
        by_place = {earlier.place: earlier for earlier in rewrites_of(module)} | by_place
        wanted, kind = list(by_place.values()), kind.__bases__[0]
    functions = dict(_methods(kind))
    changed: dict[str, Any] = {}
    for name in dict.fromkeys(r.method for r in wanted):
        function: Any = functions.get(name)
        tree = _parsed(function) if function is not None else None
        if tree is None or function.__code__.co_freevars or not isinstance(tree.body[0], _DEFINITIONS):
            raise SlimError(f'{kind.__name__}.{name} has no source of its own to put a size into')
        replace = _Replace([r for r in wanted if r.method == name])
        tree = ast.fix_missing_locations(replace.visit(copy.deepcopy(tree)))
        missing = [r.text for r in replace.rewrites if r not in replace.done]
        if missing:
            raise SlimError(f'{kind.__name__}.{name} has no call {missing[0]}: another release of this class?')
        changed[name] = _compile(tree, function)
    own = {'__module__': kind.__module__, 'rewrites': wanted, **copy_methods(rewrite_, kind), **changed}
    module.__class__ = type(kind.__name__, (kind,), own)


def rewrites_of(module: nn.Module) -> list[Rewrite]:
    """Return what `rewrite_` did to a module."""
    return list(getattr(type(module), 'rewrites', []))


def _compile(tree: ast.Module, function: Any) -> Any:
    """Compile a method, its decorators included."""
    space: dict[str, Any] = {}
    try:
        exec(compile(tree, inspect.getfile(function), 'exec'), function.__globals__, space)
    except NameError as error:
        raise SlimError(f'a decorator of {function.__qualname__} is not found in its module: {error}') from error
    return space[function.__name__]


def _put(node: ast.AST, index: int, count: int, number: int) -> bool:
    """Write a number in place of one size, or of one operand, of a call or an arithmetic expression, in place.

    Returns:
        Whether the place was found.

    Understands `x.view(a, b)`, `x.view((a, b))`, `torch.reshape(x, (a, b))`, `x.view(a, *rest)` where the size is not
    one of the starred, and `x.view(shape)`; `d ** -0.5`, `x / d`, `x /= d`, `math.sqrt(d)`, `torch.tensor(d)`.
    """
    new = ast.UnaryOp(ast.USub(), ast.Constant(-number)) if number < 0 else ast.Constant(number)
    if index == SCALE:
        return _put_scale(node, new)
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


def _put_scale(node: ast.AST, width: ast.expr) -> bool:
    """Let an attention that takes `scale` divide by the square root of this width."""
    if not isinstance(node, ast.Call) or any(keyword.arg is None for keyword in node.keywords):
        return False  # `**options` may have it
    value = ast.BinOp(width, ast.Pow(), ast.UnaryOp(ast.USub(), ast.Constant(0.5)))
    node.keywords = [*(k for k in node.keywords if k.arg != 'scale'), ast.keyword('scale', value)]
    return True


def _put_operand(node: ast.AST, side: int, new: ast.expr) -> bool:
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
