"""The recipes that the accuracy tables compare: how units are chosen, and how the pruned model is trained then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.accuracy_peers import interval, keep_of, peer_in_loop, prune_by_peer
from benchmarks.accuracy_tasks import Task
from benchmarks.accuracy_train import InLoop, InLoopFactory, Learning
from mmcpd.comb import comb
from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.at_once import with_softmax
from mmcpd.prune import Pruner, Schedule, build_importance, normalize, score, select
from mmcpd.refit import absorb_, refit
from mmcpd.rotate import rotate_
from mmcpd.slim import mask_, slim

REFIT_PICTURES = 1000
TEACHER_ALONE = Learning(label_weight=0, tau=4)
TEACHER_AND_LABELS = Learning(label_weight=1, tau=4)
LABELS_ALONE = Learning(label_weight=1)


@dataclass(frozen=True)
class Pruned:
    """A model to train, small already or with what prunes it on the way.

    Attributes:
        pictures: how many were seen to choose units and to refit.
        reestimated: whether batch norm is to be re-estimated before it is scored without training.
    """

    model: nn.Module
    pictures: int = 0
    reestimated: bool = False
    in_loop: InLoopFactory | None = None


@dataclass(frozen=True)
class Recipe:
    """One row of a table.

    Attributes:
        prune: called with the task, the share of the MACs that remains, and the seed.
        learning: what is minimised after pruning, or while it goes on.
        in_loop: it prunes while it trains, so that it has no result without training.
        learns_only: it differs from another in its training alone, and has no result of its own without.
        tables: those that show it; empty: all.
        peer: whether Torch-Pruning chooses.
        shipped: whether that is what it ships, with nothing lent to it.
    """

    name: str
    prune: Callable[[Task, float, int], Pruned]
    learning: Learning
    in_loop: bool = False
    learns_only: bool = False
    tables: tuple[str, ...] = ()
    peer: bool = False
    shipped: bool = False


# -- ours --------------------------------------------------------------------------------------------------------------
def dense(task: Task, share: float, seed: int) -> Pruned:
    """Return the unpruned model."""
    return Pruned(task.dense())


def at_once(
    task: Task,
    share: float,
    seed: int,
    *,
    rotated: bool = True,
    importance: str = 'gauss_newton',
    by: str = 'macs',
    augmented: bool = False,
    refit_pictures: int = REFIT_PICTURES,
) -> Pruned:
    """Rotate, score, choose and refit, before any training; `importance` is one of those that choose without it."""
    model = task.dense()
    if rotated:
        rotate_(model, task.example())
    coupling = comb(model, task.example())
    keep = choose(task, model, coupling, share, seed, importance, by)
    seen = 0 if importance in ('magnitude', 'random') else task.score_pictures
    return small(task, model, coupling, keep, seed, seen, pictures=refit_pictures, augmented=augmented)


def choose(
    task: Task, model: nn.Module, coupling: Coupling, share: float, seed: int, importance: str, by: str = 'macs'
) -> Keep:
    """Choose units so that a share of the MACs remains; norms of weights and noise are not divided by anything."""
    if importance == 'group_fisher':
        scores = fisher(task, model, coupling, seed)
    else:
        batches = [batch.images for batch in task.plain(task.score_pictures, seed)]
        scores = score(model, coupling, batches, importance=with_softmax(importance, model), seed=seed)
    by = 'none' if importance in ('magnitude', 'random') else by
    scores = normalize(scores, coupling, coupling.keep(), by=by)
    return select(scores, coupling, coupling.keep(), {'macs': share}, round_to=1)


def fisher(task: Task, model: nn.Module, coupling: Coupling, seed: int) -> dict[str, Tensor]:
    """Score by the squares of each picture's label loss's gradient, in eval mode, (units,) for each group."""
    found = build_importance('group_fisher', coupling.groups, seed=seed)
    found.attach(model)
    for images, labels in task.plain(task.score_pictures, seed):
        model.zero_grad()
        task.losses(model(images), labels).sum().backward()
        found.accumulate(model)
    found.detach()
    model.zero_grad()
    return found.scores()


def small(
    task: Task,
    model: nn.Module,
    coupling: Coupling,
    keep: Keep,
    seed: int,
    seen: int,
    *,
    pictures: int = REFIT_PICTURES,
    augmented: bool = False,
) -> Pruned:
    """Slim a dense model, refitted first if asked for, with batch norms that training does not disturb then."""
    if not pictures:
        mask_(model, coupling, keep)
        return Pruned(slim(model, coupling, keep), seen, reestimated=True)
    plain = task.plain(pictures, seed)
    batches = task.augmented(pictures, seed) if augmented else [batch.images for batch in plain]
    found = slim(refit(model, coupling, keep, batches).model, coupling, keep)
    absorb_(found, batches)
    return Pruned(found, max(seen, sum(len(images) for images in batches)))


class PrunerInLoop(InLoop):
    """The default of the training hook: squared gradients over memory, at 24 events in 0.6 of the run."""

    def __init__(
        self,
        model: nn.Module,
        coupling: Coupling,
        optimizer: torch.optim.Optimizer,
        share: float,
        iterations: int,
        by: str = 'memory',
    ) -> None:
        schedule = Schedule({'macs': share}, interval=interval(iterations)).resolve(iterations)
        self.pruner = Pruner(model, coupling, optimizer, schedule, normalize=by, round_to=1)

    def step(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self.pruner.step()
        return optimizer

    def finish(self) -> nn.Module:
        self.pruner.stop()
        return slim(self.pruner.model, self.pruner.coupling, self.pruner.keep)


def in_training(
    task: Task, share: float, seed: int, *, rotated: bool = False, build: Callable[..., InLoop] = PrunerInLoop
) -> Pruned:
    """Return the dense model and what prunes it while it trains."""
    model = task.dense()
    if rotated:
        rotate_(model, task.example())
    coupling = comb(model, task.example())
    return Pruned(model, in_loop=lambda net, optimizer, iterations: build(net, coupling, optimizer, share, iterations))


# -- the peer's --------------------------------------------------------------------------------------------------------
def by_peer(task: Task, share: float, seed: int, *, kind: str) -> Pruned:
    """Let Torch-Pruning prune the dense model."""
    peer = prune_by_peer(task, kind, share, seed)
    return Pruned(peer.model, peer.pictures, reestimated=True)


def by_peer_refitted(task: Task, share: float, seed: int) -> Pruned:
    """Let Torch-Pruning's Taylor importance choose, and refit what it chose."""
    peer = prune_by_peer(task, 'Taylor', share, seed)
    model = task.dense()
    coupling = comb(model, task.example())
    return small(task, model, coupling, keep_of(coupling, peer.numbers()), seed, peer.pictures)


