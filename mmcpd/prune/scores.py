"""The scores: each a class, entered in the table of importances under its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..coupling import Group, Role
from ..example import Example
from ..names import look_up
from .cut_calls import CutCalls, refusal
from .gates import Cut, sum_except, untouched
from .importance import Closure, Importance, register_importance
from .layouts import Layout, find_layouts
from .per_sample import SampleTaps
from .schedule import is_count


@register_importance('hessian')
class Hessian(Importance):
    """Squared gradient of the unit's gate, summed over iterations.

    Source: CPD (arXiv 2408.03046), I_j = (sum over e of w_e * dL/dw_e)^2, here on one cut through the unit.

    Example:
        >>> score = Hessian(coupling.groups)
        >>> model(images).square().sum().backward()
        >>> score.accumulate(model)
        >>> score.scores()['conv1'].shape
        torch.Size([8])
    """

    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        self.add(self.gates.gradient(model).square())


@register_importance('curvature')
class Curvature(Importance):
    """Squared Hessian-vector product on the gates, by a finite difference along random directions.

    That is (grad(1 + h z) - grad(1)) / h with h = `step`, averaged over `probes` directions z ~ N(0, I); each costs one
    more forward and backward.

    Source: CPD: ||H||_F^2 = E_z ||H z||^2, taken per unit on the gates instead of the weights.

    Example:
        >>> score = Curvature(coupling.groups, probes=2)
        >>> def closure():
        ...     model(images).square().mean().backward()
        >>> closure()
        >>> score.accumulate(model, closure=closure)
        >>> score.scores()['conv2'].shape
        torch.Size([4])
    """

    needs_closure = True

    def __init__(self, groups: Sequence[Group], *, probes: int = 1, step: float = 1e-2, seed: int = 0) -> None:
        super().__init__(groups, seed=seed)
        if not is_count(probes, 1) or not isinstance(step, int | float) or step <= 0:
            raise ValueError(f'curvature needs probes >= 1 and step > 0, got {probes} and {step}')
        self.probes, self.step = probes, step

    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        if closure is None:
            raise ValueError(
                "importance 'curvature' runs more forward and backward passes: give accumulate() a closure"
            )
        base = self.gates.gradient(model)
        found = torch.zeros_like(base)
        for _ in range(self.probes):
            z = torch.randn(self.gates.units, generator=self.generator, dtype=base.dtype).to(base.device)
            with untouched(model):
                moved = self._gradient_at(model, 1 + self.step * z, closure)
            found += ((moved - base) / self.step).square()
        self.add(found / self.probes)

    def _gradient_at(self, model: nn.Module, gates: Tensor, closure: Closure) -> Tensor:
        """Return dL/dm at `gates`, (units,); weights stay scaled and gradients overwritten."""
        for parameter in model.parameters():
            parameter.grad = None
        self.gates.scale_(model, gates)
        closure()
        # sum of w' * dL/dw' is m * dL/dm, whatever other gates the same weight has.
        return self.gates.gradient(model) / gates


@register_importance('group_fisher')
class GroupFisher(Importance):
    """Squared gradient of the unit's gate sample by sample, summed over samples and iterations.

    `attach` it before the first forward; call `next_batch` between batches where gradients are accumulated
    over several. Processes see different samples: add their scores up before they choose.

    Source: Liu et al., Group Fisher Pruning, ICML 2021, equation 4.

    Example:
        >>> score = GroupFisher(coupling.groups)
        >>> score.attach(model)
        >>> model(images).square().sum().backward()
        >>> score.accumulate(model)
        >>> score.detach()
        >>> score.scores()['conv1'].shape
        torch.Size([8])
    """

    needs_batches = True

    def __init__(self, groups: Sequence[Group], *, seed: int = 0) -> None:
        super().__init__(groups, seed=seed)
        self.layouts: Mapping[Cut, Layout] = {}
        self._taps: SampleTaps | None = None
        self._pending: Tensor | None = None

    def check(self, model: nn.Module, example: Example | None = None) -> None:
        super().check(model)
        if example is not None:
            self.layouts = find_layouts(model, self.gates, example)
            for cut, layout in ((cut, layout) for cut, layout in self.layouts.items() if layout.dim is None):
                why = f"group_fisher cannot tell samples apart where '{cut.tensor}' is used: {layout.reason}"
                raise refusal(self.gates, cut, f"{why}; 'gauss_newton' can do without")

    def attach(self, model: nn.Module) -> None:
        self.detach()
        self._taps = SampleTaps(self.gates, model, self.layouts)
        self._taps.watch()

    def detach(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps = self._pending = None

    def next_batch(self) -> None:
        found = self._taps.pop() if self._taps is not None else None
        if found is not None:
            squares = found.square().sum(0)
            self._pending = squares if self._pending is None else self._pending + squares

    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        if self._taps is None:
            raise ValueError("importance 'group_fisher' watches forward passes: call attach(model) before them")
        self.next_batch()
        self._check_seen(self._taps.calls, model)
        if self._pending is not None:
            self.add(self._pending / loss_scale**2)
            self._pending = None

    def _check_seen(self, calls: CutCalls, model: nn.Module) -> None:
        """Refuse a cut that has a gradient though no call has shown it, and start a new record."""
        for cut in calls.unseen():
            grad = model.get_parameter(cut.tensor).grad
            if grad is not None and bool(grad.any()):
                calls.check('group_fisher')
        calls.seen.clear()


@register_importance('magnitude')
class Magnitude(Importance):
    """Norm of the unit's weights over all members with one of `roles`, the higher the more important.

    It is the sum of absolute values (`p=1`) or of squares (`p=2`). Statistics of a norm never count.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (roles=('out',) is theirs).

    Example:
        >>> score = Magnitude(coupling.groups, p=2)
        >>> score.accumulate(model)
        >>> score.scores()['conv1'].argsort().shape
        torch.Size([8])
    """

    every_iteration = False

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        p: int = 1,
        roles: Sequence[str] = ('out', 'in', 'affine', 'free'),
        seed: int = 0,
    ) -> None:
        super().__init__(groups, seed=seed)
        if p not in (1, 2):
            raise ValueError(f'magnitude takes p=1 or p=2, got {p}')
        if not roles:
            raise ValueError(f'magnitude needs roles, some of {", ".join(r.value for r in Role)}')
        self.p, self.roles = p, tuple(look_up({r.value: r for r in Role}, role, 'role') for role in roles)

    def check(self, model: nn.Module, example: Example | None = None) -> None:
        """Refuse nothing: weights are there, with or without a gradient."""

    @torch.no_grad()
    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        device = next(iter(parameters.values())).device
        norms: dict[Cut, Tensor] = {}
        found = []
        for group in self.groups:
            size = torch.zeros(group.units, device=device)
            for member in group.members:
                if member.role in self.roles and member.tensor in parameters:
                    cut, weight = Cut(member.tensor, member.dim), parameters[member.tensor]
                    if cut not in norms:
                        norms[cut] = sum_except(weight.abs() if self.p == 1 else weight.square(), member.dim)
                    size = size + norms[cut][member.index.to(device)].sum(1)
            found.append(size)
        self.reset()
        self.add(torch.cat(found))


@register_importance('random')
class Random(Importance):
    """Uniform noise, drawn anew after each `reset`: the baseline that every score has to beat.

    Example:
        >>> Random(coupling.groups, seed=1).scores()['conv1'].shape
        torch.Size([8])
    """

    every_iteration = False

    def __init__(self, groups: Sequence[Group], *, seed: int = 0) -> None:
        super().__init__(groups, seed=seed)
        self._draw()

    def check(self, model: nn.Module, example: Example | None = None) -> None:
        """Refuse nothing."""

    def _draw(self) -> None:
        self.total = torch.rand(self.gates.units, generator=self.generator)

    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        self._counts[0] += 1

    def reset(self) -> None:
        self._draw()
        self._counts[0] = 0
