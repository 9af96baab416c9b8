"""Products of three tensors at once."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...coupling import Role
from ..atoms import Axis
from ..trace import Call, Run
from .products import contract


class _Factor(NamedTuple):
    tensor: Tensor
    axes: list[Axis | None]  # with those of length one that were put between
    sizes: list[int]


def trilinear(run: Run, call: Call) -> None:
    # _trilinear(i1, i2, i3, expand1, expand2, expand3, sumdim): the product of all three, each with new dimensions of
    # one, summed over some; `nn.Bilinear` gives (N, -, I, -), its weight (-, O, I, J) and (N, -, -, J), and gets (N, O)
    factors = [_factor(run, call.named[f'i{n}'], call.named[f'expand{n}']) for n in (1, 2, 3)]
    known: list[Axis | None] = []
    for d in range(len(factors[0].sizes)):
        wide = [factor for factor in factors if factor.sizes[d] > 1]
        axes = [factor.axes[d] for factor in wide]
        met = next((axis for axis in axes if axis is not None), None)
        known.append(met)
        if d in call.named['sumdim'] and len(wide) == 2:
            read = next((f.tensor for f in wide if not run.of_weights(f.tensor)), wide[0].tensor)
            contract(run, axes[0], axes[1], 'a bilinear layer', read)
            continue
        for axis in axes:
            if axis is not met:
                run.equate(met, axis, call.op)
        if d in call.named['sumdim']:
            run.freeze(met, f'a sum over a product of three in {run.where}')
        elif met is not None and met.weight:
            run.role(met, Role.PRODUCER)
    kept = [met and met.activation(met.zero) for d, met in enumerate(known) if d not in call.named['sumdim']]
    run.output(call.out, kept)
    run.cost([max(sizes) for sizes in zip(*(f.sizes for f in factors), strict=True)], known)


def _factor(run: Run, tensor: Tensor, new: list[int]) -> _Factor:
    axes, sizes = list(run.axes(tensor)), list(tensor.shape)
    for d in sorted(new):
        axes.insert(d, None)
        sizes.insert(d, 1)
    return _Factor(tensor, axes, sizes)
