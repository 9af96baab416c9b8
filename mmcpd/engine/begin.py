"""What changes the weights of a model in training when pruning begins: rotation, and pruning at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.dist import broadcast_object_list, is_main_process

from mmcpd.engine.at_once import prune_at_once, take_over_
from mmcpd.engine.combing import shape_combed
from mmcpd.engine.pictures import pictures as draw_pictures
from mmcpd.engine.samples import on_pictures
from mmcpd.prune import Pruner
from mmcpd.rotate import rotate_
from mmcpd.slim.copying import copied

REFIT = 'refit.txt'


def rotate_in_training_(pruner: Pruner) -> str:
    """Sort the dimensions inside the heads of a pruner's model, and return the report, '' where it has no heads."""
    rotated, example = copied(pruner.model), pruner.coupling.example
    report = rotate_(rotated, example.inputs, forward=example.forward)
    take_over_(pruner.model, rotated, pruner.optimizer)
    return str(report) if report.found else ''


@dataclass(frozen=True)
class AtOnce:
    """How units are chosen at once: by which importance, on how many pictures, and whether weights are refitted."""

    importance: str | Mapping[str, object]
    pictures: int
    refit: bool
    seed: int


def prune_at_once_in_training_(pruner: Pruner, cfg: Config, how: AtOnce, folder: Path) -> str:
    """Bring a pruner's model to its target on training pictures of a config, the same on all processes.

    What was refitted goes into the folder; what was done is returned.
    """
    model, coupling = pruner.model, pruner.coupling
    # Not augmented: refitted on augmented ones a ResNet-20 starts and, 40 iterations later, ends a point lower.
    batches = draw_pictures(cfg, model, how.pictures, shape=shape_combed(coupling), seed=how.seed)
    pruned = prune_at_once(
        model,
        on_pictures(coupling, model, batches[0][:1].to(next(model.parameters()).device)),
        batches,
        pruner.schedule.target,
        importance=how.importance,
        normalize_by=pruner.normalizer,
        refit=how.refit,
        seed=how.seed,
        **pruner.floors,
    )
    take_over_(model, pruned.model, pruner.optimizer)
    keep = [pruned.keep]
    broadcast_object_list(keep)
    pruner.choose(keep[0])
    if pruned.refitted is not None and is_main_process():
        (folder / REFIT).write_text(f'{pruned.refitted}\n', encoding='utf-8')
    return str(pruned)
