"""Tensors that modules hold in plain attributes: where channels meet them, they become buffers, which can be cut."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .references import detached_references, plain_attributes


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors in plain attributes of modules that could as well be buffers, by name.

    They are of floating point, have a dimension, no history and no memory in common with a parameter or a buffer, and
    nothing in the class goes by their name.

    Example:
        >>> model.scale = torch.ones(8)
        >>> list(plain_tensors(model))
        ['scale']
    """
    references = {id(reference) for reference, _ in detached_references(model)}
    return {
        f'{path}.{name}'.lstrip('.'): value
        for path, module in model.named_modules()
        for name, value in plain_attributes(module).items()
        if type(value) is Tensor and value.is_floating_point() and value.dim() and not value.requires_grad
        if value.layout is torch.strided and id(value) not in references and not hasattr(type(module), name)
    }


def register_plain_(model: nn.Module, names: Iterable[str]) -> None:
    """Make buffers outside of the state dict of those plain tensors that are among `names`; what they hold stays.

    Example:
        >>> model.scale = torch.ones(8)
        >>> register_plain_(model, ['scale', 'fc.weight'])
        >>> [name for name, _ in model.named_buffers()], 'scale' in model.state_dict()
        (['scale'], False)
    """
    found = plain_tensors(model)
    for name in (name for name in names if name in found):
        path, _, local = name.rpartition('.')
        module = model.get_submodule(path)
        delattr(module, local)
        module.register_buffer(local, found[name], persistent=False)


def unregister_(model: nn.Module, names: Iterable[str]) -> None:
    """Make plain tensors of buffers again.

    Example:
        >>> model.scale = torch.ones(8)
        >>> register_plain_(model, ['scale'])
        >>> unregister_(model, ['scale'])
        >>> list(model.buffers())
        []
    """
    for path, _, local in (name.rpartition('.') for name in names):
        module = model.get_submodule(path)
        tensor = module.get_buffer(local)
        delattr(module, local)
        vars(module)[local] = tensor
