"""What changes the weights of a model in training when pruning begins: rotation, and pruning at once."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from mmengine.config import Config
from mmengine.dist import broadcast_object_list

from mmcpd.engine.at_once import PrunedAtOnce, prune_at_once, take_over_
from mmcpd.engine.combing import shape_combed
from mmcpd.engine.pictures import pictures as draw_pictures
from mmcpd.prune import Pruner
from mmcpd.rotate import rotate_


def rotate_in_training_(pruner: Pruner) -> str:
    """Sort the dimensions inside the heads of a pruner's model, and return the report."""
    rotated, example = copy.deepcopy(pruner.model), pruner.coupling.example
    report = str(rotate_(rotated, example.inputs, forward=example.forward))
    take_over_(pruner.model, rotated, pruner.optimizer)
    return report


def prune_at_once_in_training_(
    pruner: Pruner,
    cfg: Config,
    *,
    pictures: int,
    refit: bool,
    importance: str | Mapping[str, object],
    seed: int,
) -> PrunedAtOnce:
    """Bring a pruner's model to its target on so many training pictures of a config, the same on all processes."""
    model, coupling = pruner.model, pruner.coupling
    # Not augmented: refitted on augmented ones a ResNet-20 starts and, 40 iterations later, ends a point lower.
    batches = draw_pictures(cfg, model, pictures, shape=shape_combed(coupling), seed=seed)
    pruned = prune_at_once(
        model,
        coupling,
        batches,
        pruner.schedule.target,
        importance=importance,
        normalize_by=pruner.normalizer,
        min_units=pruner.floors['min_units'],
        round_to=pruner.floors['round_to'],
        refit=refit,
        seed=seed,
    )
    take_over_(model, pruned.model, pruner.optimizer)
    keep = [pruned.keep]
    broadcast_object_list(keep)
    pruner.choose(keep[0])
    return pruned
