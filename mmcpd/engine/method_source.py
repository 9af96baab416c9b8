"""Write the methods of a slim model that hold other sizes than their author's as plain Python again."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import textwrap
from collections.abc import Sequence
from types import FunctionType
from typing import Any

from mmcpd.errors import SlimError
from mmcpd.slim.call_sites import Replacing, Rewrite, parsed
from mmcpd.slim.recompile import MangledNames
from mmcpd.slim.size_functions import called_by, callers_of, definitions, functions_of

INDENT = '    '


def subclass_source(kind: type, rewrites: Sequence[Rewrite], name: str) -> str:
    """Return the source of a function that returns a subclass of `kind` with these sizes in its methods.

    What the methods use of their own files is imported from there, so that their text stays as it is, but for
    `super()`, which says whose.

    Raises:
        SlimError: a method is made inside a function, or lies in a file that cannot be imported.

    Example:
        >>> print(subclass_source(nn.Flatten, [], 'flatten').splitlines()[0])
        def flatten():
    """
    functions, called = functions_of(kind), called_by(kind)
    names = sorted(callers_of(functions, [each.method for each in rewrites], called))
    imports: dict[str, str] = {'Dense': f'from {_home(kind)} import {kind.__name__} as Dense'}
    found: dict[str, Any] = {}
    outside: list[str] = []
    inside: dict[type, list[str]] = {base: [] for base in kind.__mro__}
    for each in names:
        function = functions[each]
        *behind, local = each.split('.')
        owner = None if each in called else definitions(kind, local)[len(behind)][0]
        tree = _changed(function, [r for r in rewrites if r.method == each], owner, kind)
        for used in sorted(_globals_of(tree, function) - set(called)):
            value = function.__globals__[used]
            if found.setdefault(used, value) is not value:
                raise SlimError(f'{kind.__name__}: {used} is one thing in one of its files and another in the next')
            imports[used] = f'from {_importable(function.__module__, kind)} import {used}'
        for used in sorted(_globals_of(tree, function) & set(called) - set(names)):
            imports[used] = f'from {_importable(function.__module__, kind)} import {used}'
        if owner is not None:
            alias = _alias(kind, owner)
            imports[alias] = f'from {_home(owner)} import {owner.__name__} as {alias}'
        (outside if owner is None else inside[owner if behind else kind]).append(ast.unparse(tree))
    hiding = [base for base in kind.__mro__[1:] if inside[base]]
    body = [*imports.values(), '', *(f'{text}\n' for text in outside)]
    body += [_class(f'Slim{_alias(kind, base)}', [_alias(kind, base)], inside[base]) for base in hiding]
    body.append(_class(kind.__name__, ['Dense', *(f'Slim{_alias(kind, base)}' for base in hiding)], inside[kind]))
    body.append(f'return {kind.__name__}')
    return f'def {name}():\n' + textwrap.indent('\n'.join(body), INDENT)


def _class(name: str, bases: Sequence[str], methods: Sequence[str]) -> str:
    inside = '\n\n'.join(methods) or 'pass'
    return f'class {name}({", ".join(bases)}):\n{textwrap.indent(inside, INDENT)}\n'


def _alias(kind: type, owner: type) -> str:
    """Return a name for a class that `kind` stems from; two of them may have the same."""
    return f'Of{owner.__name__}{kind.__mro__.index(owner) or ""}'


def _home(kind: type) -> str:
    """Return the module that a class can be imported from by its name."""
    module = _importable(kind.__module__, kind)
    if getattr(importlib.import_module(module), kind.__name__, None) is not kind:
        raise SlimError(f'{module} has no class {kind.__qualname__} at its top level: its methods cannot be written')
    return module


def _importable(module: str, kind: type) -> str:
    if module == '__main__' or module.partition('.')[0] == 'mmcpd':
        raise SlimError(f'{kind.__name__} is written in {module}, which plain code cannot import: move it to a package')
    return module


def _changed(function: FunctionType, rewrites: list[Rewrite], owner: type | None, kind: type) -> ast.stmt:
    """Return the definition of a function with the sizes in it; names of its class are spelled out."""
    free = set(function.__code__.co_freevars) - {'__class__'}
    tree = parsed(function)
    if tree is None or free:
        why = f'it uses {min(free)} of the function around it' if free else 'it has no source'
        raise SlimError(f'{function.__qualname__} cannot be written as plain code: {why}')
    changed = Replacing(rewrites).visit(copy.deepcopy(tree))
    definition: ast.stmt = changed.body[0]
    if owner is not None:
        definition = _Spelled(_alias(kind, owner)).visit(MangledNames(owner.__name__.lstrip('_')).visit(definition))
    return ast.fix_missing_locations(definition)


class _Spelled(ast.NodeTransformer):
    """Write `super()` and `__class__` so that they mean what they mean in the author's class."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        arguments = [*node.args.posonlyargs, *node.args.args]
        self.first = arguments[0].arg if arguments else 'self'
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == 'super' and not node.args:
            node.args = [ast.Name(self.owner, ast.Load()), ast.Name(self.first, ast.Load())]
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self.owner, node.ctx) if node.id == '__class__' else node


def _globals_of(definition: ast.stmt, function: FunctionType) -> set[str]:
    """Return the names of its file that a definition uses, its decorators and defaults included."""
    names = {node.id for node in ast.walk(definition) if isinstance(node, ast.Name)}
    return {name for name in names if name in function.__globals__ and not hasattr(builtins, name)}
