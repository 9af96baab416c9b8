"""How much a unit matters: scores by name.

A score is fed at the optimizer's step, where gradients are accumulated, averaged and un-scaled. It is
asked for when units have to go. To add one: a subclass, `@register_importance("name")`, and a row in the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..names import look_up
from .gates import Gates, untouched
from .per_sample import SampleTaps

if TYPE_CHECKING:
    from ..coupling import Group

Closure = Callable[[], None]

IMPORTANCES: dict[str, type[Importance]] = {}


def register_importance(name: str) -> Callable[[type[Importance]], type[Importance]]:
    """Enter an importance under `name`.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @register_importance("constant")
        ... class Constant(Importance):
        ...     def scores(self): return {g.name: torch.ones(g.units) for g in self.groups}
    """

    def enter(cls: type[Importance]) -> type[Importance]:
        if name in IMPORTANCES:
            raise ValueError(f"importance '{name}' is already registered, by {IMPORTANCES[name].__qualname__}")
        IMPORTANCES[name] = cls
        return cls

    return enter


def build_importance(spec: str | dict[str, Any], groups: Sequence[Group]) -> Importance:
    """Build an importance from its name, or from a dict of `type` and options.

    Raises:
        ValueError: unknown name or option.

    Example:
        >>> build_importance(dict(type="curvature", probes=2), comb(model, images).groups)
    """
    options = {'type': spec} if isinstance(spec, str) else dict(spec)
    cls = look_up(IMPORTANCES, options.pop('type', None), 'importance')
    try:
        return cls(groups, **options)
    except TypeError as error:
        raise ValueError(f"importance '{spec}': {error}") from error


class Importance:
    """Scores of the units of some groups, added up over iterations since `reset`.

    Args:
        groups: those of a comb that may be pruned; names in them are those of the model that `accumulate` gets.
        seed: of whatever is random, the same on all processes.

    Attributes:
        needs_closure: `accumulate` wants a closure that runs this step's forward and backward once more.
        needs_batches: it tells batches apart, and sees scaled losses in mixed precision.
        every_iteration: scores are a sum over iterations; otherwise only the newest `accumulate` counts.
        iterations: how many entered the scores since `reset`.
        skipped: how many were left out since training began, because a gradient was not finite.
    """

    needs_closure: ClassVar[bool] = False
    needs_batches: ClassVar[bool] = False
    every_iteration: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group], seed: int = 0) -> None:
        self.groups = groups
        self.generator = torch.Generator().manual_seed(seed)
        self.gates = Gates(groups)
        self.total = torch.zeros(self.gates.units)
        self._counts = torch.zeros(2, dtype=torch.long)  # iterations, skipped; a tensor: nothing waits for the device

    @property
    def iterations(self) -> int:
        return int(self._counts[0])

    @property
    def skipped(self) -> int:
        return int(self._counts[1])

    def check(self, model: nn.Module) -> None:
        """Refuse a model that this score cannot be taken of, before any training.

        Raises:
            ValueError: with the groups that cannot be scored, and why.
        """
        self.gates.check(model)

    def attach(self, model: nn.Module) -> None:
        """Start to watch the model's forward passes, if this score has to."""

    def detach(self) -> None:
        """Stop watching."""

    def next_batch(self) -> None:
        """Say that another batch follows before the optimizer's step (gradient accumulation)."""

    def accumulate(self, model: nn.Module, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        """Add one optimizer step's evidence: call it before the step, with gradients averaged and un-scaled.

        Args:
            model: the bare model that was combed.
            closure: runs forward and backward of the step's batches, leaving un-scaled gradients in `.grad`.
            loss_scale: what losses were multiplied by before backward (mixed precision).
        """
        raise NotImplementedError

    def scores(self) -> dict[str, Tensor]:
        """Return the raw scores, one tensor (units,) per group: the lowest goes first."""
        return self.gates.split(self.total)

    def reset(self) -> None:
        """Forget what was added up."""
        self.total = torch.zeros_like(self.total)
        self._counts[0] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as plain tensors."""
        return {
            'total': self.total.cpu().clone(),
            'counts': self._counts.cpu().clone(),
            'generator': self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a state from `state_dict`.

        Raises:
            ValueError: it belongs to another comb.
        """
        if state['total'].shape != self.total.shape:
            raise ValueError(f'saved scores are of {len(state["total"])} units, the model has {len(self.total)}')
        self.total, self._counts = state['total'].clone(), state['counts'].clone()
        self.generator.set_state(state['generator'].cpu())

    def _add(self, evidence: Tensor) -> None:
        """Add (units,) to the total, unless anything in it is not finite; without waiting for the device."""
        finite = torch.isfinite(evidence).all()
        if self.total.device != evidence.device or self.total.dtype != evidence.dtype:
            self.total = self.total.to(evidence)
            self._counts = self._counts.to(evidence.device)
        self.total = self.total + torch.where(finite, evidence, torch.zeros_like(evidence))
        self._counts = self._counts + torch.stack([finite, ~finite])


@register_importance('hessian')
class Hessian(Importance):
    """Squared gradient of the unit's gate, summed over iterations.

    Source: CPD (arXiv 2408.03046), I_j = (sum over e of w_e * dL/dw_e)^2, here on one cut through the unit.

    Example:
        >>> score = Hessian(comb(model, images).groups)
        >>> loss.backward()
        >>> score.accumulate(model)
        >>> score.scores()
    """

    def accumulate(self, model: nn.Module, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        self._add(self.gates.gradient(model).square())


@register_importance('curvature')
class Curvature(Importance):
    """Squared Hessian-vector product on the gates, by a finite difference along random directions.

    Args:
        groups: those that may be pruned.
        probes: directions z ~ N(0, I) per step, averaged; each costs one more forward and backward.
        step: h in (grad(1 + h z) - grad(1)) / h.

    Source: CPD: ||H||_F^2 = E_z ||H z||^2, taken per unit on the gates instead of the weights.
    """

    needs_closure = True

    def __init__(self, groups: Sequence[Group], probes: int = 1, step: float = 1e-2, seed: int = 0) -> None:
        super().__init__(groups, seed)
        if probes < 1 or step <= 0:
            raise ValueError(f'curvature needs probes >= 1 and step > 0, got {probes} and {step}')
        self.probes, self.step = probes, step

    def accumulate(self, model: nn.Module, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
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
        self._add(found / self.probes)

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
        >>> score = GroupFisher(comb(model, images).groups)
        >>> score.attach(model)
        >>> model(images).sum().backward()
        >>> score.accumulate(model)
    """

    needs_batches = True

    def __init__(self, groups: Sequence[Group], seed: int = 0) -> None:
        super().__init__(groups, seed)
        self._taps: SampleTaps | None = None
        self._pending: Tensor | None = None

    def check(self, model: nn.Module) -> None:
        super().check(model)
        SampleTaps(self.gates, model).remove()

    def attach(self, model: nn.Module) -> None:
        self.detach()
        self._taps = SampleTaps(self.gates, model)

    def detach(self) -> None:
        if self._taps is not None:
            self._taps.remove()
        self._taps = self._pending = None

    def next_batch(self) -> None:
        found = self._taps.pop() if self._taps is not None else None
        if found is not None:
            squares = found.square().sum(0)
            self._pending = squares if self._pending is None else self._pending + squares

    def accumulate(self, model: nn.Module, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        if self._taps is None:
            raise ValueError("importance 'group_fisher' watches forward passes: call attach(model) before them")
        self.next_batch()
        self._taps.check(model)
        if self._pending is not None:
            self._add(self._pending / loss_scale**2)
            self._pending = None


@register_importance('magnitude')
class Magnitude(Importance):
    """Norm of the unit's weights over all members with one of `roles`, the higher the more important.

    Args:
        groups: those that may be pruned.
        p: 1 for the sum of absolute values, 2 for the sum of squares.
        roles: members that count; statistics of a norm never do.

    Source: Li et al., Pruning Filters for Efficient ConvNets, ICLR 2017 (roles=('out',) is theirs).
    """

    every_iteration = False

    def __init__(
        self,
        groups: Sequence[Group],
        p: int = 1,
        roles: Sequence[str] = ('out', 'in', 'affine', 'free'),
        seed: int = 0,
    ) -> None:
        super().__init__(groups, seed)
        if p not in (1, 2):
            raise ValueError(f'magnitude takes p=1 or p=2, got {p}')
        self.p, self.roles = p, tuple(roles)

    def check(self, model: nn.Module) -> None:
        """Refuse nothing: weights are there, with or without a gradient."""

    @torch.no_grad()
    def accumulate(self, model: nn.Module, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        device = next(iter(parameters.values())).device
        norms: dict[tuple[str, int], Tensor] = {}
        found = []
        for group in self.groups:
            size = torch.zeros(group.units, device=device)
            for member in group.members:
                if member.role in self.roles and member.tensor in parameters:
                    at = (member.tensor, member.dim)
                    if at not in norms:
                        others = [d for d in range(parameters[at[0]].dim()) if d != at[1]]
                        powers = parameters[at[0]].abs() if self.p == 1 else parameters[at[0]].square()
                        norms[at] = powers.sum(others) if others else powers
                    size = size + norms[at][member.index.to(device)].sum(1)
            found.append(size)
        self.reset()
        self._add(torch.cat(found))


@register_importance('random')
class Random(Importance):
    """Uniform noise, drawn anew after each `reset`: the control that every score has to beat."""

    every_iteration = False

    def __init__(self, groups: Sequence[Group], seed: int = 0) -> None:
        super().__init__(groups, seed)
        self._draw()

    def check(self, model: nn.Module) -> None:
        """Refuse nothing."""

    def _draw(self) -> None:
        self.total = torch.rand(self.gates.units, generator=self.generator)

    def accumulate(self, model: nn.Module, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        self._counts[0] += 1

    def reset(self) -> None:
        self._draw()
        self._counts[0] = 0
