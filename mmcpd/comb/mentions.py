"""What the code of a model's own classes mentions: attributes, methods and functions by name, without running it.

An integer of C (`range(layer.out_channels)`) leaves no trace while a model is observed, and a branch that only training
takes does not run. A name that stands in the code says that it may matter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn
from torch.utils import checkpoint

from ..slim.call_sites import functions_of
from ..slim.size_functions import codes

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
    for name, function in functions_of(kind).items():
        for code in codes(function.__code__) if name not in _NEVER else ():
            found.update(code.co_names)
            if any(function.__globals__.get(each) is checkpoint.checkpoint for each in code.co_names):
                found.add(checkpoint.checkpoint.__name__)  # under another name
    return frozenset(found)


def mentioned(model: nn.Module, matches: Callable[[str], bool]) -> bool:
    """Say whether the code of a class in a model mentions such a name; layers that drop activations are left out.

    Example:
        >>> mentioned(nn.Linear(2, 2), lambda name: name == 'out_features')
        False
    """
    kinds: set[Any] = {type(module) for module in model.modules()}
    return any(map(matches, (name for kind in kinds if 'drop' not in kind.__name__.lower() for name in names_in(kind))))
