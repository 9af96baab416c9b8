"""How much a unit matters: what a score is, and the table of scores by name.

A score is fed at the optimizer's step, where gradients are accumulated, averaged and un-scaled. It is
read when units are to be removed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..coupling import Group
from ..example import Example
from ..names import check_options, look_up
from ..slim.trial import double
from .gates import Gates
from .options import checked_options

Closure = Callable[[], Iterable[object] | None]

IMPORTANCES: dict[str, type[Importance]] = {}


def register_importance(name: str) -> Callable[[type[Importance]], type[Importance]]:
    """Enter an importance under `name`.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> @register_importance('taylor')
        ... class Taylor(Importance):
        ...     def accumulate(self, model, *, closure=None, loss_scale=1.0):
        ...         self.add(self.gates.gradient(model).abs())
        >>> IMPORTANCES.pop('taylor').__name__    # this example leaves no trace
        'Taylor'
    """

    def enter(cls: type[Importance]) -> type[Importance]:
        if name in IMPORTANCES:
            raise ValueError(f"importance '{name}' is already registered, by {IMPORTANCES[name].__qualname__}")
        IMPORTANCES[name] = cls
        return cls

    return enter


def build_importance(spec: str | Mapping[str, object], groups: Sequence[Group], *, seed: int = 0) -> Importance:
    """Build an importance of some groups from its name, or from a mapping of `type` and options.

    Its random numbers start from `seed`, unless the options name another.

    Raises:
        ValueError: unknown name or option, or a value that makes no sense.

    Example:
        >>> build_importance(dict(type='curvature', probes=2), coupling.groups).probes
        2
    """
    options: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {'type': spec}
    kind = options.pop('type', None)
    if kind is None:
        raise ValueError(f"importance needs a type, as dict(type='curvature', probes=2): got {spec}")
    cls: Callable[..., Importance] = look_up(IMPORTANCES, kind, 'importance')
    known = [name for name in inspect.signature(cls).parameters if name != 'groups']
    check_options(options, known, f"importance '{kind}'")
    options = checked_options(cls, {'seed': seed, **options}, f"importance '{kind}'")
    if options['seed'] < 0:
        raise ValueError(f'seed is an integer, 0 or more: got {options["seed"]!r}')
    return cls(groups, **options)


def check_importance(spec: str | Mapping[str, object], *, seed: int = 0) -> None:
    """Refuse an importance that cannot be built; that takes no model.

    Raises:
        ValueError: as `build_importance`.

    Example:
        >>> check_importance('hesian')
        Traceback (most recent call last):
        ValueError: unknown importance 'hesian': did you mean hessian?
    """
    build_importance(spec, (), seed=seed)


class Importance:
    """Scores of the units of a coupling's groups, added up over iterations since `reset`.

    The names in `groups` are those of the model that `accumulate` gets; `seed` is the same on all processes.

    Attributes:
        needs_closure: `accumulate` wants a closure that runs this step's forward and backward once more.
        needs_outputs: it wants a closure that runs the forward alone, and yields the outputs batch by batch.
        needs_batches: it tells batches apart, and sees scaled losses in mixed precision.
        every_iteration: scores are a sum over iterations; otherwise only the newest `accumulate` counts.
        iterations: how many entered the scores since `reset`.
        skipped: how many were left out since training began, because a gradient was not finite.

    Example:
        >>> class Bias(Importance):
        ...     def accumulate(self, model, *, closure=None, loss_scale=1.0):
        ...         self.add(torch.cat([model.get_parameter(f'{g.name}.bias').detach().abs() for g in self.groups]))
        >>> score = Bias(coupling.groups)
        >>> score.accumulate(model)
        >>> score.iterations
        1
    """

    needs_closure: ClassVar[bool] = False
    needs_outputs: ClassVar[bool] = False
    needs_batches: ClassVar[bool] = False
    every_iteration: ClassVar[bool] = True

    def __init__(self, groups: Sequence[Group], *, seed: int = 0) -> None:
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

    def check(self, model: nn.Module, example: Example | None = None) -> None:
        """Refuse a model that this score cannot be taken of, before any training; `example` is what it was combed with.

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

    def accumulate(self, model: nn.Module, *, closure: Closure | None = None, loss_scale: float = 1.0) -> None:
        """Add one optimizer step's evidence: call it before the step, with gradients averaged and un-scaled.

        The model is the bare one that was combed. `closure` runs forward and backward of the step's batches and leaves
        un-scaled gradients in `.grad`; for `needs_outputs` it runs the forward only and yields the outputs, and this
        method sees to eval mode, gradients, and that the model stays as it was. Losses were multiplied by `loss_scale`
        before backward (mixed precision).
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
            ValueError: it is of another model.
        """
        if state['total'].shape != self.total.shape:
            raise ValueError(f'saved scores are of {len(state["total"])} units, the model has {len(self.total)}')
        self.total, self._counts = state['total'].clone(), state['counts'].clone()
        self.generator.set_state(state['generator'].cpu())

    def add(self, evidence: Tensor) -> None:
        """Add (units,) to the total, unless anything in it is not finite; without waiting for the device."""
        finite = torch.isfinite(evidence).all()
        if self.total.device != evidence.device or self.total.dtype != evidence.dtype:
            self.total = self.total.to(evidence)
            self._counts = self._counts.to(evidence.device)
        self.total = self.total + torch.where(finite, evidence, torch.zeros_like(evidence))
        self._counts = self._counts + torch.stack([finite, ~finite])


def averaged(importance: Importance, device: torch.device) -> dict[str, Tensor] | None:
    """Return the scores averaged over processes, so that all choose the same units; None where none scored.

    Example:
        >>> averaged(build_importance('hessian', coupling.groups), torch.device('cpu')) is None
        True
    """
    scores, iterations = importance.scores(), importance.iterations
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        flat = torch.cat([torch.tensor([iterations], device=device), *(s.to(device) for s in scores.values())])
        flat = double(flat)
        dist.all_reduce(flat)
        iterations, parts = int(flat[0]), flat[1:].split([len(s) for s in scores.values()])
        scores = {name: part / dist.get_world_size() for name, part in zip(scores, parts, strict=True)}
    return scores if iterations else None
