"""Freeze the tensors that a forward makes anew for another input: tables of positions, kept until the size changes.

What makes them is not observed where the example has the size that they are for, and makes them as wide as before.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

import numpy as np
from torch import Tensor, nn

from .atoms import AtomTable

REASON = "{} makes it anew for another size of the input, as wide as before; if it never will, say `unused='leave'`"


def freeze_renewed_(model: nn.Module, table: AtomTable) -> None:
    """Freeze what is read from buffers, and from tensors that are plain attributes, which a forward may replace."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        held = {name for name, value in {**vars(module), **module._buffers}.items() if isinstance(value, Tensor)}
        renewed = renewed_by(module.__class__) if held else {}
        found |= {f'{path}.{name}'.lstrip('.'): renewed[name] for name in held & renewed.keys()}
    for row in table.rows:
        if row.tensor in found:
            table.freeze(np.arange(row.start, row.start + row.size), REASON.format(found[row.tensor]))


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
    waiting, seen = ['forward'], {'forward'}
    while waiting:
        name = waiting.pop()
        if (tree := _method(kind, name)) is None or not tree.args.args:
            continue
        own = tree.args.args[0].arg
        for attribute, values in _assignments(tree, own):
            if not any(attribute == _attribute(node, own) for value in values for node in ast.walk(value)):
                found.setdefault(attribute, f'{kind.__name__}.{name}')
        called = {_attribute(node.func, own) for node in ast.walk(tree) if isinstance(node, ast.Call)} - {None}
        waiting += sorted(str(method) for method in called - seen)
        seen |= {str(method) for method in called}
    return found


def _method(kind: type[nn.Module], name: str) -> ast.FunctionDef | None:
    method = getattr(kind, name, None)
    if method is None or str(getattr(method, '__module__', '')).startswith('torch.'):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


def _assignments(tree: ast.FunctionDef, own: str) -> Iterator[tuple[str, list[ast.expr]]]:
    """Return the attributes of `own` that a method assigns, each with what they are made of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            stored = [each for target in node.targets for each in ast.walk(target) if _is_stored(each)]
            yield from ((name, [node.value]) for each in stored if (name := _attribute(each, own)) is not None)
        elif isinstance(node, ast.Call) and _attribute(node.func, own) == 'register_buffer':
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            yield from ((v.value, values) for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str))


def _attribute(node: ast.AST, own: str) -> str | None:
    """Return the name of an attribute of `own`, or None for anything else."""
    of_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == own
    return node.attr if isinstance(node, ast.Attribute) and of_own else None


def _is_stored(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
