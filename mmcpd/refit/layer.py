"""One layer's least-squares problem: its moments over all batches, and the weight that solves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..layer_calls import LayerCall, LayerKind, ParameterRows
from ..slim.trial import double
from .columns import as_matrix, as_weight, columns_at

_ELEMENTS = 1 << 24  # of a matrix of columns that are in memory at once
_ROUNDING = 1e-11  # of a mean square in float64 from which the square of a mean is taken


@dataclass(frozen=True, eq=False)
class Form:
    """What a layer's calls have in common, and what of it is kept.

    Attributes:
        columns: BoolTensor `(groups, columns)`, the kept input channels of each convolution group.
        outputs: BoolTensor `(groups, outputs)`.
        alike: all taps of a kernel get the same change, so that the moments are those of channels.
    """

    name: str  # of the weight, with its rows where they are a part of it
    rows: ParameterRows
    kind: LayerKind
    columns: Tensor
    outputs: Tensor
    taps: int
    alike: bool

    @property
    def groups(self) -> int:
        return len(self.columns)

    @property
    def gram_bytes(self) -> int:
        """The memory of the columns' products in float64, over all groups."""
        columns = int(self.columns.any(0).sum()) * (1 if self.alike else self.taps)
        return 8 * self.groups * columns**2


def within(limit: int, forms: Sequence[Form]) -> dict[ParameterRows, Form]:
    """Return the forms whose Gram matrices take at most `limit` bytes together.

    A layer that cannot fit alone is left out. Of the others the largest convolutions change their taps alike, until all
    fit; then the largest layers are left out.
    """
    cheapest = {form.rows: replace(form, alike=True) if form.taps > 1 else form for form in forms}
    found = {form.rows: form for form in forms if cheapest[form.rows].gram_bytes <= limit}
    while sum(form.gram_bytes for form in found.values()) > limit:
        full = [form for form in found.values() if form.taps > 1 and not form.alike] or list(found.values())
        rows = max(full, key=lambda form: form.gram_bytes).rows
        if found[rows] is cheapest[rows]:
            del found[rows]
        else:
            found[rows] = cheapest[rows]
    return found


