"""Find out, from byte code, which attributes the methods of modules read, and which methods a forward may run."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn

from .size_functions import author_of, calls_in, codes, functions_of

_RUN_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')  # of a module
_SETTING_UP = ('init', 'reset', '__', 'repr')  # parts of the names of methods that nobody calls after slimming


@dataclass(frozen=True)
class Reads:
    """Names of attributes that code reads, methods among them."""

    own: frozenset[str]  # `self.name`, whatever the method calls its module
    others: frozenset[str]  # of any other object

    def __or__(self, other: Reads) -> Reads:
        return Reads(self.own | other.own, self.others | other.others)


NOTHING = Reads(frozenset(), frozenset())


@lru_cache(maxsize=4096)
def reads_of(code: CodeType, receiver: str = 'self') -> Reads:
    """Return what a function reads, those that it defines included; `receiver` is what it calls its module.

    Example:
        >>> reads_of((lambda self, x: self.conv(x.data)).__code__)
        Reads(own=frozenset({'conv'}), others=frozenset({'data'}))
    """
    own, others, before = set[str](), set[str](), ''
    for instruction in dis.get_instructions(code):
        if instruction.opname in ('LOAD_ATTR', 'LOAD_METHOD'):
            (own if receiver and before == receiver else others).add(str(instruction.argval))
        if instruction.opname.startswith(('LOAD_FAST', 'LOAD_DEREF')):
            value = instruction.argval
            before = value[-1] if isinstance(value, tuple) else value  # two in one since Python 3.13
        else:
            before = ''
    found = Reads(frozenset(own), frozenset(others))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= reads_of(constant, receiver)
    return found


def hooks_of(module: nn.Module) -> list[Any]:
    """Return what a module's forward and backward call beside its own methods."""
    return [hook for name in _RUN_HOOKS for hook in vars(module).get(name, {}).values()]


def functions_beside(
    modules: Iterable[nn.Module], forward: Callable[..., object], run: Collection[str]
) -> set[FunctionType]:
    """Return the functions that are no methods of modules and that a forward may run: attributes are read there too.

    They are the forward itself, hooks, what these and the methods in `run` call by name, and the methods of the
    author's own classes that are no modules. Other packages than those of the modules are left out.
    """
    modules = list(modules)
    held = [hook for module in modules for hook in hooks_of(module)]
    own = {each for each in map(_function, (forward, *held)) if each is not None}
    kinds: list[Any] = list(dict.fromkeys(map(type, modules)))
    packages = {_package(each) for each in (*kinds, *own)} - {'torch'}
    named = ((kind, name.rpartition('.')[2], f) for kind in kinds for name, f in functions_of(kind).items())
    methods = {function for kind, name, function in named if name in run and hasattr(kind, name)}
    methods.update(getter for kind in kinds for getter in _getters(kind))
    found, new = set[FunctionType](), {*own, *methods}
    while new:
        found |= new
        called = {author_of(raw) for function in new for _, raw in calls_in(function)}
        plain = {each for function in new for each in _classes_in(function)}
        called.update(*(functions_of(each).values() for each in plain))
        new = {function for function in called if _package(function) in packages} - found
    return found - methods


def _package(value: Any) -> str:
    return (value.__module__ or '').partition('.')[0]


def _function(value: Any) -> FunctionType | None:
    """Return the function of a function, of a bound method, of a partial one, or of an object that can be called."""
    while not isinstance(value, FunctionType):
        inner = getattr(value, 'func', getattr(value, '__func__', None))
        inner = vars(type(value)).get('__call__') if inner is None else inner
        if inner is None or inner is value or not isinstance(inner, FunctionType | MethodType | partial):
            return None
        value = inner
    return None if _package(value) == 'torch' else value


def _getters(kind: type) -> Iterator[FunctionType]:
    for base in kind.__mro__:
        if not base.__module__.startswith('torch.'):
            getters = (each.fget for each in vars(base).values() if isinstance(each, property))
            yield from (each for each in getters if isinstance(each, FunctionType))


def _classes_in(function: FunctionType) -> Iterator[type]:
    """Yield the classes of the same package, modules left out, that a function mentions by a global name."""
    package = (function.__module__ or '').partition('.')[0]
    for code in codes(function.__code__):
        for name in code.co_names:
            found: Any = function.__globals__.get(name)
            plain = isinstance(found, type) and not issubclass(found, nn.Module)
            if plain and found.__module__.partition('.')[0] == package:
                yield found


@lru_cache(maxsize=1024)
def methods_of(kind: type) -> dict[str, Reads]:
    """Return what each method and property of a module's class reads, in any of the classes that it stems from."""
    found: dict[str, Reads] = {}
    for base in kind.__mro__:
        if not base.__module__.startswith('torch.') and base is not object:
            for name, value in vars(base).items():
                for code in _codes(value):
                    own = code.co_argcount and not isinstance(value, staticmethod | classmethod)
                    reads = reads_of(code, code.co_varnames[0] if own else '')
                    found[name] = found.get(name, NOTHING) | reads
    return found


def _codes(value: Any) -> Iterator[CodeType]:
    for each in (value.fget, value.fset) if isinstance(value, property) else (getattr(value, '__func__', value),):
        function = inspect.unwrap(each) if callable(each) else None
        if inspect.isfunction(function):
            yield function.__code__


class Methods:
    """Know of a whole model which methods a forward may run, and what reads an attribute."""

    def __init__(self, modules: Iterable[nn.Module], forward: Callable[..., object]) -> None:
        modules = list(modules)
        self.kinds = {kind: methods_of(kind) for kind in dict.fromkeys(map(type, modules))}
        self.run, self.others = set[str](), frozenset[str]()
        function = _function(forward)
        self._run({'forward', '__call__'} | (reads_of(function.__code__, '').others if function is not None else set()))
        beside = functions_beside(modules, forward, self.run)
        self.others = self.others.union(*(reads_of(each.__code__, '').others for each in beside))
        self._run(self.others)

    def _run(self, names: Iterable[str]) -> None:
        """Note the methods of these names, and those that they name, as what a forward may run."""
        wanted = [name for name in names if name not in self.run]
        self.run.update(wanted)
        while wanted:
            name = wanted.pop()
            for methods in self.kinds.values():
                reads = methods.get(name, NOTHING)
                self.others |= reads.others
                new = (reads.own | reads.others) - self.run
                self.run |= new
                wanted.extend(new)

    def run_reads(self, kind: type, name: str) -> bool:
        """Say whether a forward may read an attribute of a module of this class."""
        methods = self.kinds[kind]
        return name in self.others or any(name in methods[each].own for each in methods.keys() & self.run)

    def later(self, kind: type, name: str) -> str | None:
        """Return a method that reads an attribute, itself or through others, and which no forward runs."""
        methods = self.kinds[kind]
        built = _reachable(methods, '__init__')
        for each in methods:
            late = each not in self.run and each not in built and not any(part in each for part in _SETTING_UP)
            if late and any(name in methods[inner].own for inner in _reachable(methods, each)):
                return each
        return None


def _reachable(methods: dict[str, Reads], start: str) -> set[str]:
    """Return the names of the methods that a method runs, itself included."""
    found, wanted = {start} & methods.keys(), [start]
    while wanted:
        new = methods.get(wanted.pop(), NOTHING).own & methods.keys() - found
        found |= new
        wanted.extend(new)
    return found
