"""What a slimmed model is, without its values: described in JSON types, and applied to a fresh dense model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..fixes import ComputedChannels
from .attention import REPLACEMENTS
from .call_sites import Rewrite, rewrite_, rewrites_of
from .check_structure import DTYPES, check_structure, largest_made, may_become
from .computed import all_channels, computed_channels, give_kept_
from .mask import named_tensors
from .noted_rows import Rows, noted_rows, set_noted_rows_
from .plain_tensors import plain_tensors, register_plain_
from .references import Replaced, refer_
from .slimming import replace_module
from .weights import Slots, all_tensors, is_extra_state, own_tensors, weights


def structure(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Describe how a slimmed model differs from its dense one, in plain JSON types.

    Args:
        model: the dense model, freshly built where it makes tensors in its first forward. Where the slimmed one comes
            from another slimmed model, it is the dense one of the first: structures compose.
        small: the slimmed model.

    Returns:
        `tensors` (new shapes by name), `rows` (those kept of buffers that are not in the state dict, by name and
        dimension, null for all), `added` (kinds of the tensors that the dense model has not), `shared` (names of
        tensors that are another one, but not in the dense model), `attributes` (new values by module path and name),
        `replaced` (kinds by module path, with the arguments of the replacement), `rewritten` (sizes put into methods,
        by module path) and `computed` (dimension and width of channels that no weight has, by module path). What both
        models share is named once.

    Example:
        >>> plan = structure(model, small)
        >>> twin = restructure_(build(), plan)
        >>> twin.load_state_dict(small.state_dict())
        <All keys matched successfully>
    """
    new = dict(small.named_modules())
    replaced: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    rewritten: dict[str, Any] = {}
    for path, module in model.named_modules():
        other = new.get(path)
        if other is None or any(path.startswith(r + '.') for r in replaced):
            continue
        kind = next((k for k, r in REPLACEMENTS.items() if type(other) is r.kind and type(module) is not r.kind), None)
        if kind is not None:
            replaced[path] = {'kind': kind, 'arguments': other.arguments()}
            continue
        own, made = vars(module), largest_made(module, {n: t.shape for n, t in own_tensors(other)})
        changes = {
            n: _in_json(v)
            for n, v in vars(other).items()
            if may_become(n, own.get(n), _in_json(v), made) and _in_json(v) != _in_json(own[n])
        }
        if changes:
            attributes[path] = changes
        if rewrites_of(other):
            rewritten[path] = [[*r.place, r.number] for r in rewrites_of(other)]
    computed = {each.module: {'dim': each.dim, 'width': each.width} for each in computed_channels(small)}
    old, plain = all_tensors(model), plain_tensors(model) | all_channels(computed)
    kept = {n for n, value in weights(small).items() if not is_extra_state(n)}
    tensors: dict[str, list[int]] = {}
    added: dict[str, Any] = {}
    for name, tensor in named_tensors(small).items():
        if name not in old and name in kept:
            added[name] = {'parameter': isinstance(tensor, nn.Parameter), 'dtype': str(tensor.dtype)}
        before = old.get(name, plain.get(name))
        if name in added or (before is not None and (is_lazy(before) or before.shape != tensor.shape)):
            tensors[name] = list(tensor.shape)
    rows = {name: found for name in tensors if name not in kept and (found := _rows_of(small, name)) is not None}
    first = {tensor: name for name, tensor in named_tensors(small).items()}
    aliases = {n: first[t] for n, t in all_tensors(small).items() if first[t] != n}
    shared = {n: other for n, other in aliases.items() if n in old and old[n] is not old.get(other)}
    return {
        'tensors': tensors, 'rows': rows, 'added': added, 'shared': shared,
        'attributes': attributes, 'replaced': replaced, 'rewritten': rewritten, 'computed': computed,
    }  # fmt: skip


def _rows_of(small: nn.Module, name: str) -> Rows | None:
    """Return which rows a buffer outside of the state dict has, or warn that nothing says it."""
    path, _, local = name.rpartition('.')
    module = small.get_submodule(path)
    rows = noted_rows(module).get(local)
    if rows is None or any(
        r is not None and len(r) != n for r, n in zip(rows, getattr(module, local).shape, strict=True)
    ):
        text = 'is not in the state dict, and slimming did not cut it as it is now: set it after `restructure_`'
        warnings.warn(f'{name} {text}', stacklevel=3)
        return None
    return rows


def _in_json(value: Any) -> Any:
    return list(value) if type(value) is tuple else value


@torch.no_grad()
def restructure_(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built dense model the structure of a slimmed one; its values are then arbitrary.

    Raises:
        SlimError: if the plan says what slimming this model could not have written; then the model is as it was.

    Example:
        >>> twin = restructure_(build(), structure(model, small))
        >>> twin.conv1.out_channels
        4
    """
    check_structure(model, plan)
    register_plain_(model, plan['tensors'])
    give_kept_(model, [ComputedChannels(path, **entry) for path, entry in plan['computed'].items()])
    for name, entry in plan['added'].items():
        _add_(model, name, plan['tensors'][name], **entry)
    modules, tensors, slots = dict(model.named_modules()), all_tensors(model), Slots(model)
    for name, shape in plan['tensors'].items():
        rows = plan['rows'].get(name)
        slots.resize_(tensors[name], shape, rows)
        if rows is not None:
            path, _, local = name.rpartition('.')
            set_noted_rows_(model.get_submodule(path), local, rows)
    cut = all_tensors(model)
    for name, other in plan['shared'].items():
        path, _, local = name.rpartition('.')
        setattr(model.get_submodule(path), local, cut[other])
    for path, entry in plan['replaced'].items():
        module = model.get_submodule(path)
        replace_module(model, module, REPLACEMENTS[entry['kind']].kind(module, **entry['arguments']))
    after, paths = all_tensors(model), dict(model.named_modules())
    replaced = [Replaced(old, after[name]) for name, old in tensors.items() if name in after]
    refer_(model, [*replaced, *(Replaced(old, paths[path]) for path, old in modules.items() if path in paths)])
    for path, values in plan['attributes'].items():
        module = model.get_submodule(path)
        for name, value in values.items():
            setattr(module, name, type(vars(module)[name])(value))
    for path, rewrites in plan['rewritten'].items():
        rewrite_(model.get_submodule(path), [Rewrite(*rewrite) for rewrite in rewrites])
    return model


def _add_(model: nn.Module, name: str, shape: Sequence[int], parameter: bool, dtype: str) -> None:
    """Register a tensor that a module would make in its first forward."""
    path, _, local = name.rpartition('.')
    module, value = model.get_submodule(path), torch.empty(shape, dtype=DTYPES[dtype])
    if parameter:
        setattr(module, local, nn.Parameter(value, value.is_floating_point()))
    else:
        module.register_buffer(local, value)
