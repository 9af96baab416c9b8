"""How much a model loses when one group alone is pruned: by the score, or by accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmengine.config import Config
from torch import Tensor, nn

from mmcpd.coupling import Coupling, aligned
from mmcpd.engine.evaluate import evaluate
from mmcpd.engine.preview import best_units
from mmcpd.slim import mask_
from mmcpd.slim.copying import copied

RATIOS = (0.75, 0.5, 0.25)  # of a group's units that are kept
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class GroupSensitivity:
    """What is measured at each ratio of kept units of one group, the others whole."""

    group: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How much a model depends on each group.

    Attributes:
        measure: what the values are, in words.
        dense: the value of the dense model.
        ratios: shares of a group's units that are kept.
        groups: the values of each group.
    """

    measure: str
    dense: float
    ratios: tuple[float, ...]
    groups: tuple[GroupSensitivity, ...]

    def __str__(self) -> str:
        rows = [('group', *(f'{ratio:.0%} kept' for ratio in self.ratios))]
        rows += [(each.group, *(f'{value:.4g}' for value in each.values)) for each in self.groups]
        return '\n'.join(
            [f'{self.measure} where one group alone is pruned; dense {self.dense:.4g}', '', *aligned(rows)]
        )


def score_sensitivity(
    coupling: Coupling, scores: Mapping[str, Tensor], importance: str, ratios: Sequence[float] = RATIOS
) -> Sensitivity:
    """Return what share of all units' score goes, in percent, where one group keeps its best units alone.

    Example:
        >>> scores = {'conv1': torch.ones(8), 'conv2': torch.tensor([2.0, 2.0, 2.0, 2.0])}
        >>> score_sensitivity(coupling, scores, 'magnitude', [0.5]).groups[1].values
        (25.0,)
    """
    total = sum(float(each.double().sum()) for each in scores.values()) or 1.0
    groups = []
    for group in coupling.groups:
        own, floor = scores[group.name].cpu().double(), coupling.floors[group.name]
        lost = (float(own[~best_units(own, ratio, floor)].sum()) for ratio in ratios)
        groups.append(GroupSensitivity(group.name, tuple(100 * each / total for each in lost)))
    return Sensitivity(f'percent of the {importance} score of all units that goes', 0.0, tuple(ratios), tuple(groups))


def metric_sensitivity(
    model: nn.Module,
    coupling: Coupling,
    scores: Mapping[str, Tensor],
    cfg: Config,
    ratios: Sequence[float] = RATIOS,
    progress: Progress | None = None,
) -> Sensitivity:
    """Validate the model with one group after the other masked down to each ratio; the model is left as it was.

    The first metric of the config's evaluator counts.

    Raises:
        ValueError: the config has no data with labels, or no metric that is a number.
    """
    found = evaluate(model, cfg)
    if not found:
        raise ValueError('the config has no metric that is a number: leave --accuracy out')
    metric, groups, done = next(iter(found)), [], 0
    for group in coupling.groups:
        values = []
        for ratio in ratios:
            keep, masked = coupling.keep(), copied(model)
            keep[group.name] = best_units(scores[group.name], ratio, coupling.floors[group.name])
            mask_(masked, coupling, keep)
            values.append(evaluate(masked, cfg)[metric])
            done += 1
            if progress is not None:
                progress(done, len(coupling.groups) * len(ratios))
        groups.append(GroupSensitivity(group.name, tuple(values)))
    return Sensitivity(metric, found[metric], tuple(ratios), tuple(groups))
