"""Prune one model inside any training loop: score and mask at each optimizer step, remove when it is time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..names import look_up, match, near
from ..slim.mask import Masker
from .importance import IMPORTANCES, Closure, build_importance
from .normalize import NORMALIZERS, normalize
from .schedule import METRICS, Keep, Schedule, check_reachable, select, share

if TYPE_CHECKING:
    from ..comb.groups import Coupling


class Pruner:
    """Bring a model down along a schedule, from `start` on.

    Args:
        model: the bare model that was combed.
        comb: what belongs together in it.
        optimizer: the one that steps its parameters.
        iterations: length of the run, for `begin` and `end` that are shares of it.
        begin, end, interval, target, metric, curve, units_per_event: as in `Schedule`.
        importance: a name in `IMPORTANCES`, or a dict of `type` and options.
        normalize: a name in `NORMALIZERS`.
        min_units, round_to, ignore: what must stay, as in `select`.
        seed: of the importance's random numbers.

    Attributes:
        keep: the units that stay now.
        closure: runs a step's forward and backward once more, for importances that ask for it.
        loss_scale: what losses are multiplied by before backward (mixed precision).

    Raises:
        ValueError: an option that makes no sense, or groups that the importance cannot score.
        PruneError: nothing can be pruned, or not as far as the target.

    Example:
        >>> c = comb(model, images)
        >>> pruner = Pruner(model, c, optimizer, 400, begin=100, end=300, interval=10, target=0.5)
        >>> for iteration, (x, y) in enumerate(batches):
        ...     if iteration == pruner.schedule.begin:
        ...         pruner.start()
        ...     loss_of(model(x), y).backward()
        ...     optimizer.step()
        ...     pruner.after(iteration + 1)
        >>> small = slim(model, c, pruner.keep)
    """

    def __init__(
        self,
        model: nn.Module,
        comb: Coupling,
        optimizer: torch.optim.Optimizer,
        iterations: int,
        *,
        begin: int | float,
        end: int | float,
        interval: int,
        target: float,
        metric: str = 'macs',
        curve: str = 'cubic',
        units_per_event: int | None = None,
        importance: str | Mapping[str, Any] = 'hessian',
        normalize: str = 'memory',
        min_units: int = 1,
        round_to: int = 1,
        ignore: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        look_up(NORMALIZERS, normalize, 'normalizer')
        self.schedule = Schedule(begin, end, interval, target, metric, curve, units_per_event).resolve(iterations)
        check_reachable(comb, self.schedule, min_units, round_to, ignore)
        self.model, self.comb, self.optimizer, self.normalizer = model, comb, optimizer, normalize
        self.min_units, self.round_to, self.ignore = min_units, round_to, tuple(ignore)
        left_alone = match(ignore, [group.name for group in comb.groups])
        pruned = [group for group in comb.groups if group.name not in left_alone]
        self.importance = build_importance(_with_seed(importance, seed), pruned)
        self.importance.check(model)
        self.masker = Masker(model, comb)
        self.keep: Keep = comb.keep()
        self.closure: Closure | None = None
        self.loss_scale = 1.0
        self._handles: list[RemovableHandle] = []
        self._last = 0  # finished iterations when units went last
        self._waiting = False  # it was time, but nothing had been scored

    def start(self) -> None:
        """Mask by the keep as it is, and from now on watch the model's passes and the optimizer's steps."""
        self.stop()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]
        if not self.done:
            self.importance.attach(self.model)
        self._mask()

    def stop(self) -> None:
        """Stop watching; the model stays masked."""
        self.importance.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def started(self) -> bool:
        return bool(self._handles)

    @property
    def done(self) -> bool:
        """Tell whether the last units went: masks stay, nothing is scored any more."""
        return self._last >= self.schedule.end

    def after(self, iteration: int) -> bool:
        """Remove units if it is time; call it after each iteration.

        Where no gradient of an interval was finite, or none was applied, the units go as soon as one was.

        Args:
            iteration: the number of finished ones.

        Returns:
            Whether units were chosen.
        """
        if not self.started or self.done:
            return False
        self._waiting = self._waiting or self.schedule.due(iteration)
        if not self._waiting:
            return False
        if not self.importance.every_iteration:
            self.importance.accumulate(self.model)
        if self.importance.iterations == 0:
            return False
        scores = self._averaged(self.importance.scores())
        self.keep = select(
            normalize(scores, self.comb, self.keep, self.normalizer),
            self.comb,
            self.keep,
            self.schedule.ratio(iteration),
            self.schedule.metric,
            self.min_units,
            self.round_to,
            self.ignore,
            self.schedule.units_per_event,
        )
        self.importance.reset()
        self._last, self._waiting = iteration, False
        if self.done:
            self.importance.detach()
        self._mask()
        return True

    def left(self) -> dict[str, float]:
        """Return what is left of each metric, as a share of the dense model's."""
        return {metric: share(self.comb, self.keep, metric) for metric in METRICS}

    def state_dict(self) -> dict[str, Any]:
        """Return keep and scores as plain tensors."""
        return {
            'keep': {name: k.clone() for name, k in self.keep.items()},
            'importance': self.importance.state_dict(),
            'last': self._last,
            'waiting': self._waiting,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; call it before `start`.

        Raises:
            ValueError: it is of another model.
        """
        self.comb.check(state['keep'])
        self.keep = {group.name: state['keep'][group.name].cpu() for group in self.comb.groups}
        self.importance.load_state_dict(state['importance'])
        self._last, self._waiting = int(state['last']), bool(state['waiting'])

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, 'grad_scale', None) is not None:
            raise ValueError('a fused optimizer sees scaled gradients in mixed precision: set fused=False to prune')
        if self.importance.every_iteration and not self.done:
            self.importance.accumulate(self.model, self.closure, self.loss_scale)
        # Weights and state of removed rows are zero. Without a gradient they stay so, whatever the optimizer makes of
        # each element, and one product does for the weight, its momentum and its second moment.
        for tensor, factor in self._factors():
            if tensor.grad is not None:
                tensor.grad.mul_(factor)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for tensor, factor in self._factors():
            if not isinstance(tensor, nn.Parameter):  # statistics
                tensor.mul_(factor)

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is masked, and its factors of 0 and 1."""
        if all(bool(k.all()) for k in self.keep.values()):
            return []
        with torch.no_grad():
            return self.masker.factors(self.keep)

    def _mask(self) -> None:
        """Write zeros into removed rows, of the optimizer's state too: momentum would bring them back."""
        if self._factors():
            self.masker.apply_(self.keep)
            self.masker.apply_state_(self.keep, self.optimizer)

    def _averaged(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Average over processes, so that all choose the same units."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return scores
        flat = torch.cat(list(scores.values())).to(next(self.model.parameters()).device)
        dist.all_reduce(flat)
        parts = (flat / dist.get_world_size()).split([len(s) for s in scores.values()])
        return dict(zip(scores, parts, strict=True))


def check_options(options: Mapping[str, Any]) -> None:
    """Check a pruner's options as far as that is possible without a model.

    Args:
        options: keyword arguments of `Pruner`.

    Raises:
        ValueError: an unknown option or name, a missing one, or a value that makes no sense.

    Example:
        >>> check_options({"begin": 0, "end": 100, "interval": 10, "target": 1.5})
        Traceback (most recent call last):
        ValueError: target is the share of macs that remains, between 0 and 1: got 1.5
    """
    known = {
        name: p for name, p in inspect.signature(Pruner).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY
    }
    for name in options:
        if name not in known:
            raise ValueError(f"pruning has no option '{name}': did you mean {near(name, known)}?")
    missing = [name for name, p in known.items() if p.default is inspect.Parameter.empty and name not in options]
    if missing:
        raise ValueError(f'pruning needs {", ".join(missing)}')
    fields = inspect.signature(Schedule).parameters
    Schedule(**{name: value for name, value in options.items() if name in fields})
    look_up(NORMALIZERS, options.get('normalize', 'memory'), 'normalizer')
    spec = _with_seed(options.get('importance', 'hessian'), 0)
    arguments = inspect.signature(look_up(IMPORTANCES, spec.pop('type', None), 'importance')).parameters
    for name in spec:
        if name not in arguments:
            raise ValueError(f"importance has no option '{name}': did you mean {near(name, arguments)}?")
    for name in ('min_units', 'round_to'):
        if options.get(name, 1) < 1:
            raise ValueError(f'{name} is at least 1: got {options[name]}')


def _with_seed(importance: str | Mapping[str, Any], seed: int) -> dict[str, Any]:
    spec = {'type': importance} if isinstance(importance, str) else dict(importance)
    return {'seed': seed, **spec}
