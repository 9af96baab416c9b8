"""Copy a model without what a forward left on its modules, and put back what a forward changed there."""

from __future__ import annotations

import copy
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from ..example import Cache
from ..modes import modes_kept
from ..nested import tensors_in
from .kept_values import values_kept
from .references import detached_references, plain_attributes

_MISSING = object()
CONTAINERS = (OrderedDict, dict, list, set, deque)  # each before what it is made from
_RECOMPUTING = (BasePruningMethod, SpectralNorm, WeightNorm)  # hooks that keep their result as a plain attribute
_PLAIN = (int, float, str, type(None), torch.device, torch.dtype)


class _Detaching(TorchFunctionMode):
    """Copy tensors with a history detached, which torch refuses to copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
                return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module, memo: dict[int, Any] | None = None, caches: Iterable[Cache] = ()) -> nn.Module:
    """Return a deep copy of a model, also where a forward left tensors with a history on it: they are detached.

    Args:
        model: any module; parametrized, pruned by torch's own `prune`, after a training forward.
        memo: what stands for objects of the model, by `id`, as in `copy.deepcopy`.
        caches: what forwards keep on it (`Coupling.caches`), which is left out.

    Example:
        >>> model.last = model.conv1.weight * 2    # as a forward does: copy.deepcopy refuses it
        >>> copied(model).last.is_leaf
        True
    """
    with _Detaching():
        memo = memo if memo is not None else {}
        for reference, tensor in detached_references(model):
            memo[id(reference)] = copy.deepcopy(tensor, memo).detach()
        twin = copy.deepcopy(model, memo)
    forget_(twin, caches)
    return twin


@contextmanager
def discarding(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Empty the modules that a block puts into a list, so that their memory is free at once.

    Hooks and masked forwards refer back to their module: without this, copies would stay until the garbage collector
    runs. What belongs to the given model, which they are copies of, stays.

    Example:
        >>> with discarding(model) as copies:
        ...     copies.append(copied(model))
        ...     twin = copies[0].conv1
        >>> vars(twin), model.conv1.out_channels
        ({}, 8)
    """
    copies: list[nn.Module] = []
    try:
        yield copies
    finally:
        own = set(model.modules())
        for module in {each for twin in copies for each in twin.modules()} - own:
            vars(module).clear()


# -- caches ------------------------------------------------------------------------------------------------------------
@contextmanager
def restored(model: nn.Module, caches: list[Cache] | None = None) -> Iterator[None]:
    """Put a model back as it was before its forwards ran, values and attributes, and add what is a cache to `caches`.

    Parameters, buffers and modules that a forward made stay, with what modules noted about them.
    """
    before = _snapshots(model)
    reads = _Reads([t for snapshot in before.values() for t in snapshot.with_history()])
    try:
        with values_kept(model), modes_kept(model), reads:
            yield
    finally:
        found = _restore_(before, reads.seen)
        if caches is not None:
            caches.extend(cache for cache in found if cache not in caches)


@contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Put the attributes of a model's modules back as they were before its forwards ran; tensors keep their values."""
    before = _snapshots(model)
    try:
        yield
    finally:
        _restore_(before, set())


def _snapshots(model: nn.Module) -> dict[str, _Snapshot]:
    return {path: _Snapshot(m) for path, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)}


def _restore_(before: dict[str, _Snapshot], read: set[int]) -> list[Cache]:
    """Put modules back as they were, and return what their forwards keep."""
    grown = any(snapshot.grown() for snapshot in before.values())
    return [cache for path, snapshot in before.items() for cache in snapshot.restore_(path, read, grown)]


class _Reads(TorchFunctionMode):
    """Note which of some tensors any function takes: they are state, not what the next forward makes anew."""

    def __init__(self, watched: Iterable[Tensor]) -> None:
        super().__init__()
        self.watched, self.seen = {id(tensor) for tensor in watched}, set[int]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.watched:
            self.seen |= self.watched & {id(tensor) for tensor in tensors_in([args, kwargs])}
        return func(*args, **(kwargs or {}))