class Moments:
    """Sums over positions of columns x and residuals r, in float64.

    With D columns (times taps) and O outputs a group: `xx` is `(groups, D, D)`, `xr` `(groups, D, O)`.
    """

    def __init__(self, groups: int, columns: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(groups, *shape, dtype=torch.float64, device=device)

        self.count = 0
        self.x, self.xx, self.xr = zeros(columns), zeros(columns, columns), zeros(columns, outputs)
        self.r, self.rr, self.y, self.yy = (zeros(outputs) for _ in range(4))

    def add(self, x: Tensor, r: Tensor, y: Tensor) -> None:
        """Add columns `(groups, P, D)`, residuals and targets `(groups, P, O)`."""
        self.count += x.shape[1]
        self.xx.baddbmm_(x.mT, x)
        self.xr.baddbmm_(x.mT, r)
        for total, value in ((self.x, x), (self.r, r), (self.rr, r.square()), (self.y, y), (self.yy, y.square())):
            total += value.sum(1)


@dataclass(frozen=True, eq=False)
class Solution:
    """The change of a layer: `weight` `(groups, D, O)` and `intercept` `(groups, O)`; and squared errors.

    An error is the mean square over positions, as a share of the target's variance.
    """

    weight: Tensor
    intercept: Tensor
    before: float
    after: float


def solve(moments: Moments, outputs: Tensor, ridge: float, intercept: bool) -> Solution:
    """Return the change of the weight that fits the residuals best, pulled towards none by the ridge.

    `(Cxx + lam I)^-1 Cxr` with `lam = ridge * mean(diag Cxx)`, moments centred where there is an intercept. `outputs`,
    BoolTensor `(groups, O)`, are those that may change.
    """
    n = moments.count
    mean_x, mean_r = (m / n if intercept else torch.zeros_like(m) for m in (moments.x, moments.r))
    xx = moments.xx / n - mean_x[:, :, None] * mean_x[:, None]
    xr = moments.xr / n - mean_x[:, :, None] * mean_r[:, None]
    lam = ridge * _mean_diagonal(xx)
    lam = lam.clamp(min=_ROUNDING * _mean_diagonal(moments.xx / n))  # where inputs hardly vary, all of xx is rounding
    lam = torch.where(lam > 0, lam, 1.0)
    damped = xx + torch.diag_embed(lam[:, None].expand(xx.shape[:2]))
    weight = torch.cholesky_solve(xr, torch.linalg.cholesky(damped)) * outputs[:, None]
    shift = (mean_r - (mean_x[:, None] @ weight)[:, 0]) * outputs
    left = moments.rr / n - mean_r.square() + (weight * (xx @ weight - 2 * xr)).sum(1)
    variance = float(((moments.yy / n - (moments.y / n).square()) * outputs).sum())
    scale = variance if variance > 0 else 1.0
    before, after = (float((error * outputs).sum().clamp(min=0)) / scale for error in (moments.rr / n, left))
    return Solution(weight, shift, before, after)


def _mean_diagonal(matrices: Tensor) -> Tensor:
    """Return the mean of the diagonal of each of `(groups, D, D)`."""
    return matrices.diagonal(dim1=1, dim2=2).mean(1)


class Layer:
    """A layer of the masked model that is refitted: where its parameters are, and its moments.

    Args:
        form: what is kept of it.
        weight: the rows of the parameter, of which a refit writes the kept ones.
        bias: the bias, where it takes up the intercept.
        mean: else the running mean of the norm that follows.
        home_name: the name of the bias or the running mean, '' where there is neither.
    """

    def __init__(self, form: Form, weight: Tensor, bias: Tensor | None, mean: Tensor | None, home_name: str) -> None:
        self.form, self.weight, self.bias, self.mean, self.home_name = form, weight, bias, mean, home_name
        self.solution: Solution | None = None
        whole = as_matrix(form.kind, form.groups, double(weight))
        self._kept = form.columns.any(0).nonzero().flatten().to(whole.device)
        self._start = whole[:, self._kept]  # (groups, C, taps, O)
        self._live = form.columns.to(whole.device)[:, self._kept]
        self._partly = not bool(self._live.all())  # some groups lost columns that others keep
        self._weight = weight.clone()
        self._home = None if self.home is None else double(self.home).clone()
        groups, columns, taps, outputs = self._start.shape
        self._moments = Moments(groups, columns * (1 if form.alike else taps), outputs, self._start.device)
        self._left = 0

    @property
    def home(self) -> Tensor | None:
        """The tensor that takes up the intercept."""
        return self.bias if self.mean is None else self.mean

    @property
    def shift(self) -> Tensor | float:
        """What the running mean of the norm adds to the output by now: `(O,)`."""
        return 0.0 if self.mean is None or self._home is None else self._home - double(self.mean)

    def add(self, call: LayerCall, output: torch.Size, positions: Tensor, target: Tensor) -> None:
        """Add what a call reads for positions of an output of this size, and its target `(P, O)` in float64.

        Raises:
            ValueError: if one of them is not finite.
        """
        form, moments = self.form, self._moments
        groups, _, taps, _ = self._start.shape
        fixed = double(call.bias) if call.bias is not None and self.bias is None else None
        offset = self._home if self.bias is not None else fixed
        step = max(1, _ELEMENTS // (groups * form.columns.shape[1] * taps))
        for part, wanted in zip(positions.split(step), target.split(step), strict=True):
            x = columns_at(call, output, part)[:, :, self._kept].movedim(0, 1)  # (groups, P, C, taps)
            x = x * self._live[:, None, :, None] if self._partly else x
            y = wanted.unflatten(1, (groups, -1)).movedim(0, 1)
            r = y - x.flatten(2) @ self._start.flatten(1, 2)
            if offset is not None:
                r = r - offset.reshape(groups, 1, -1)
            x = x.sum(3) if form.alike else x.flatten(2)
            moments.add(x, r, y)
        if not bool(torch.isfinite(moments.rr.sum() + moments.xr.sum())):
            raise ValueError(
                f"'{form.name}' reads or puts out values that are not finite: refit on inputs for which the "
                'dense and the masked model are finite'
            )
        self._left -= 1

    def expect(self, calls: int) -> None:
        """Say how many calls of the next batch will be added."""
        self._left = calls

    @property
    def complete(self) -> bool:
        """Whether all calls of this batch have been added."""
        return self._left <= 0

    def refit_(self, ridge: float) -> None:
        """Write the weight and the intercept that fit all moments so far."""
        form, moments = self.form, self._moments
        groups, columns, taps, _ = self._start.shape
        live = form.outputs.to(self._start.device)
        found = solve(moments, live, ridge, self.home is not None)
        change = found.weight.unflatten(1, (columns, -1)).expand(-1, -1, taps, -1)
        matrix = as_matrix(form.kind, groups, double(self._weight))
        matrix = matrix.index_add(1, self._kept, change)
        self.weight.copy_(as_weight(form.kind, matrix, self.weight.shape))
        if self.home is not None and self._home is not None:
            sign = 1 if self.mean is None else -1
            self.home.copy_(self._home + sign * found.intercept.flatten())
        self.solution = found
