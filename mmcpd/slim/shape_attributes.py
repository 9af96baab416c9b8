"""What a module says about its own widths, beside what its forward was seen to use.

`comb.size_arguments` observes the integers that a forward reads. Here stand the attributes that only describe (a
convolution runs without `in_channels`, but prints and exports wrongly), by class, each computed from the new tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Shapes = dict[str, tuple[int, ...]]  # of the module's own tensors, by their local names


def _conv(module: Any, new: Shapes) -> dict[str, Any]:
    transposed = isinstance(module, _ConvTransposeNd)
    wide, narrow = new['weight'][0], new['weight'][1] * module.groups  # (O, I / groups), transposed (I, O / groups)
    inside, outside = (wide, narrow) if transposed else (narrow, wide)
    return {'in_channels': inside, 'out_channels': outside}


def _sizes(*attributes: str) -> Callable[[Any, Shapes], dict[str, Any]]:
    """Let the attributes be the sizes of the first tensor."""
    return lambda module, new: dict(zip(attributes, next(iter(new.values())), strict=False))


def _layer_norm(module: Any, new: Shapes) -> dict[str, Any]:
    return {'normalized_shape': tuple(new['weight'])}


SHAPE_ATTRS: list[tuple[type, Callable[[Any, Shapes], dict[str, Any]]]] = [
    (_ConvNd, _conv),
    (nn.Linear, _sizes('out_features', 'in_features')),
    (_NormBase, _sizes('num_features')),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.GroupNorm, _sizes('num_channels')),
    (nn.Embedding, _sizes('num_embeddings', 'embedding_dim')),
    (nn.PReLU, _sizes('num_parameters')),
]


def described(module: nn.Module, new: Shapes) -> dict[str, Any]:
    """Return the attributes that follow from the new shapes of a module's own tensors."""
    for kind, update in SHAPE_ATTRS:
        if isinstance(module, kind) and new and (new := _with_weight(module, new)):
            return {n: v for n, v in update(module, new).items() if hasattr(module, n)}
    return {}


def _with_weight(module: nn.Module, own: Shapes) -> Shapes:
    """Return the weight's shape, also where it is made of other tensors; without one those of a norm's statistics."""
    for name in ('weight', 'weight_orig', 'weight_v'):  # torch's older masks, spectral and weight norms keep it so
        if name in own:
            return {'weight': own[name]}
    weight = getattr(module, 'weight', None)  # a parametrization's
    return {'weight': tuple(weight.shape)} if isinstance(weight, Tensor) else own if 'running_mean' in own else {}


def local_shapes(module: nn.Module) -> Shapes:
    """Return the shapes of a module's own tensors that have a dimension, by name."""
    own: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    return {n: tuple(t.shape) for n, t in own.items() if t is not None and t.dim()}
