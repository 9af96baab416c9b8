"""Find the function that a class's method runs behind its decorators, and put another code in its place.

Nothing is executed: the decorators' own functions are copied with the new function in the cell that held the old one.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Mapping
from types import CellType, CodeType, FunctionType, MappingProxyType
from typing import Any

from ..errors import SlimError


def layers_of(raw: Any, name: str) -> list[Any]:
    """Return what a method is made of, from its outermost decorator inward; the last is what its author wrote."""
    layers = [raw.__func__ if isinstance(raw, staticmethod) else raw]
    while (inner := _inner(layers[-1], name)) is not None and not any(inner is layer for layer in layers):
        layers.append(inner)
    return layers


def _inner(function: Any, name: str) -> Any:
    """Return what a decorator's function calls: it says so, or holds a function of that name."""
    wrapped = getattr(function, '__wrapped__', None)
    if wrapped is not None:
        return wrapped
    cells = getattr(function, '__closure__', None) or ()
    if not inspect.isfunction(function) or function.__code__.co_name == name:
        return None
    held = [content(cell) for cell in cells]
    return next((each for each in held if inspect.isfunction(each) and each.__name__ == name), None)


def content(cell: CellType) -> Any:
    """Return what a cell of a closure holds, or None where nothing is in it yet."""
    try:
        return cell.cell_contents
    except ValueError:  # it is empty until its name is bound
        return None


def rebuilt(raw: Any, name: str, tree: ast.Module, others: Mapping[str, CellType] = MappingProxyType({})) -> Any:
    """Return a method with the code of a syntax tree in place of its author's, behind the same decorators.

    `others` hold functions of which the new code calls these copies, by name.

    Raises:
        SlimError: if a decorator keeps the function elsewhere than in its closure.
    """
    layers = layers_of(raw, name)
    new = _with_code(layers[-1], _code(tree, layers[-1], others), others)
    for outer, old in zip(layers[-2::-1], layers[:0:-1], strict=True):
        cells = getattr(outer, '__closure__', None) or ()
        if not inspect.isfunction(outer) or not any(content(cell) is old for cell in cells):
            raise SlimError(f'a decorator of {layers[-1].__qualname__} does not hold it in its closure')
        closure = tuple(CellType(new) if content(cell) is old else cell for cell in cells)
        new = _copied(outer, outer.__code__, closure, new)
    return staticmethod(new) if isinstance(raw, staticmethod) else new


def _with_code(function: FunctionType, code: CodeType, others: Mapping[str, CellType]) -> FunctionType:
    """Return a function with other code, which uses the same names of enclosing functions or fewer, and `others`."""
    cells = {**dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)), **others}
    return _copied(function, code, tuple(cells[name] for name in code.co_freevars))


def _copied(
    function: FunctionType, code: CodeType, closure: tuple[CellType, ...], wrapped: FunctionType | None = None
) -> FunctionType:
    new = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
    new.__kwdefaults__, new.__doc__ = function.__kwdefaults__, function.__doc__
    new.__qualname__, new.__module__ = function.__qualname__, function.__module__
    new.__dict__.update(vars(function))
    if '__wrapped__' in new.__dict__ and wrapped is not None:
        new.__wrapped__ = wrapped  # type: ignore[attr-defined]
    return new


def _code(tree: ast.Module, function: FunctionType, others: Iterable[str]) -> CodeType:
    """Compile the definition in a tree as one inside a function that has the names it takes from outside."""
    definition: Any = tree.body[0]
    owner = function.__qualname__.rpartition('.')[0].rpartition('.')[2].lstrip('_')
    definition = MangledNames(owner).visit(definition)
    definition.decorator_list = []
    names = dict.fromkeys((*function.__code__.co_freevars, *others))
    outside = ast.parse(f'def outside({", ".join(names)}):\n    pass')
    outside.body[0].body = [definition]  # type: ignore[attr-defined]
    compiled = compile(ast.fix_missing_locations(outside), inspect.getfile(function), 'exec')
    inside = next(const for const in compiled.co_consts if isinstance(const, CodeType))
    codes = (const for const in inside.co_consts if isinstance(const, CodeType))
    code = next(const for const in codes if const.co_name == definition.name)
    if sys.version_info >= (3, 11):
        return code.replace(co_qualname=function.__code__.co_qualname)
    return code


class MangledNames(ast.NodeTransformer):
    """Write private names as they are inside a class: `self.__width` is `self._Block__width`."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def _name(self, name: str) -> str:
        private = self.owner and name.startswith('__') and not name.endswith('__')
        return f'_{self.owner}{name}' if private else name

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        node.attr = self._name(node.attr)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self._name(node.id)
        return node
