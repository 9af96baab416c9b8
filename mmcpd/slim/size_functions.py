"""Find the plain functions that methods call by name, so that a size in one can be replaced for one class alone.

`shifted_window_attention(x, self.qkv.weight, ...)` in a method runs a function of a file, which other classes run too.
A copy of it takes its place in the methods that call it: under the same name, in a cell of theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any

from .recompile import content, layers_of

DEPTH = 3  # how many functions call each other before one is called by a method
_OTHERS = ('torch', 'einops', 'numpy', 'mmcpd')  # packages whose functions stay what they are


def codes(code: CodeType) -> set[CodeType]:
    """Return the code of a function and of those that it defines."""
    return {code} | {inner for const in code.co_consts if isinstance(const, CodeType) for inner in codes(const)}


def called_functions(methods: Iterable[tuple[str, FunctionType]]) -> dict[str, Any]:
    """Return the functions that methods call by a name of their file, and those that these call, with their decorators.

    A name that means different functions in different files, or is a method's too, is left out.
    """
    methods = list(methods)
    found: dict[str, Any] = {}
    left_out = {name for name, _ in methods}
    callers = [function for _, function in methods]
    for _ in range(DEPTH):
        new = {}
        for name, raw in (each for caller in callers for each in calls_in(caller)):
            if found.setdefault(name, raw) is not raw:
                left_out.add(name)
            elif raw not in callers:
                new[name] = raw
        callers = [author_of(raw) for raw in new.values()]
    return {name: raw for name, raw in found.items() if name not in left_out}


def author_of(raw: Any) -> FunctionType:
    """Return what the author of a function wrote, without its decorators."""
    return layers_of(raw, raw.__name__)[-1]


def callers_of(functions: Mapping[str, FunctionType], names: Iterable[str], plain: Collection[str]) -> set[str]:
    """Return the names of these functions and of those that call them, also through others.

    Only the `plain` ones are called by name; a method is found on its module, also when it is another one.
    """
    found = set(names)
    while more := {n for n, f in functions.items() if n not in found and outer_names(f.__code__) & found & set(plain)}:
        found |= more
    return found


@lru_cache(maxsize=4096)
def outer_names(code: CodeType) -> frozenset[str]:
    """Return the names that code takes from outside: of globals, attributes and enclosing functions."""
    return frozenset(name for each in codes(code) for name in (*each.co_names, *each.co_freevars))


def calls_in(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the functions of Python that a function may call by a plain name."""
    cells = dict(zip(function.__code__.co_freevars, map(content, function.__closure__ or ()), strict=True))
    for name in outer_names(function.__code__):
        raw = cells.get(name, function.__globals__.get(name))
        package = (getattr(raw, '__module__', None) or '').partition('.')[0]
        if inspect.isfunction(raw) and inspect.isfunction(author_of(raw)) and package not in _OTHERS:
            yield name, raw
