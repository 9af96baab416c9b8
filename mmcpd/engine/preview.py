"""Look ahead: what pruning to a target would leave, by scores from a few pictures or, without data, from weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmcpd.coupling import Coupling, Keep, aligned
from mmcpd.engine.at_once import with_softmax
from mmcpd.engine.report import comparison, costs
from mmcpd.prune import LATENCY, check_reachable, default_normalizer, normalize, score, select, shares
from mmcpd.prune.schedule import Schedule
from mmcpd.prune.selection import Floors
from mmcpd.report.layers import weight_outputs


@dataclass(frozen=True, eq=False)
class Scored:
    """Raw scores, (units,) per group, the importance that they are of, and why it is that one."""

    scores: Mapping[str, Tensor]
    importance: str
    why: str


@dataclass(frozen=True)
class LayerWidth:
    """The number of channels that a layer gives out, before and after."""

    layer: str
    dense: int
    kept: int


@dataclass(frozen=True, eq=False)
class Preview:
    """What pruning to a target would leave.

    Attributes:
        target: the share of the dense model's quantities that may remain.
        keep: the kept units.
        dense, slim: MACs, parameters, memory (bytes of activations) and units.
        left: the share of each quantity that would be left; of latency, where layers were timed, it is a prediction.
        layers: widths of the layers that give out prunable channels.
        scored: by what the units were chosen.
    """

    target: Mapping[str, float]
    keep: Keep
    dense: Mapping[str, int]
    slim: Mapping[str, int]
    left: Mapping[str, float]
    layers: Sequence[LayerWidth]
    scored: Scored

    @property
    def goal(self) -> str:
        """The target in words."""
        return ' and '.join(f'{quantity}={share:g}' for quantity, share in self.target.items())

    def __str__(self) -> str:
        rows = [('layer', 'dense', 'slim', 'slim / dense')]
        rows += [(w.layer, str(w.dense), str(w.kept), f'{w.kept / w.dense:.0%}') for w in self.layers]
        head = f'at {self.goal}, units chosen by {self.scored.importance} ({self.scored.why}):'
        timed = [f'predicted latency: {self.left[LATENCY]:.1%} of the dense model', ''] if LATENCY in self.left else []
        return '\n'.join([head, '', comparison(self.dense, self.slim), '', *timed, *aligned(rows)])


def score_or_weigh(model: nn.Module, coupling: Coupling, batches: Sequence[Tensor], why: str = '') -> Scored:
    """Score all units by 'gauss_newton' on pictures, or by 'magnitude' where there are none; `why` says why not.

    Where groups cannot be scored by the outputs, magnitude takes its place too, and the reason is kept.

    Args:
        model: the bare model that was combed.
        coupling: what combing it found.
        batches: preprocessed pictures, each (N, C, H, W); none: only the weights are read.
        why: the reason for which there are no pictures.

    Example:
        >>> score_or_weigh(model, coupling, [images]).importance
        'gauss_newton'
        >>> score_or_weigh(model, coupling, [], 'no data').why
        'no data'
    """
    if batches:
        try:
            found = score(model, coupling, batches, importance=with_softmax('gauss_newton', model))
        except ValueError as error:
            why = f'gauss_newton cannot score it: {error}'
        else:
            return Scored(found, 'gauss_newton', f'on {sum(map(len, batches))} pictures')
    return Scored(score(model, coupling, [], importance='magnitude'), 'magnitude', why)


def preview(
    coupling: Coupling, scored: Scored, target: Mapping[str, float], floors: Floors, *, normalize_by: str | None = None
) -> Preview:
    """Choose units for a target, and say what would be left; the model is not touched.

    Scores are divided by what `normalize_by` names, by default by `latency` where that is a target, else by `macs`.

    Raises:
        ValueError: an unknown quantity, or a floor that makes no sense.
        PruneError: nothing can be pruned, or not as far as the target.

    Example:
        >>> scored = score_or_weigh(model, coupling, [images])
        >>> found = preview(coupling, scored, {'macs': 0.5}, {'min_units': 1, 'round_to': 8})
        >>> found.slim['macs'] <= 0.5 * found.dense['macs']
        True
    """
    check_reachable(coupling, Schedule(target), **floors)
    dense = coupling.keep()
    worth = normalize(scored.scores, coupling, dense, by=normalize_by or default_normalizer(target, 'macs'))
    keep = select(worth, coupling, dense, target, **floors)
    before, after, widths = costs(coupling, dense), costs(coupling, keep), layer_widths(coupling, keep)
    return Preview(target, keep, before, after, shares(coupling, keep), widths, scored)


def layer_widths(coupling: Coupling, keep: Mapping[str, Tensor]) -> list[LayerWidth]:
    """Return how many channels each layer gives out that gives out prunable ones, in the order of the state dict.

    Example:
        >>> layer_widths(coupling, keep)[0]
        LayerWidth(layer='conv1', dense=8, kept=4)
    """
    removed: Counter[str] = Counter()
    dims: dict[str, int] = {}
    for group, member in weight_outputs(coupling):
        dims[member.tensor] = member.dim
        removed[member.tensor] += member.index[~keep[group.name]].numel()
    sizes = {name: info.shape[dims[name]] for name, info in coupling.tensors.items() if name in dims}
    return [LayerWidth(name.removesuffix('.weight'), size, size - removed[name]) for name, size in sizes.items()]


@torch.no_grad()
def best_units(scores: Tensor, ratio: float, floor: int = 1) -> Tensor:
    """Return a keep, (units,) bool, of this share of a group's units, the best; `floor` of them at least.

    Example:
        >>> best_units(torch.tensor([0.3, 0.1, 0.2, 0.4]), 0.5).tolist()
        [True, False, False, True]
    """
    number = min(len(scores), max(floor, round(ratio * len(scores))))
    keep = torch.zeros(len(scores), dtype=torch.bool)
    keep[scores.cpu().double().argsort(descending=True, stable=True)[:number]] = True
    return keep
