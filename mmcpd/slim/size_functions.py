"""Find the methods of a class, those behind `super()` too, and the plain functions that they call by name.

A size in any of them can be replaced for one class alone.

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

SUPER = 'super.'  # before the name of a method that another one hides
DEPTH = 3  # how many functions call each other before one is called by a method
TORCH = ('torch.',)
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


# -- of a class --------------------------------------------------------------------------------------------------------
def definitions(kind: type, name: str) -> list[tuple[type, Any]]:
    """Return the classes that define a method, and what each defines: first what instances find, then what it hides.

    Of the hidden ones only those that `super()` may reach; `Base.forward(self, x)` is no such call.
    """
    bases = [base for base in kind.__mro__ if name in vars(base)]
    sources = {base.__bases__[0] for base in bases if 'rewrites' in vars(base)}  # made by `rewritten`
    bases = [base for base in bases if base not in sources]
    own = [base for base in bases[1:] if not name.startswith('__') and not base.__module__.startswith(TORCH)]
    hidden = [base for base in own if _reached(kind, base, name)]
    return [(base, vars(base)[name]) for base in [*bases[:1], *hidden]]


def _reached(kind: type, base: type, name: str) -> bool:
    """Say whether a class before this one in the order of resolution calls `super().name`, and none names this one."""
    before = kind.__mro__[: kind.__mro__.index(base)]
    functions = (layers_of(raw, each)[-1] for earlier in before for each, raw in vars(earlier).items())
    used = [outer_names(function.__code__) for function in functions if inspect.isfunction(function)]
    return any({'super', name} <= names for names in used) and not any(base.__name__ in names for names in used)


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    """Yield the plain methods and static methods of a class, without their decorators.

    Those that its instances find have their name, and those behind it that `super()` reaches are `super.NAME`,
    `super.super.NAME` and so on.
    """
    for name in dir(kind):
        for depth, (_, raw) in enumerate(definitions(kind, name)):
            function = layers_of(raw, name)[-1]
            if inspect.isfunction(function) and not (function.__module__ or '').startswith(TORCH):
                yield SUPER * depth + name, function


def functions_of(kind: type) -> dict[str, FunctionType]:
    """Return the methods of a class and the functions that they call, by name, without their decorators.

    A hidden method of another file, where a name that it calls means another function, is left out.
    """
    called = called_by(kind)
    methods = {name: f for name, f in _methods(kind) if not name.startswith(SUPER) or _agrees(f, called)}
    return {**{name: author_of(raw) for name, raw in called.items()}, **methods}


@lru_cache(maxsize=256)
def called_by(kind: type) -> dict[str, Any]:
    """Return the functions that the methods of a class call by name, with their decorators."""
    methods = list(_methods(kind))
    found = called_functions(each for each in methods if not each[0].startswith(SUPER))
    hidden = (each for each in methods if each[0].startswith(SUPER) and _agrees(each[1], found))
    return {**called_functions(hidden), **found}


def _agrees(function: FunctionType, called: Mapping[str, Any]) -> bool:
    """Say whether the names that a function calls mean the same functions as they do here."""
    return all(called.get(name, raw) is raw for name, raw in calls_in(function))
