"""What a slimmed model is, without its values: described in JSON types, and applied to a fresh dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import SlimError
from .attention import REPLACEMENTS
from .call_sites import Rewrite, rewrite_, rewrites_of
from .mask import named_tensors
from .slimming import replace_module
from .weights import Slots, is_extra_state, own_tensors, weights


def structure(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Describe how a slimmed model differs from its dense one, in plain JSON types.

    Args:
        model: the dense model, freshly built where it makes tensors in its first forward. Where the slimmed one comes
            from another slimmed model, it is the dense one of the first: structures compose.
        small: the slimmed model.

    Returns:
        `tensors` (new shapes by name), `added` (kinds of the tensors that the dense model has not), `shared` (names of
        tensors that are another one, but not in the dense model), `attributes` (new values by module path and name),
        `replaced` (kinds by module path, with the arguments of the replacement) and `rewritten` (sizes put into
        methods, by module path). What both models share is named once.

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
        changes = {
            n: list(v) if isinstance(v, tuple) else v
            for n, v in vars(other).items()
            if _plain(v) and _plain(vars(module).get(n)) and v != vars(module)[n] and n != 'training'
        }
        if changes:
            attributes[path] = changes
        if rewrites_of(other):
            rewritten[path] = [[*r.place, r.number] for r in rewrites_of(other)]
    old, kept = _all_tensors(model), {n for n, value in weights(small).items() if not is_extra_state(n)}
    tensors: dict[str, list[int]] = {}
    added: dict[str, Any] = {}
    for name, tensor in named_tensors(small).items():
        if name not in old and name in kept:
            added[name] = {'parameter': isinstance(tensor, nn.Parameter), 'dtype': str(tensor.dtype)}
        if name in added or (name in old and (is_lazy(old[name]) or old[name].shape != tensor.shape)):
            tensors[name] = list(tensor.shape)
    first = {tensor: name for name, tensor in named_tensors(small).items()}
    aliases = {n: first[t] for n, t in _all_tensors(small).items() if first[t] != n}
    shared = {n: other for n, other in aliases.items() if n in old and old[n] is not old.get(other)}
    return {
        'tensors': tensors, 'added': added, 'shared': shared,
        'attributes': attributes, 'replaced': replaced, 'rewritten': rewritten,
    }  # fmt: skip


def _all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name, shared ones under each of their names."""
    modules = model.named_modules(remove_duplicate=False)
    return {f'{path}.{name}'.lstrip('.'): t for path, module in modules for name, t in own_tensors(module)}


def _plain(value: Any) -> bool:
    return type(value) is int or (type(value) in (tuple, list) and all(type(v) is int for v in value))


@torch.no_grad()
def restructure_(model: nn.Module, plan: Mapping[str, Any]) -> nn.Module:
    """Give a freshly built dense model the structure of a slimmed one; its values are then arbitrary.

    Raises:
        SlimError: if the plan names what the model has not, so that it is another model's.

    Example:
        >>> twin = restructure_(build(), structure(model, small))
        >>> twin.conv1.out_channels
        4
    """
    for name, entry in plan['added'].items():
        _add_(_find(model, name.rpartition('.')[0]), name, plan['tensors'][name], **entry)
    slots = Slots(model)
    for name, shape in plan['tensors'].items():
        path, _, local = name.rpartition('.')
        tensor = dict(own_tensors(_find(model, path))).get(local)
        if tensor is None or not _contains(tensor, shape):
            have = 'missing' if tensor is None else tuple(tensor.shape)
            raise SlimError(f'{name} is {have} in this model, and {tuple(shape)} in the structure: another model')
        slots.resize_(tensor, shape)
    tensors = _all_tensors(model)
    for name, other in plan['shared'].items():
        path, _, local = name.rpartition('.')
        if not {name, other} <= tensors.keys():
            raise SlimError(f'{name} and {other} are one tensor in the structure, and missing in this model')
        setattr(_find(model, path), local, tensors[other])
    for path, entry in plan['replaced'].items():
        module = _find(model, path)
        replace_module(model, module, REPLACEMENTS[entry['kind']].kind(module, **entry['arguments']))
    for path, values in plan['attributes'].items():
        module = _find(model, path)
        for name, value in values.items():
            if not hasattr(module, name):
                where = path or 'the model'
                raise SlimError(f'{where} has no attribute {name}, which the structure sets: another model')
            setattr(module, name, type(getattr(module, name))(value))
    for path, rewrites in plan.get('rewritten', {}).items():
        wanted = [Rewrite(method, text, index, count, int(number)) for method, text, index, count, number in rewrites]
        rewrite_(_find(model, path), wanted)
    return model


def _contains(tensor: Tensor, shape: Sequence[int]) -> bool:
    """Say whether a tensor can be cut to a shape; one without a shape yet can be given any."""
    if is_lazy(tensor):
        return True
    return tensor.dim() == len(shape) and all(s <= o for s, o in zip(shape, tensor.shape, strict=True))


def _add_(module: nn.Module, name: str, shape: Sequence[int], parameter: bool, dtype: str) -> None:
    """Register a tensor that the module would make in its first forward."""
    local, kind = name.rpartition('.')[2], getattr(torch, dtype.removeprefix('torch.'), None)
    if not isinstance(kind, torch.dtype) or (getattr(module, local, None) is not None and local not in module._buffers):
        raise SlimError(f'{name} of the structure does not fit what {type(module).__name__} has: another model')
    value = torch.empty(shape, dtype=kind)
    if parameter:
        setattr(module, local, nn.Parameter(value, value.is_floating_point()))
    else:
        module.register_buffer(local, value)


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SlimError(f'this model has no module {path!r}, which the structure names: another model') from error
