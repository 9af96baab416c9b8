"""The Gauss-Newton score: how much a unit moves the outputs, without labels."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..coupling import Group
from ..example import Example
from ..nested import tensors_in
from .gates import Cut
from .importance import Closure, Importance, register_importance
from .layouts import CONSTANT, Layout, find_layouts, scoring
from .per_sample import SampleTaps
from .schedule import is_count


@register_importance('gauss_newton')
class GaussNewton(Importance):
    """Squared gradient of a random sum of the outputs by the unit's gate, summed over samples: no labels.

    That is (d(r . z) / dm)^2 for each sample, with outputs z in eval mode and r ~ N(0, I); in expectation the sum of
    squares of dz/dm, the Gauss-Newton curvature of distilling the model into itself. Outputs are all floating-point
    tensors of the model, each divided by its standard deviation over the batches so far.

    Args:
        draws: so many r are averaged; each costs one more backward.
        softmax: the outputs go through a softmax over dimension 1, (N, C) or (N, C, H, W): what it ignores, a shift of
            all classes alike, does not count.

    Source: Martens, New insights and perspectives on the natural gradient method, JMLR 2020, section 8.

    Example:
        >>> score = GaussNewton(coupling.groups)
        >>> score.accumulate(model, closure=lambda: [model(images)])
        >>> score.scores()['conv1'].shape
        torch.Size([8])
    """

    needs_outputs = True

    def __init__(self, groups: Sequence[Group], *, draws: int = 1, softmax: bool = False, seed: int = 0) -> None:
        super().__init__(groups, seed=seed)
        if not is_count(draws, 1) or not isinstance(softmax, bool):
            raise ValueError(f'gauss_newton needs draws >= 1 and softmax True or False, got {draws!r} and {softmax!r}')
        self.draws, self.softmax = draws, softmax
        self.layouts: Mapping[Cut, Layout] = {}
        self._moments = torch.zeros(0, 3, dtype=torch.float64)  # of each output: elements, sum, sum of squares

    def check(self, model: nn.Module, example: Example | None = None) -> None:
        if example is not None:
            self.layouts = find_layouts(model, self.gates, example)
            self._warn()

    def _warn(self) -> None:
        """Say where samples cannot be told apart though inputs matter."""
        unknown = [(cut, at) for cut, at in self.layouts.items() if at.dim is None and at != CONSTANT]
        if unknown:
            (cut, layout), more = unknown[0], f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''
            warnings.warn(
                f"gauss_newton counts each batch as one sample where '{cut.tensor}'{more} is used: {layout.reason}; "
                'the score is right in the mean but noisier: give batches of one sample, or more draws',
                stacklevel=3,
            )

    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        if closure is None:
            raise ValueError("importance 'gauss_newton' reads outputs: give accumulate() a closure that yields them")
        taps = SampleTaps(self.gates, model, self.layouts)
        with scoring(model, self.gates), taps:
            found = [self._squares(model, taps, outputs) for outputs in closure() or ()]
        if not found:
            raise ValueError("importance 'gauss_newton' got no outputs: the closure yields those of each batch")
        self.add(torch.stack(found).sum(0))

    def reset(self) -> None:
        super().reset()
        self._moments = self._moments[:0]

    def state_dict(self) -> dict[str, Tensor]:
        return {**super().state_dict(), 'moments': self._moments.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._moments = state['moments'].cpu().clone()

    def _squares(self, model: nn.Module, taps: SampleTaps, outputs: object) -> Tensor:
        """Return the squares of one batch, (units,), summed over its samples."""
        floating = [t for t in tensors_in(outputs) if t.is_floating_point()]
        if any(bool((z.isnan() | z.isposinf()).any()) for z in floating):  # skipped, and nothing is said of the spread
            return torch.full((self.gates.units,), torch.nan, device=floating[0].device)
        scales = self._scales(floating)
        floating = [z.masked_fill(z.isneginf(), 0) if bool(z.isneginf().any()) else z for z in floating]  # a mask
        pairs = [(z, scale) for z, scale in zip(floating, scales, strict=True) if z.requires_grad]
        if not pairs:
            raise ValueError(
                'no output has a gradient: the forward detaches it, runs under no_grad, or gives out no floating point'
            )
        total = torch.zeros((), device=pairs[0][0].device)
        tables = {cut: model.get_parameter(cut.tensor) for cut in taps.calls.unseen()}
        for draw in range(self.draws):
            directions = [self._direction(z) * scale for z, scale in pairs]
            with torch.autograd.set_multithreading_enabled(False):  # a checkpoint runs again where taps are watching
                _, *gradients = torch.autograd.grad(
                    [z for z, _ in pairs],
                    [taps.anchor, *tables.values()],
                    directions,
                    retain_graph=draw + 1 < self.draws,
                    allow_unused=True,
                )
            for cut, gradient in zip(tables, gradients, strict=True):
                if gradient is not None:
                    taps.receive_table(cut, gradient)
            found = taps.pop()
            if found is not None:
                total = total + found.square().sum(0) / self.draws
        return total.expand(self.gates.units)

    def _direction(self, z: Tensor) -> Tensor:
        """Return r for one output."""
        seed = int(torch.randint(2**62, (), generator=self.generator))
        r = torch.randn(z.shape, generator=torch.Generator(z.device).manual_seed(seed), dtype=z.dtype, device=z.device)
        return r - r.mean(1, keepdim=True) if self.softmax and z.dim() in (2, 4) and z.shape[1] > 1 else r

    def _scales(self, outputs: Sequence[Tensor]) -> list[float]:
        """Return 1 / standard deviation of each output over the batches so far, these included."""
        new = torch.tensor([_moments(z) for z in outputs], dtype=torch.float64).reshape(-1, 3)
        if len(self._moments) not in (0, len(new)):
            raise ValueError(
                f'batches have {len(self._moments)} and {len(new)} output tensors: give one kind at a time'
            )
        self._moments = self._moments + new if len(self._moments) else new
        elements, total, squares = self._moments.unbind(1)
        spread = (squares / elements - (total / elements).square()).clamp(min=0).sqrt()
        return torch.where(spread > 0, 1 / spread, 1).tolist()


def _moments(z: Tensor) -> tuple[float, float, float]:
    """Return (elements, sum, sum of squares) of an output."""
    z = z[z.isfinite()]
    if not z.numel():
        return 0.0, 0.0, 0.0
    variance, mean = (float(value) for value in torch.var_mean(z.detach().float(), correction=0))
    return z.numel(), z.numel() * mean, z.numel() * (variance + mean**2)
