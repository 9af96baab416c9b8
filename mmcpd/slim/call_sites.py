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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from dis import opmap, opname
from functools import lru_cache
from itertools import islice
from types import CellType, CodeType, FrameType, SimpleNamespace
from typing import Any

from torch import nn
from torch.autograd.function import FunctionCtx

from ..errors import SlimError
from ..fixes import CallSite, CodePlace
from .pickling import copy_methods
from .recompile import layers_of, rebuilt
from .replace_sizes import OUTCOME, put
from .size_functions import TORCH, called_by, callers_of, codes, definitions, functions_of

_OURS = ('mmcpd.comb.', 'mmcpd.slim.', 'mmcpd.modes.')
_CALLING = ('torch.nn.modules.module.',)  # which runs the forward of every module
_CACHE = opmap.get('CACHE', -1)  # what lies between an instruction and the next since Python 3.11
INFER = -1  # let torch work out the size
_NODES = (ast.Call, ast.BinOp, ast.AugAssign, ast.Subscript, ast.Compare)
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_ORIGINALS: dict[CodeType, CodeType] = {}  # of codes that stand in while a forward is observed
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
    """Return the place in the nearest caller outside this package; torch's own code, which cannot change, has none.

    Functions of torch that are written in Python, as `split`, stand between that caller and this package.
    """
    frames = _frames(sys._getframe(1))
    for frame in frames:
        if _of(frame, TORCH):
            if frame.f_code.co_name != 'handle_torch_function':
                return None
            next(frames, None)  # the function itself
            continue
        if not _of(frame, _OURS):
            # The module whose method runs in the nearest frame: no hook sees a call like `head.forward(x)`.
            module = next((module for f in _frames(frame) if (module := _module(f)) is not None), None)
            return Spot(module, _ORIGINALS.get(frame.f_code, frame.f_code), _instruction(frame), index, count)
    return None


@contextmanager
def standing_in(originals: Mapping[CodeType, CodeType]) -> Iterator[None]:
    """Let places in codes that stand in for others, by instructions alike, be named as places in these."""
    _ORIGINALS.update(originals)
    try:
        yield
    finally:
        for code in originals:
            _ORIGINALS.pop(code, None)


def code_place(path: str = '') -> tuple[nn.Module | None, CodePlace]:
    """Return the module whose method runs, and the instructions from that method inward to where this is called.

    Frames of torch's functions and of this package do not count: they differ from one kind of run to another.
    """
    inward: list[int] = []
    for frame in _frames(sys._getframe(1)):
        module = _module(frame)
        if module is not None and not _of(frame, _CALLING):
            return module, CodePlace(path, _qualified_name(frame.f_code), (_instruction(frame), *inward))
        if not _of(frame, TORCH) and not _of(frame, _OURS):
            inward.insert(0, _instruction(frame))
    return None, CodePlace(path, '', tuple(inward))


def _instruction(frame: FrameType) -> int:
    """Return where the instruction begins that a frame is at.

    While a function of Python is called, a frame of Python 3.12 is at the end of the call's inline cache, and while one
    of C is, at the call: what observes a run may stand in for the one by the other.
    """
    place, code = frame.f_lasti, frame.f_code.co_code
    while place > 0 and code[place] == _CACHE:
        place -= 2
    return place


