"""What the code of a model's own classes mentions, and which functions its modules hold, without running anything.

An integer of C (`range(layer.out_channels)`) leaves no trace while a model is observed, and a branch that only training
takes does not run. A name that stands in the code says that it may matter.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import lru_cache, partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.utils import checkpoint

from ..modes import drops
from ..slim.attention import replacement
from ..slim.methods import hooks_of
from ..slim.recompile import content
from ..slim.size_functions import codes, functions_of

# What runs before a model does, or describes it.
_NEVER = ('__init__', '__repr__', 'extra_repr', 'init_weights', 'reset_parameters', 'from_pretrained')


@lru_cache(maxsize=1024)
def names_in(kind: Any) -> frozenset[str]:
    """Return the names that the methods of a class, torch's left out, and the functions that they call mention.

    Example:
        >>> class Scaled(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x) * self.out_features**-0.5
        >>> sorted(names_in(Scaled))
        ['forward', 'out_features', 'super']
    """
    found: set[str] = set()
    properties = (value for base in kind.__mro__ for value in vars(base).values())
    getters = (getattr(each, 'fget', None) or getattr(each, 'func', None) for each in properties)
    own = [
        each for each in getters if isinstance(each, FunctionType) and not (each.__module__ or '').startswith('torch.')
    ]
    for name, function in [*functions_of(kind).items(), *((each.__name__, each) for each in own)]:
        for code in codes(function.__code__) if name not in _NEVER else ():
            found.update(code.co_names)
            if any(function.__globals__.get(each) is checkpoint.checkpoint for each in code.co_names):
                found.add(checkpoint.checkpoint.__name__)  # under another name
    return frozenset(found)


def mentioned(model: nn.Module, matches: Callable[[str], bool]) -> bool:
    """Say whether the code of a class in a model mentions such a name; those that drop activations are left out.

    Example:
        >>> mentioned(nn.Linear(2, 2), lambda name: name == 'out_features')
        False
    """
    kinds: set[Any] = {type(module) for module in model.modules() if not drops(module)}
    return any(map(matches, (name for kind in kinds for name in names_in(kind))))


def is_special(module: nn.Module) -> bool:
    """Say whether a module is replaced when it is cut, or holds a function or a reference that reaches a module."""
    held = vars(module)
    return bool(replacement(module)) or 'forward' in held or any(map(_reaches, (*held.values(), *hooks_of(module))))


def _reaches(value: object, depth: int = 5) -> bool:
    """Say whether a function or a reference leads to a module, which is another one than a copy's."""
    if not depth:
        return True
    if isinstance(value, weakref.ref):
        return isinstance(value(), nn.Module)
    if isinstance(value, MethodType):
        parts: tuple[object, ...] = (value.__self__, value.__func__)
    elif isinstance(value, partial):
        parts = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        parts = tuple(map(content, value.__closure__ or ()))
    else:
        return False
    return any(isinstance(part, nn.Module) or _reaches(part, depth - 1) for part in parts)
