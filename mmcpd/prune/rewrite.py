"""Put numbers where a forward asks for sizes that no attribute holds, or computes with a width (see `comb.source`).

The module's class becomes a subclass with the same name, whose method is compiled from the same source with the one
size replaced. Only numbers are ever written: a structure from a stranger can change no code.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..comb.errors import SlimError
from ..comb.source import NODES, methods, parsed, put

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef)  # a lambda has no name to be compiled under
Rewrite = tuple[str, str, int, int, int]  # method, text, index, count (see `comb.source.Site`), number


class _Replace(ast.NodeTransformer):
    def __init__(self, rewrites: list[Rewrite]) -> None:
        self.rewrites, self.texts, self.done = rewrites, {r[1] for r in rewrites}, set[Rewrite]()

    def generic_visit(self, node: ast.AST) -> ast.AST:
        text = ast.unparse(node) if isinstance(node, NODES) else ''
        super().generic_visit(node)
        for rewrite in self.rewrites if text in self.texts else ():
            _, call, index, count, value = rewrite
            if call == text and put(node, index, count, value):
                self.done.add(rewrite)
        return node


def rewrite_(module: nn.Module, rewrites: Iterable[Rewrite]) -> None:
    """Replace sizes in the methods of one module, beside those that were replaced before.

    Raises:
        SlimError: if a call is not found (another release of the module's class), or asked to have two values.
    """
    wanted = list(dict.fromkeys(rewrites))
    kind = type(module)
    values: dict[tuple[Any, ...], int] = {}
    for *place, value in wanted:
        if values.setdefault(tuple(place), value) != value:
            raise SlimError(f'{kind.__name__}.{place[0]} runs {place[1]} with different sizes')
    if 'rewrites' in vars(kind):  # made by an earlier call
        values = {tuple(place): value for *place, value in kind.rewrites} | values  # type: ignore[attr-defined]
        wanted, kind = [(*place, value) for place, value in values.items()], kind.__bases__[0]
    functions = dict(methods(kind))
    changed: dict[str, Any] = {}
    for name in dict.fromkeys(r[0] for r in wanted):
        mine = [r for r in wanted if r[0] == name]
        function = functions.get(name)
        tree = parsed(function) if function is not None else None
        if (
            function is None
            or tree is None
            or function.__code__.co_freevars
            or not isinstance(tree.body[0], DEFINITIONS)
        ):
            raise SlimError(f'{kind.__name__}.{name} has no source of its own to put a size into')
        replace = _Replace(mine)
        tree = ast.fix_missing_locations(replace.visit(copy.deepcopy(tree)))
        missing = [r[1] for r in mine if r not in replace.done]
        if missing:
            raise SlimError(f'{kind.__name__}.{name} has no call {missing[0]}: another release of this class?')
        changed[name] = _compile(tree, function)
    module.__class__ = type(kind.__name__, (kind,), {'__module__': kind.__module__, 'rewrites': wanted, **changed})


def _compile(tree: ast.Module, function: Any) -> Any:
    """Compile a method, its decorators included."""
    space: dict[str, Any] = {}
    try:
        exec(compile(tree, inspect.getfile(function), 'exec'), function.__globals__, space)
    except NameError as error:
        raise SlimError(f'a decorator of {function.__qualname__} is not found in its module: {error}') from error
    return space[function.__name__]


def rewrites_of(module: nn.Module) -> list[Rewrite]:
    """Return what `rewrite_` did to a module."""
    return list(getattr(type(module), 'rewrites', []))
