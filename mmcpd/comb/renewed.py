"""Freeze the tensors that a forward makes anew for another input: tables of positions, kept until the size changes.

What makes them is not observed where the example has the size that they are for, and makes them as wide as before.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache

import numpy as np
from torch import nn

from .atoms import AtomTable

FACTS = ('device', 'dtype')
RENEWED = "{} makes it anew for another size of the input, as wide as before; if it never will, say `unused='leave'`"


def freeze_renewed_(model: nn.Module, table: AtomTable) -> None:
    """Freeze what is read from buffers that a forward may replace."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        held = {name for name, value in module._buffers.items() if value is not None}
        renewed = renewed_by(module.__class__) if held else {}
        found |= {f'{path}.{name}'.lstrip('.'): renewed[name] for name in held & renewed.keys()}
    for row in table.rows:
        if row.tensor in found:
            table.freeze(np.arange(row.start, row.start + row.size), RENEWED.format(found[row.tensor]))


@cache
def renewed_by(kind: type) -> dict[str, str]:
    """Return the attributes that a forward, or a method that it calls, assigns, each with the name of that method.

    What is computed from its own value, as a running average is, follows the widths and is left out.

    Example:
        >>> class Positions(nn.Module):
        ...     def forward(self, x):
        ...         if self.table.shape[0] < len(x):
        ...             self.table = torch.zeros(len(x), 8)
        ...         return x + self.table[: len(x)]
        >>> renewed_by(Positions)
        {'table': 'Positions.forward'}
    """
    found: dict[str, str] = {}
    waiting = [(kind, 'forward')]  # the first class to look into, and the name of a method
    seen = set(waiting)
    while waiting:
        start, name = waiting.pop()
        owner, tree = _method(kind, start, name)
        if tree is None or not tree.args.args:
            continue
        own = tree.args.args[0].arg
        for attribute, values in _assignments(tree, own):
            if not any(_computed_from(value, attribute, own, locals_of(tree)) for value in values):
                found.setdefault(attribute, f'{owner.__name__}.{name}')
        functions = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        called = {(kind, method) for node in functions if (method := _attribute(node, own)) is not None}
        parent = kind.__mro__[kind.__mro__.index(owner) + 1]
        called |= {(parent, node.attr) for node in functions if isinstance(node, ast.Attribute) and _of_super(node)}
        waiting += sorted(called - seen, key=lambda each: each[1])
        seen |= called
    return found


def locals_of(tree: ast.FunctionDef) -> dict[str, list[ast.expr]]:
    """Return what the local names of a function are assigned."""
    found: dict[str, list[ast.expr]] = {}
    for node in (node for node in ast.walk(tree) if isinstance(node, ast.Assign)):
        for name in (name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)):
            found.setdefault(name.id, []).append(node.value)
    return found


def _computed_from(value: ast.expr, attribute: str, own: str, names: Mapping[str, list[ast.expr]]) -> bool:
    """Say whether a value is computed from an attribute's own, through local names too, not from its type or device."""
    waiting, seen = [value], set[str]()
    while waiting:
        nodes = list(ast.walk(waiting.pop()))
        facts = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in FACTS}
        for call in (node for node in nodes if isinstance(node, ast.Call)):
            like = isinstance(call.func, ast.Attribute) and call.func.attr in ('to', 'type_as')
            facts |= {id(each) for each in call.args if like}
        if any(_attribute(node, own) == attribute and id(node) not in facts for node in nodes):
            return True
        new = {node.id for node in nodes if isinstance(node, ast.Name)} - seen
        seen |= new
        waiting += [each for name in sorted(new) for each in names.get(name, ())]
    return False


def _method(kind: type[nn.Module], start: type, name: str) -> tuple[type, ast.FunctionDef | None]:
    """Return the first class that has a method, from `start` on in the order of `kind`, and the method's code."""
    owner = next((each for each in kind.__mro__[kind.__mro__.index(start) :] if name in vars(each)), object)
    if owner is object or owner.__module__.startswith('torch.'):
        return owner, None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(vars(owner)[name])))).body[0]
    except (OSError, TypeError, SyntaxError):
        return owner, None
    return owner, tree if isinstance(tree, ast.FunctionDef) else None


def _assignments(tree: ast.FunctionDef, own: str) -> Iterator[tuple[str, list[ast.expr]]]:
    """Return the attributes of `own` that a method assigns, each with what they are made of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and (value := node.value) is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            stored = [each for target in targets for each in ast.walk(target) if _is_stored(each)]
            yield from ((name, [value]) for each in stored if (name := _attribute(each, own)) is not None)
        elif isinstance(node, ast.Call) and _attribute(node.func, own) == 'register_buffer':
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from ((v.value, values) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


def _attribute(node: ast.AST, own: str) -> str | None:
    """Return the name of an attribute of `own`, or None for anything else."""
    of_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
    return node.attr if isinstance(node, ast.Attribute) and of_own else None


def _of_super(node: ast.Attribute) -> bool:
    """Say whether a node is an attribute of `super()`."""
    call = node.value.func if isinstance(node.value, ast.Call) else None
    return isinstance(call, ast.Name) and call.id == 'super'


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
