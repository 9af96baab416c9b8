"""What a slimmed model is, without its values: described in JSON types, and applied to a fresh dense model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SlimError
from .attention import REPLACEMENTS
from .call_sites import Rewrite, rewrite_, rewrites_of
from .slimming import as_tensor_of, set_module


def structure(model: nn.Module, small: nn.Module) -> dict[str, Any]:
    """Describe how a slimmed model differs from its dense one, in plain JSON types.

    Returns:
        `tensors` (new shapes by name), `attributes` (new values by module path and name), `replaced` (kinds by module
        path, with the arguments of the replacement) and `rewritten` (sizes put into methods, by module path).

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
    old = {n: tuple(t.shape) for n, t in model.state_dict(keep_vars=True).items()}
    tensors = {n: list(t.shape) for n, t in small.state_dict(keep_vars=True).items() if old.get(n) != tuple(t.shape)}
    return {'tensors': tensors, 'attributes': attributes, 'replaced': replaced, 'rewritten': rewritten}


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
    shared: dict[int, Tensor] = {}
    for name, shape in plan['tensors'].items():
        path, _, local = name.rpartition('.')
        module = _find(model, path)
        own = module._parameters if local in module._parameters else module._buffers
        tensor = own.get(local)
        if tensor is None or tensor.dim() != len(shape) or any(s > o for s, o in zip(shape, tensor.shape, strict=True)):
            have = 'missing' if tensor is None else tuple(tensor.shape)
            raise SlimError(f'{name} is {have} in this model, and {tuple(shape)} in the structure: another model')
        if id(tensor) not in shared:
            value = tensor.detach()[tuple(slice(0, s) for s in shape)].clone()
            shared[id(tensor)] = as_tensor_of(tensor, value)
        own[local] = shared[id(tensor)]  # type: ignore[assignment]
    for path, entry in plan['replaced'].items():
        set_module(model, path, REPLACEMENTS[entry['kind']].kind(_find(model, path), **entry['arguments']))
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


def _find(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise SlimError(f'this model has no module {path!r}, which the structure names: another model') from error