def by_peer_in_loop(task: Task, share: float, seed: int) -> Pruned:
    """Return the dense model and the peer, which prunes it while it trains."""
    return Pruned(task.dense(), in_loop=peer_in_loop(task, share))


# -- the table ---------------------------------------------------------------------------------------------------------
OURS = Recipe('mmcpd', at_once, TEACHER_ALONE)
IN_TRAINING = Recipe('mmcpd in training', in_training, TEACHER_AND_LABELS, in_loop=True)
RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe('dense', dense, LABELS_ALONE),
        OURS,
        replace(OURS, name='mmcpd, tau 8', learning=Learning(label_weight=0, tau=8), learns_only=True),
        replace(OURS, name='mmcpd, no refit', prune=partial(at_once, refit_pictures=0)),
        replace(OURS, name='mmcpd, no rotation', prune=partial(at_once, rotated=False), tables=('vit',)),
        replace(OURS, name='mmcpd, by memory', prune=partial(at_once, by='memory')),
        replace(OURS, name='mmcpd, augmented pictures', prune=partial(at_once, augmented=True)),
        IN_TRAINING,
        replace(
            IN_TRAINING,
            name='mmcpd in training, by MACs',
            prune=partial(in_training, build=partial(PrunerInLoop, by='macs')),
        ),
        replace(
            IN_TRAINING, name='mmcpd in training, rotated', prune=partial(in_training, rotated=True), tables=('vit',)
        ),
        *(
            Recipe(f'{name} at once', partial(at_once, rotated=False, refit_pictures=0, importance=name), TEACHER_ALONE)
            for name in ('group_fisher', 'magnitude', 'random')
        ),
        *(
            Recipe(f'Torch-Pruning {kind}', partial(by_peer, kind=kind), LABELS_ALONE, peer=True, shipped=True)
            for kind in ('Taylor', 'group L2', 'Hessian', 'OBDC')
        ),
        Recipe(
            'Torch-Pruning Taylor, our distillation', partial(by_peer, kind='Taylor'), TEACHER_AND_LABELS, peer=True
        ),
        Recipe('Torch-Pruning Taylor in our loop', by_peer_in_loop, TEACHER_AND_LABELS, in_loop=True, peer=True),
        Recipe('Torch-Pruning Taylor, our refit', by_peer_refitted, TEACHER_ALONE, peer=True),
    )
}
