"""Say which parts of a module its forward runs, where it runs the same ones for every input."""

from __future__ import annotations

import ast
import inspect
import textwrap

from torch import Tensor, nn

# What may run other code for another input, or hide what runs.
BRANCHES = (
    ast.If, ast.IfExp, ast.BoolOp, ast.For, ast.While, ast.Try, ast.With, ast.Match, ast.comprehension, ast.Lambda,
    ast.FunctionDef, ast.AsyncFunctionDef, ast.Yield, ast.YieldFrom,
)  # fmt: skip
HIDING = {'super', 'getattr', 'vars', 'locals', 'eval', 'exec'}


def straight_parts(module: nn.Module) -> set[str] | None:
    """Return the attributes that a forward without branches uses, or None where it has any, or calls own methods.

    Example:
        >>> straight_parts(nn.Sequential(nn.ReLU())) is None    # it loops over its parts
        True
    """
    if 'forward' in vars(module):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(type(module).forward))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or not tree.args.args:
        return None
    nodes = [node for statement in tree.body for node in ast.walk(statement)]
    own = tree.args.args[0].arg
    names = [node for node in nodes if isinstance(node, ast.Name)]
    used = [
        n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == own
    ]
    if len(used) < sum(name.id == own for name in names):  # it is handed over
        return None
    hidden = any(isinstance(node, BRANCHES) for node in nodes) or any(name.id in HIDING for name in names)
    plain = all(_is_plain(getattr(module, name, None), name in dir(type(module))) for name in used)
    return set(used) if plain and not hidden else None


def _is_plain(value: object, of_class: bool) -> bool:
    """Say whether an attribute is a part or a value, not code that may run other parts."""
    return isinstance(value, nn.Module | Tensor) or (not of_class and not callable(value))