class _Snapshot:
    """What stood on a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.registered = [dict(table) for table in self._tables()]
        self.shapes = self._shapes()
        self.attributes = plain_attributes(module)
        self.contents = {n: _contents(v) for n, v in self.attributes.items() if isinstance(v, (dict, list))}
        self.containers = [(each, _contents(each)) for each in _containers_in(self.attributes.values())]

    def _tables(self) -> list[dict[str, Any]]:
        return [self.module._parameters, self.module._buffers, self.module._modules]

    def _shapes(self) -> dict[str, object]:
        """Return what is registered, with the shapes of parameters: those that are made in a first forward change."""
        parameters, *others = self._tables()
        shapes = {n: None if is_lazy(p) else p.shape for n, p in parameters.items() if p is not None}
        return shapes | {n: is_lazy(each) for table in others for n, each in table.items() if each is not None}

    def grown(self) -> bool:
        """Say whether a forward made parameters, buffers or modules, or gave them their shapes."""
        return not self._shapes().items() <= self.shapes.items()

    def with_history(self) -> list[Tensor]:
        return [tensor for value in self.attributes.values() if _has_history(value) for tensor in tensors_in(value)]

    def restore_(self, path: str, read: set[int], grown: bool) -> list[Cache]:
        """Put everything back, or only caches where the model has grown; return these and the notes beside them."""
        here = plain_attributes(self.module)
        kept = [n for n, v in here.items() if self._changed(n, v) and tensors_in(v)]
        notes = [n for n, v in here.items() if n not in kept and self._noted(n, v)]
        found = [self._cache(path, name) for name in kept if self._is_cache(name, read)]
        found += [self._cache(path, name) for name in notes if found or self._is_first(name)]
        found += [self._cache(path, name) for name in here if self._has_grown(name)]
        if not grown:
            for table, registered in zip(self._tables(), self.registered, strict=True):
                if not _same(table, registered):
                    _refill_(table, registered)
            for container, contents in self.containers:  # a cache on another object stays, for the trial to find
                if not _same(container, contents) and len(tensors_in(container)) <= len(tensors_in(contents)):
                    _refill_(container, contents)
        cached = [*kept, *(notes if kept and not self.grown() else ())]
        for name in cached if grown else {**here, **self.attributes}:
            if name not in self.attributes:
                del vars(self.module)[name]
                continue
            vars(self.module)[name] = self.attributes[name]
            if name in self.contents and not _same(self.attributes[name], self.contents[name]):
                _refill_(self.attributes[name], self.contents[name])
        return found

    def _changed(self, name: str, value: object) -> bool:
        if value is not self.attributes.get(name, _MISSING):
            return True
        return name in self.contents and not _same(value, self.contents[name])

    def _noted(self, name: str, value: object) -> bool:
        """Say whether a forward noted something plain: the size that its cache is for."""
        old = self.attributes.get(name, _MISSING)
        return value is not old and is_plain(value) and (old is _MISSING or (is_plain(old) and bool(value != old)))

    def _is_first(self, name: str) -> bool:
        """Say whether there was nothing before a forward noted something: a size, which the next one makes anew."""
        return self.attributes.get(name) is None and _is_size(vars(self.module)[name])

    def _has_grown(self, name: str) -> bool:
        """Say whether a forward has put more plain things, and no tensors, into a dictionary."""
        here, old = vars(self.module).get(name), self.contents.get(name)
        if not isinstance(here, dict) or not isinstance(old, dict) or len(here) <= len(old):
            return False
        return all(_is_size(value) for key, value in here.items() if key not in old)

    def _is_cache(self, name: str, read: set[int]) -> bool:
        old = self.contents.get(name, self.attributes.get(name, _MISSING))
        if isinstance(old, (dict, list)):
            return len(vars(self.module)[name]) > len(old)
        if old is _MISSING or old is None:
            return True
        return _has_history(old) and not read & {id(tensor) for tensor in tensors_in(old)}

    def _cache(self, path: str, name: str) -> Cache:
        old = self.contents.get(name, self.attributes.get(name, _MISSING))
        before = type(old)() if isinstance(old, (dict, list)) and tensors_in(old) else old
        return Cache(path, name, old is _MISSING, before if is_plain(before) or isinstance(before, dict) else None)


def _is_size(value: object) -> bool:
    """Say whether something may be a size, or several."""
    sizes = value if isinstance(value, (tuple, list)) else (value,)
    return bool(sizes) and all(isinstance(each, int) and not isinstance(each, bool) for each in sizes)


def _containers_in(values: Iterable[Any]) -> Iterator[Any]:
    """Yield the dictionaries, lists, sets and queues in values, at any depth, and the attributes of plain objects."""
    left, seen = list(values), set[int]()
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, Tensor) or callable(value):
            continue
        seen.add(id(value))
        if isinstance(value, CONTAINERS):
            yield value
        if isinstance(value, (dict, list, tuple, deque)):
            left.extend(value.values() if isinstance(value, dict) else value)
        elif hasattr(value, '__dict__') and not isinstance(value, ModuleType):
            left.append(vars(value))


def _same(value: Any, contents: Any) -> bool:
    """Say whether a container holds the very same objects as before."""
    if isinstance(value, set):
        return bool(value == contents)
    ours, theirs = (
        [part for entry in each.items() for part in entry] if isinstance(each, dict) else each
        for each in (_contents(value), contents)
    )
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))


def _kind_of(value: Any) -> Any:
    """Return the container of Python's own that a container is."""
    return next(kind for kind in CONTAINERS if isinstance(value, kind))


