"""Copy a model without what a forward left on its modules, and put back what a forward changed there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from ..coupling import Cache
from ..modes import modes_kept
from ..nested import tensors_in
from .references import OWN, detached_references, plain_attributes

_MISSING = object()
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


# -- caches ------------------------------------------------------------------------------------------------------------
@contextmanager
def restored(model: nn.Module, caches: list[Cache]) -> Iterator[None]:
    """Put every attribute back that holds what a forward made, and add these to `caches`.

    Parameters, buffers and modules that the forward made stay, with what their module noted about them.
    """
    before = {m: _Snapshot(m) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)}
    names = {module: path for path, module in model.named_modules()}
    reads = _Reads([t for snapshot in before.values() for t in snapshot.with_history()])
    try:
        with reads:
            yield
    finally:
        for module, snapshot in before.items():
            caches.extend(cache for cache in snapshot.restore_(names[module], reads.seen) if cache not in caches)


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
        self.own = self._registered()
        self.attributes = plain_attributes(module)
        self.contents = {n: copy.copy(v) for n, v in self.attributes.items() if isinstance(v, (dict, list))}

    def _registered(self) -> list[str]:
        return [*self.module._parameters, *self.module._buffers, *self.module._modules]

    def with_history(self) -> list[Tensor]:
        return [tensor for value in self.attributes.values() if _has_history(value) for tensor in tensors_in(value)]

    def restore_(self, path: str, read: set[int]) -> list[Cache]:
        """Put the attributes back; return those that a forward keeps tensors on, and the notes beside them."""
        here = vars(self.module)
        kept = [n for n, v in list(here.items()) if n not in OWN and self._changed(n, v) and tensors_in(v)]
        if not kept:
            return []
        notes = [n for n, v in here.items() if n not in OWN and n not in kept and self._noted(n, v)]
        found = [self._cache(path, name) for name in kept if self._is_cache(name, read)]
        for name in [*kept, *(notes if self._registered() == self.own else ())]:
            old = self.attributes.get(name, _MISSING)
            if old is _MISSING:
                del here[name]
                continue
            here[name] = old
            if name in self.contents:
                _refill_(old, self.contents[name])
        return [*found, *(self._cache(path, name) for name in notes if found)]

    def _changed(self, name: str, value: object) -> bool:
        if value is not self.attributes.get(name, _MISSING):
            return True
        return name in self.contents and not _same(value, self.contents[name])

    def _noted(self, name: str, value: object) -> bool:
        """Say whether a forward noted something plain: the size that its cache is for."""
        old = self.attributes.get(name, _MISSING)
        return _is_plain(value) and (old is _MISSING or (_is_plain(old) and bool(value != old)))

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
        return Cache(path, name, old is _MISSING, before if _is_plain(before) or isinstance(before, dict) else None)


def _same(value: Any, contents: Any) -> bool:
    """Say whether a dictionary or a list holds the very same objects as before."""
    if isinstance(value, dict):
        return value.keys() == contents.keys() and all(value[key] is contents[key] for key in value)
    return len(value) == len(contents) and all(a is b for a, b in zip(value, contents, strict=True))


def _refill_(value: Any, contents: Any) -> None:
    if isinstance(value, dict):
        value.clear()
        value.update(contents)
    else:
        value[:] = contents


def _has_history(value: object) -> bool:
    return any(not tensor.is_leaf for tensor in tensors_in(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
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
