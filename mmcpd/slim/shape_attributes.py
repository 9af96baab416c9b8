"""What a module says about its own widths, beside what its forward was seen to use.

`comb.size_arguments` observes the integers that a forward reads. Here stand the attributes that only describe (a
convolution runs without `in_channels`, but prints and exports wrongly), by class, each computed from the new tensors;
and those of a block that no forward reads but another method does later (`switch_to_deploy` builds a convolution of
`self.in_channels`), which follow the layers in the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

MOST_DIMENSIONS = 5  # a small `dim` may be the number of a dimension
MOST_SIZES = 1000  # in one list
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
    (nn.Bilinear, _sizes('out_features', 'in1_features', 'in2_features')),
    (_NormBase, _sizes('num_features')),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _layer_norm),
    (nn.GroupNorm, _sizes('num_channels')),
    (nn.Embedding, _sizes('num_embeddings', 'embedding_dim')),
    (nn.PReLU, _sizes('num_parameters')),
]


DESCRIBED = frozenset(
    'in_channels out_channels in_features out_features in1_features in2_features num_features num_channels '
    'num_embeddings embedding_dim num_parameters normalized_shape'.split()
)  # the names of these attributes


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


# -- what other methods read later -------------------------------------------------------------------------------------
_WIDTHS = frozenset(
    'channel channels chan chans ch feature features feat feats dim dims dimension dimensions width plane planes '
    'inplanes outplanes hidden embed embedding filter filters inner mid in out inp oup cin cout c units'.split()
)
_NO_WIDTHS = frozenset(
    'head heads kernel stride strides padding window patch patches depth level levels axis class classes token tokens '
    'length ratio rate index indices stage stages block blocks resolution height'.split()
)
_IN, _OUT = frozenset('in inp input cin inplanes'.split()), frozenset('out oup output cout outplanes'.split())
_INSIDE, _OUTSIDE = ('in_channels', 'in_features'), ('out_channels', 'out_features')


class SizePair(NamedTuple):
    """A size before and after slimming."""

    old: int
    new: int


class Layer(NamedTuple):
    """A module with tensors of its own, before and after slimming: integer attributes and shapes."""

    old: dict[str, int]
    new: dict[str, int]
    sizes: list[SizePair]  # of each dimension of each tensor

    @classmethod
    def of(cls, old: nn.Module, new: nn.Module) -> Layer:
        before, after = local_shapes(old), local_shapes(new)
        pairs = [zip(before[name], after[name], strict=True) for name in before if name in after]
        return cls(integers(old), integers(new), [SizePair(*pair) for each in pairs for pair in each])


def are_sizes(value: Any) -> bool:
    """Say whether an attribute may hold sizes, one for each of some blocks or dimensions: more are a table of indices.

    Example:
        >>> are_sizes([64, 128]), are_sizes(list(range(5000))), are_sizes([64, None])
        (True, False, False)
    """
    is_list = type(value) in (list, tuple)
    return is_list and 0 < len(value) <= MOST_SIZES and all(type(each) is int for each in value)


def integers(module: nn.Module) -> dict[str, int]:
    """Return the integer attributes of a module by name, and those in lists and tuples as `name[i]`."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if type(value) is int:
            found[name] = value
        elif are_sizes(value):
            found |= {f'{name}[{i}]': item for i, item in enumerate(value)}
    return found


def followed(name: str, value: int, layers: Sequence[Layer]) -> set[int]:
    """Return what an integer attribute of a block may be after slimming, by the layers in the block.

    That is what an attribute of the same name and value has become, or the width of an input or an output of that
    size, or any size of a tensor that was equal. Nothing where it is no width; several where it is not clear which.

    Example:
        >>> followed('in_channels', 8, [Layer({'in_channels': 8, 'groups': 1}, {'in_channels': 5, 'groups': 1}, [])])
        {5}
    """
    words = frozenset(re.split(r'[_\d\[\]]+', name.lower()))
    sides = _INSIDE if words & _IN else _OUTSIDE if words & _OUT else ()
    for names in ((name,), sides):
        if found := {each.new[n] for each in layers for n in names if each.old.get(n) == value and n in each.new}:
            return found
    is_width = bool(words & _WIDTHS) and not words & _NO_WIDTHS and value > MOST_DIMENSIONS
    return {pair.new for each in layers for pair in each.sizes if pair.old == value} if is_width else set()
