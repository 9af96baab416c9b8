"""Ways of pruning while training that were tried beside the recipes; what does not help is told, and not shipped.

Run by name: `python benchmarks/accuracy.py resnet20 --budgets 240 --rows 'in training, scores averaged'`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.accuracy_peers import interval
from benchmarks.accuracy_recipes import (
    OURS,
    TEACHER_ALONE,
    TEACHER_AND_LABELS,
    Pruned,
    PrunerInLoop,
    Recipe,
    at_once,
    in_training,
    small,
)
from benchmarks.accuracy_tasks import Task
from benchmarks.accuracy_train import InLoop, train
from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.prune import Pruner, Schedule, build_importance, normalize, select
from mmcpd.slim import slim
from mmcpd.slim.mask import Masker

CHOOSING = 96  # iterations that choose, of which nothing but the choice is kept
CHOOSING_RATE = 0.01


class AveragedInLoop(PrunerInLoop):
    """Scores of earlier intervals count on, at half of their weight after each removal."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        importance = self.pruner.importance

        def halve() -> None:
            importance.total.mul_(0.5)

        importance.reset = halve


class FadingInLoop(InLoop):
    """Units that are chosen fade to zero over one interval instead of at once (DPM), at the events of our schedule.

    With `regrow`, a fading unit whose score has become good enough by the next event comes back; otherwise a choice is
    final. Scores, normaliser, schedule and masks are those of the training hook.
    """

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        optimizer: torch.optim.Optimizer,
        share: float,
        iterations: int,
        regrow: bool,
    ) -> None:
        self.model, self.coupling, self.regrow = model, coupling, regrow
        self.schedule = Schedule({'macs': share}, interval=interval(iterations)).resolve(iterations)
        self.importance = build_importance('hessian', coupling.groups, seed=0)
        self.masker, self.fading = Masker(model, coupling), Masker(model, coupling)
        self.keep = coupling.keep()  # what is not zero for good
        self.chosen = coupling.keep()  # what is not fading either
        self.iteration = self.since = 0

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self.iteration += 1
        self.since += 1
        self.importance.accumulate(self.model)
        left = max(self.schedule.interval - self.since, 0)
        for tensor, factor in self.fading.factors(self.chosen):
            tensor.mul_(1 - (1 - factor) / (left + 1))  # linear: 1 - 1 / n, 1 - 1 / (n - 1), ..., 0
        self.masker.apply_(self.keep)
        self.masker.apply_state_(self.keep, optimizer)
        if self.schedule.due(self.iteration):
            before = self.keep if self.regrow else self.chosen
            scores = normalize(self.importance.scores(), self.coupling, before, by='memory')
            ratios = self.schedule.ratios(self.iteration)
            fresh = select(scores, self.coupling, before, ratios, round_to=1)
            # what was fading has faded, unless it came back
            self.keep = {name: self.chosen[name] | fresh[name] for name in fresh}
            self.chosen, self.since = fresh, 0
            self.importance.reset()
        return optimizer

    def finish(self) -> nn.Module:
        self.masker.apply_(self.chosen)
        return slim(self.model, self.coupling, self.chosen)


def chosen_in_training(task: Task, share: float, seed: int) -> Pruned:
    """Prune in a short training, keep nothing of it but the choice, and refit that from the dense weights."""
    found = in_training(task, share, seed)
    pruners: list[Pruner] = []

    def watch(net: nn.Module, optimizer: torch.optim.Optimizer, iterations: int) -> PrunerInLoop:
        in_loop = found.in_loop(net, optimizer, iterations)
        pruners.append(in_loop.pruner)
        return in_loop

    train(found.model, task.dense(), task, CHOOSING, CHOOSING_RATE, seed, TEACHER_AND_LABELS, watch)
    model = task.dense()
    coupling = comb(model, task.example())
    return small(task, model, coupling, pruners[0].keep, seed, CHOOSING * task.batch)


VARIANTS = {
    recipe.name: recipe
    for recipe in (
        replace(OURS, name='at once, chosen in 96 iterations of training', prune=chosen_in_training),
        *(
            replace(OURS, name=f'mmcpd, refit on {n:,} pictures', prune=partial(at_once, refit_pictures=n))
            for n in (2000, 4000)
        ),
        replace(OURS, name='mmcpd, distilled at tau 1', learning=replace(TEACHER_ALONE, tau=1), learns_only=True),
        replace(OURS, name='at once, with labels', learning=TEACHER_AND_LABELS, learns_only=True),
        *(
            Recipe(f'in training, {name}', partial(in_training, build=build), TEACHER_AND_LABELS, in_loop=True)
            for name, build in (
                ('scores averaged', AveragedInLoop),
                ('units fade', partial(FadingInLoop, regrow=False)),
                ('units fade and regrow', partial(FadingInLoop, regrow=True)),
            )
        ),
    )
}