def in_own_function() -> bool:
    """Say whether the forward of an `autograd.Function` runs, which has a backward of its own."""
    first = (frame.f_locals.get(next(iter(frame.f_code.co_varnames), '')) for frame in _frames(sys._getframe(1)))
    return any(isinstance(value, FunctionCtx) for value in first)


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    """Yield a frame and its callers; not who asks, which would hold itself, and all that runs, in memory."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _qualified_name(code: CodeType) -> str:
    if sys.version_info >= (3, 11):
        return code.co_qualname
    return f'{code.co_name}:{code.co_firstlineno}'  # the line tells a method from its namesake in a base class


def _of(frame: FrameType, packages: tuple[str, ...]) -> bool:
    return f'{frame.f_globals.get("__name__", "")}.'.startswith(packages)


def _module(frame: FrameType) -> nn.Module | None:
    return receiver(frame.f_code, frame.f_locals)


def receiver(code: CodeType, values: Mapping[str, Any]) -> nn.Module | None:
    """Return the module among the local variables of a function whose method it is, or is inside: mostly `self`."""
    module = values.get('self')
    if not isinstance(module, nn.Module) and code.co_argcount:
        module = values.get(code.co_varnames[0])
        kind: Any = type(module)
        if isinstance(module, nn.Module) and not _is_method(kind, code):
            return None
    return module if isinstance(module, nn.Module) else None


@lru_cache(maxsize=4096)
def _is_method(kind: type, code: CodeType) -> bool:
    values = ((name, value) for base in kind.__mro__ for name, value in vars(base).items())
    return any(getattr(layer, '__code__', None) is code for name, value in values for layer in layers_of(value, name))


# -- name --------------------------------------------------------------------------------------------------------------
def can_be_written(place: Spot | None) -> bool:
    """Say whether there is a place, and in source that slimming can change."""
    return place is not None and place.module is not None and call_site(place.module, '', place) is not None


def call_site(module: nn.Module, path: str, place: Spot, inferable: bool = False) -> CallSite | None:
    """Name a place by method and call text, or None where the code is no method of the module's class.

    A function that its methods call is like a method.
    """
    kind: Any = type(module)
    found = _named(kind, place.code, place.instruction, place.index, place.count)
    return found and replace(found, module=path, inferable=inferable)


@lru_cache(maxsize=4096)  # the blocks of a network share their source
def _named(kind: type, code: CodeType, instruction: int, index: int, count: int) -> CallSite | None:
    positions = source_range(code, instruction)
    for name, function in functions_of(kind).items():
        if name == '__init__' or code not in codes(function.__code__):  # nobody runs it again
            continue
        if any(isinstance(raw, classmethod) for _, raw in definitions(kind, name.rpartition('.')[2])):
            continue
        tree = parsed(function)
        for node in ast.walk(tree) if tree is not None else ():
            if not isinstance(node, _NODES):
                continue
            if positions in list(_ranges(node)):
                found = CallSite('', name, ast.unparse(node), index, count)
                may = put(copy.deepcopy(node), index, count, 1) and (index != OUTCOME or _runs_once(tree, node))
                return found if may else None
    return None


def _runs_once(tree: Any, node: ast.AST) -> bool:
    """Say whether a part of a method stands in it once, and in no loop, so that one run of it is one answer."""
    loops = (each for each in ast.walk(tree) if isinstance(each, _LOOPS))
    same = [each for each in ast.walk(tree) if type(each) is type(node) and ast.unparse(each) == ast.unparse(node)]
    return len(same) == 1 and not any(node in ast.walk(loop) for loop in loops)


def source_range(code: CodeType, instruction: int) -> tuple[int | None, ...]:
    """Return line, end line, column and end column of what an instruction runs, of those that are known."""
    if sys.version_info >= (3, 11):
        return next(islice(code.co_positions(), instruction // 2, None))
    from executing import Source

    line = next(line for start, end, line in code.co_lines() if start <= instruction < end)
    frame: Any = SimpleNamespace(f_code=code, f_lasti=instruction, f_lineno=line, f_globals={})
    found = Source.executing(frame)
    nodes = list(found.statements or ()) if opname[code.co_code[instruction]].startswith('INPLACE') else [found.node]
    return next(_ranges(nodes[0])) if len(nodes) == 1 and nodes[0] is not None else (line,)


def _ranges(node: Any) -> Iterator[tuple[int | None, ...]]:
    """Yield where byte code says that a node is; a method's call over several lines starts at the method's name."""
    yield node.lineno, node.end_lineno, node.col_offset, node.end_col_offset
    name = getattr(node, 'func', None)
    if isinstance(name, ast.Attribute) and name.end_lineno is not None and name.end_col_offset is not None:
        yield name.end_lineno, node.end_lineno, name.end_col_offset - len(name.attr), node.end_col_offset


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


class Replacing(ast.NodeTransformer):
    """Put other sizes into the source of one method; `done` are the rewrites whose place was found."""

    def __init__(self, rewrites: list[Rewrite]) -> None:
        self.rewrites, self.texts, self.done = rewrites, {r.text for r in rewrites}, set[Rewrite]()

    def generic_visit(self, node: ast.AST) -> ast.AST:
        text = ast.unparse(node) if isinstance(node, _NODES) else ''
        super().generic_visit(node)
        for rewrite in self.rewrites if text in self.texts else ():
            if rewrite.text == text and put(node, rewrite.index, rewrite.count, rewrite.number):
                self.done.add(rewrite)
        return node


def rewrite_(module: nn.Module, rewrites: Iterable[Rewrite]) -> None:
    """Replace sizes in the methods of one module, beside those that were replaced before; see `rewritten`."""
    module.__class__ = rewritten(type(module), rewrites)


def rewritten(kind: Any, rewrites: Iterable[Rewrite]) -> type:
    """Return a class like that of a module, with other sizes in its methods beside those that were replaced before.

    Raises:
        SlimError: if a call is not found (another release of the class), or asked to have two values.
    """
    wanted = list(dict.fromkeys(rewrites))
    by_place: dict[tuple[str, str, int, int], Rewrite] = {}
    for rewrite in wanted:
        if by_place.setdefault(rewrite.place, rewrite) != rewrite:
            raise SlimError(f'{kind.__name__}.{rewrite.method} runs {rewrite.text} with different sizes')
    if 'rewrites' in vars(kind):  # made by an earlier call
        by_place = {earlier.place: earlier for earlier in vars(kind)['rewrites']} | by_place
        wanted, kind = list(by_place.values()), kind.__bases__[0]
    changed = _changed(kind, wanted)
    own = {'__module__': kind.__module__, 'rewrites': wanted, **copy_methods(rewrite_, kind), **changed.pop(kind, {})}
    hiding = (type(base.__name__, (base,), {'rewrites': wanted, **methods}) for base, methods in changed.items())
    return type(kind.__name__, (kind, *hiding), own)


def _changed(kind: Any, rewrites: Sequence[Rewrite]) -> dict[Any, dict[str, Any]]:
    """Return the methods of a class with these sizes in them, or in copies of the functions that they call.

    They are those of a subclass of `kind`, and of subclasses of the classes, in their order, whose methods `super()`
    reaches: they stand right before these in the order of resolution.
    """
    called, functions = called_by(kind), functions_of(kind)
    names = sorted(callers_of(functions, [r.method for r in rewrites], called))
    copies = {name: CellType() for name in names if name in called}
    changed: dict[Any, dict[str, Any]] = {base: {} for base in kind.__mro__}
    for name in names:
        function: Any = functions.get(name)
        tree = parsed(function) if function is not None else None
        if tree is None or not isinstance(tree.body[0], _DEFINITIONS):
            raise SlimError(f'{kind.__name__}.{name} has no source of its own to put a size into')
        change = Replacing([r for r in rewrites if r.method == name])
        tree = ast.fix_missing_locations(change.visit(copy.deepcopy(tree)))
        missing = [r.text for r in change.rewrites if r not in change.done]
        if missing:
            raise SlimError(f'{kind.__name__}.{name} has no call {missing[0]}: another release of this class?')
        if name in called:
            copies[name].cell_contents = rebuilt(called[name], function.__name__, tree, copies)
            continue
        *behind, local = name.split('.')
        base, raw = definitions(kind, local)[len(behind)]
        changed[base if behind else kind][local] = rebuilt(raw, local, tree, copies)
    return {base: methods for base, methods in changed.items() if methods}


def rewrites_of(module: nn.Module) -> list[Rewrite]:
    """Return what `rewrite_` did to a module."""
    return list(getattr(type(module), 'rewrites', []))
