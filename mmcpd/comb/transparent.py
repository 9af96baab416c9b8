"""Let `int(width)` stay a width while a forward is observed.

Python makes a plain number of it, which then is written where it stands. One line that takes it of two widths can hold
no number, and needs none: on a slim model it says the slim widths by itself.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from threading import RLock
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from ..slim.call_sites import parsed, standing_in
from ..slim.size_functions import codes, functions_of
from .record import Record
from .traced_int import TracedInt

NAME = '_mmcpd_int'  # stands for `int` in the functions of a model
_FUNCTIONS = RLock()  # one run at a time has them changed


class _Kind(type):
    """What `int` is used for beside calling it stays the same."""

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], TracedInt) and args[0].run is not None:
            return args[0] if args[0].run.policy.transparent else int(args[0])  # another thread's run may be plain
        return int(*args, **options)


class Whole(int, metaclass=_Kind):
    """Stands for `int`, and gives a size back as it is.

    Example:
        >>> Whole('12'), isinstance(3, Whole), type(Whole(3.7))
        (12, True, <class 'int'>)
    """


def several(record: Record) -> frozenset[CodeType]:
    """Return the code of the lines that made several numbers of sizes."""
    return frozenset(code for (_, code, _), made in record.casts.items() if len(made) > 1)


@contextmanager
def transparent_ints(model: nn.Module, changed: Set[CodeType]) -> Iterator[None]:
    """Let methods of a model's modules, and functions that they call, use `Whole` in the place of `int`.

    These are the functions with any of the given codes in them.
    """
    kinds = {type(module) for module in model.modules()}
    found: dict[int, FunctionType] = {id(f): f for kind in kinds for f in functions_of(kind).values()}
    own = (f for f in found.values() if 'int' not in f.__globals__)  # the one of Python, by no other name
    functions = [f for f in own if codes(f.__code__) & changed and _only_called(f)]
    with _FUNCTIONS, ExitStack() as stack:
        for function in functions:
            stack.enter_context(_with(function))
        yield


def _only_called(function: FunctionType) -> bool:
    """Say whether all that a function does with `int` is to call it, to map it and to ask for instances.

    An attribute of that name, as in `x.int()`, is the same name in byte code.
    """
    tree = parsed(function)
    known: set[ast.AST] = set()
    for node in ast.walk(tree) if tree is not None else ():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            known.add(node.func)
            if node.func.id == 'map':
                known.update(node.args[:1])
            if node.func.id == 'isinstance':
                known.update(ast.walk(node.args[-1]))  # a class, or several
        for part in (getattr(node, 'annotation', None), getattr(node, 'returns', None)):
            known.update(ast.walk(part) if part is not None else ())
    every = list(ast.walk(tree)) if tree is not None else []
    names = [node for node in every if isinstance(node, ast.Name) and node.id == 'int']
    attribute = any(isinstance(node, ast.Attribute) and node.attr == 'int' for node in every)
    return bool(names) and known.issuperset(names) and not attribute


@contextmanager
def _with(function: FunctionType) -> Iterator[None]:
    before, originals = function.__code__, dict[CodeType, CodeType]()
    first = NAME not in function.__globals__
    function.__globals__[NAME] = Whole
    try:
        function.__code__ = _renamed(before, originals)
        with standing_in(originals):
            yield
    finally:
        function.__code__ = before
        if first:
            del function.__globals__[NAME]


def _renamed(code: CodeType, originals: dict[CodeType, CodeType]) -> CodeType:
    """Return a code that calls `Whole` by its name where this one calls `int`, also in the functions inside."""
    constants = tuple(_renamed(each, originals) if isinstance(each, CodeType) else each for each in code.co_consts)
    names = tuple(NAME if name == 'int' else name for name in code.co_names)
    new = code.replace(co_names=names, co_consts=constants)
    originals[new] = code
    return new
