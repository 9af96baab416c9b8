"""Prune one model inside any training loop: score and mask at each optimizer step, remove units when it is time."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..coupling import Coupling, Keep
from ..names import look_up
from ..slim.mask import Masker, add_buffers_, named_tensors
from .agree import Agreement
from .finite import Missing, check_finite
from .importance import Closure, averaged, build_importance
from .normalize import NORMALIZERS, normalize
from .reach import check_reachable, check_resumed
from .schedule import Schedule
from .selection import Floors, reachable, select, shares
from .state import PrunerState
from .unscored import check_gradients, frozen_groups, unscored


class Pruner:
    """Bring a model down along a schedule, inside any training loop: call `step` after each optimizer step.

    Scoring and masking begin by themselves after `schedule.begin` iterations, or at once where that is 0. A group that
    had no gradient since the last event loses no unit in the next, and takes part again once it has gradients.

    Args:
        model: the very model that was combed, without a data-parallel wrapper.
        schedule: when units are removed and what remains, in iterations.
        importance: a name in `IMPORTANCES`, or a mapping of `type` and options.
        normalize: a name in `NORMALIZERS`.
        min_units, round_to, remain: the floors of each group, as in `select`.
        seed: of the importance's random numbers.

    Attributes:
        keep: the kept units now.
        iteration: how many iterations are finished.
        closure: runs a step's forward and backward once more, or its forward, for importances that ask for it.
        loss_scale: what losses are multiplied by before backward (mixed precision).
        left_alone: the groups that could not be scored at the last event (before the first: now), and why.
        waits: why nothing is removed though it is time, '' where nothing is due.

    Raises:
        ValueError: an option or a schedule in shares of the run, or groups that the importance cannot score.
        PruneError: nothing can be pruned, or not as far as the target, or a weight is not finite.

    Example:
        >>> from mmcpd.prune import Pruner, Schedule
        >>> model = build()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> coupling = comb(model, images)
        >>> schedule = Schedule(target=dict(macs=0.5, params=0.8)).resolve(20)    # a run of 20 iterations
        >>> pruner = Pruner(model, coupling, optimizer, schedule)
        >>> for iteration in range(20):
        ...     optimizer.zero_grad()
        ...     model(images).square().mean().backward()
        ...     optimizer.step()
        ...     chosen = pruner.step()
        >>> pruner.left()['macs'] <= 0.5 and pruner.left()['params'] <= 0.8
        True
        >>> small = slim(model, coupling, pruner.keep)
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        *,
        importance: str | Mapping[str, object] = 'hessian',
        normalize: str = 'memory',
        min_units: int = 1,
        round_to: int = 8,
        remain: Mapping[str, float] = {},
        seed: int = 0,
    ) -> None:
        look_up(NORMALIZERS, normalize, 'normalizer')
        self._begin, self._end = schedule.span()
        self.floors: Floors = {'min_units': min_units, 'round_to': round_to, 'remain': remain}
        check_finite(model)
        check_reachable(coupling, schedule, **self.floors)
        self.model, self.coupling, self.optimizer, self.schedule = model, coupling, optimizer, schedule
        self.normalizer = normalize
        self.importance = build_importance(importance, coupling.groups, seed=seed)
        self.keep = coupling.keep()
        self._see_frozen()
        check_gradients(coupling, schedule, self.left_alone, self.floors)
        self.importance.check(model, coupling.example)
        self.masker = Masker(model, coupling)
        self.copies: list[Masker] = []
        self.closure: Closure | None = None
        self.loss_scale = 1.0
        self.iteration = 0
        self._handles: list[RemovableHandle] = []
        self._last = 0  # finished iterations when units were removed last
        self._waiting, self.waits = False, ''  # it was time, but nothing had been scored
        self._missing, self._agreement = Missing(model), Agreement(model, coupling)
        self.skip_to(0)

    @property
    def begun(self) -> bool:
        """Tell whether the iterations before pruning are over."""
        return self.iteration >= self._begin

    @property
    def done(self) -> bool:
        """Tell whether the last units were removed: masks stay, nothing is scored any more."""
        return self._last >= self._end

    def step(self) -> bool:
        """Count an iteration, and remove units if it is time; call it at the end of each iteration.

        Where no gradient of an interval was finite, or none was applied, units are removed as soon as one was.

        Returns:
            Whether units were chosen.
        """
        self.iteration += 1
        if self.iteration == self._begin:
            self._see_frozen()
            self.start()
        if self._handles:
            self._clear_statistics()  # a hook may have replaced them after the optimizer's step
        if not self._handles or self.done:
            return False
        self._waiting = self._waiting or self.schedule.due(self.iteration)
        if not self._waiting:
            return False
        if not self.importance.every_iteration:
            self.importance.accumulate(self.model)
        self._agreement.check(self.keep, self.iteration)
        scores = averaged(self.importance, next(self.model.parameters()).device)
        if scores is None:
            self.waits = self.waits or self._missing.why(self.iteration, self._last, self.importance)
            return False
        self._remove(scores)
        self._agreement.check(self.keep, self.iteration)
        self.importance.gates.left_alone = set(frozen_groups(self.importance, self.model))
        self.importance.reset()
        self._last, self._waiting = self.iteration, False
        self.waits, self._missing = '', Missing(self.model)
        if self.done:
            self.importance.detach()
        self.mask_()
        return True

    def _remove(self, scores: Mapping[str, Tensor]) -> None:
        """Take units away, down to where the schedule is now, or as far as the groups that were scored allow."""
        self.left_alone = unscored(self.importance, scores)
        fixed, limit = self.left_alone, self.schedule.units_per_event
        lowest = reachable(self.coupling, keep=self.keep, fixed=fixed, **self.floors)
        goals = self.schedule.ratios(self.iteration).items()
        ratios = {quantity: max(ratio, lowest[quantity] * (1 + 1e-12)) for quantity, ratio in goals}
        scores = normalize(scores, self.coupling, self.keep, by=self.normalizer)
        self.keep = select(scores, self.coupling, self.keep, ratios, limit=limit, fixed=fixed, **self.floors)

    def start(self) -> None:
        """Mask by the keep as it is, and watch the model's passes and the optimizer's steps from now on.

        `step` does this when pruning begins; call it to go on after `stop`. Raises PruneError for weights not finite.
        """
        self.stop()
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._clear_statistics),
        ]
        if not self.done:
            check_finite(self.model, self.iteration)
            self.importance.attach(self.model)
        self.mask_()

    def stop(self) -> None:
        """Stop watching, until `start`; the model stays masked."""
        self.importance.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def skip_to(self, iteration: int) -> None:
        """Count on from so many finished iterations of a run that has not been pruned yet.

        Raises:
            ValueError: pruning began earlier, so that its state is needed.
        """
        if iteration > self._begin:
            raise ValueError(
                f'{iteration} iterations are finished and there is no pruning state, but pruning begins at '
                f'{self._begin}: begin later, load the state of a run that was pruned, or start a new run from its '
                'weights'
            )
        self.iteration = iteration
        if self.begun:
            self.start()

    def choose(self, keep: Keep) -> None:
        """Keep these units from now on, without scores: the schedule removes no others.

        Raises:
            ValueError: it does not fit the model.
        """
        self.coupling.check(keep)
        self.keep = {group.name: keep[group.name].cpu().clone() for group in self.coupling.groups}
        self._last, self._waiting = self._end, False
        self._agreement.check(self.keep, self.iteration)
        self.importance.detach()
        self.mask_()

    def also_mask(self, copy: nn.Module) -> None:
        """Mask a copy of the model too from now on, whenever the model is masked: an average of its weights, say.

        Raises:
            ValueError: it is no copy of the model.
        """
        add_buffers_(copy, self.coupling)
        found = named_tensors(copy)
        for name, info in self.coupling.tensors.items():
            if name not in found or found[name].shape != info.shape:
                raise ValueError(f'{type(copy).__name__} is no copy of the model that is pruned: {name} does not fit')
        self.copies.append(Masker(copy, self.coupling))
        self.mask_()

    @torch.no_grad()
    def mask_(self) -> None:
        """Write zeros into removed rows, of the optimizer's state too: momentum would bring them back.

        The pruner does this by itself; call it before the model is used where others have written into it.
        """
        if self._factors():
            self.masker.apply_(self.keep)
            self.masker.apply_state_(self.keep, self.optimizer)
        for masker in self.copies:
            masker.apply_(self.keep)

    def left(self) -> dict[str, float]:
        """Return what remains of each quantity, as a share of the dense model's."""
        return shares(self.coupling, self.keep)

    def state_dict(self) -> PrunerState:
        """Return keep, scores and iteration, which `torch.load(weights_only=True)` reads."""
        return {
            'keep': {name: kept.clone() for name, kept in self.keep.items()},
            'importance': self.importance.state_dict(),
            'iteration': self.iteration,
            'last': self._last,
            'waiting': self._waiting,
            'frozen': sorted(self.importance.gates.left_alone),
        }

    def load_state_dict(self, state: PrunerState) -> None:
        """Go on from a state: where pruning had begun, mask and watch. Load the model and the optimizer first.

        Raises:
            ValueError: it is of another model.
            PruneError: the weights are not finite, or the events that are left cannot reach the target.
        """
        self.coupling.check(state['keep'])
        self.stop()
        self.keep = {group.name: state['keep'][group.name].cpu() for group in self.coupling.groups}
        self.importance.load_state_dict(state['importance'])
        self.iteration, self._last, self._waiting = state['iteration'], state['last'], state['waiting']
        self.importance.gates.left_alone = set(state['frozen'])
        check_resumed(self.coupling, self.schedule, self.keep, self.iteration, self.floors, waiting=self._waiting)
        if self.begun:
            self.start()

    def _see_frozen(self) -> None:
        """Leave the groups alone that get no gradient now; `_before_step` adds those of later iterations."""
        self.left_alone = frozen_groups(self.importance, self.model)
        self.importance.gates.left_alone = set(self.left_alone)

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if getattr(optimizer, 'grad_scale', None) is not None:
            raise ValueError('a fused optimizer sees scaled gradients in mixed precision: set fused=False to prune')
        if self.importance.every_iteration and not self.done:
            self.importance.gates.left_alone |= frozen_groups(self.importance, self.model).keys()
            self.importance.accumulate(self.model, closure=self.closure, loss_scale=self.loss_scale)
            self._missing.step(self.importance, due=self._waiting or self.schedule.due(self.iteration + 1))
        # Weights and state of removed rows are zero. Without a gradient they stay so, whatever the optimizer makes of
        # each element, and one product does for the weight, its momentum and its second moment.
        for tensor, factor in self._factors():
            if tensor.grad is not None:
                tensor.grad.mul_(factor)

    @torch.no_grad()
    def _clear_statistics(self, *_: object) -> None:
        for tensor, factor in self._factors():
            if not isinstance(tensor, nn.Parameter):
                tensor.mul_(factor)

    def _factors(self) -> list[tuple[Tensor, Tensor]]:
        """Return what is masked, and its factors of 0 and 1."""
        if all(bool(kept.all()) for kept in self.keep.values()):
            return []
        with torch.no_grad():
            return self.masker.factors(self.keep)