def _contents(value: Any) -> Any:
    """Return what a container holds in one of Python's own; a class of somebody's may not be made from it."""
    plain = _kind_of(value)
    return plain(plain.items(value) if issubclass(plain, dict) else plain.__iter__(value))


def _refill_(value: Any, contents: Any) -> None:
    """Put other contents into a container, past what its own class allows: one may be frozen."""
    plain = _kind_of(value)
    plain.clear(value)
    for key in contents if issubclass(plain, dict) else ():
        plain.__setitem__(value, key, contents[key])
    if not issubclass(plain, dict):
        (plain.update if plain is set else plain.extend)(value, contents)


def _has_history(value: object) -> bool:
    return any(not tensor.is_leaf for tensor in tensors_in(value))


def is_plain(value: object) -> bool:
    """Say whether something is a number, a text or nothing, or a list of such.

    Example:
        >>> is_plain([1, (None, 'a')]), is_plain({})
        (True, False)
    """
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return isinstance(value, _PLAIN)


@torch.no_grad()
def forget_(model: nn.Module, caches: Iterable[Cache]) -> None:
    """Take off a model what forwards keep on it, which the next one makes anew; what hooks keep is made here."""
    modules = dict(model.named_modules())
    for cache in caches:
        here = modules[cache.module].__dict__ if cache.module in modules else {}
        if cache.missing:
            here.pop(cache.name, None)
        elif cache.name in here:
            old, value = cache.before, here[cache.name]
            if any(isinstance(old, kind) and isinstance(value, kind) for kind in (dict, list)):
                _refill_(value, old)  # other modules may hold it too, and it may be of a class of somebody's
            else:
                here[cache.name] = copy.copy(cache.before)
    with modes_kept(model):
        model.eval()  # a spectral norm iterates in training only
        for module in modules.values():
            for hook in module._forward_pre_hooks.values():
                if isinstance(hook, _RECOMPUTING):
                    hook(module, ())


def writable_(tensor: Tensor) -> Tensor:
    """Give a tensor made by `expand` its own memory, and return it.

    Example:
        >>> writable_(torch.zeros(1).expand(3)).stride()
        (1,)
    """
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, strides, strict=False)):
        tensor.data = tensor.data.contiguous()
    return tensor
