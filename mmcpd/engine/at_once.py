"""Prune a trained model at once, from pictures alone: score its units, choose, mask, and refit what stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from mmengine.dist import broadcast
from torch import Tensor, nn

from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.head_losses import read_by_losses
from mmcpd.engine.wrappers import bare_model
from mmcpd.errors import PruneError
from mmcpd.names import in_short
from mmcpd.prune import (
    IMPORTANCES,
    Schedule,
    check_importance,
    check_reachable,
    default_normalizer,
    normalize,
    score,
    select,
    shares,
)
from mmcpd.prune.schedule import is_count
from mmcpd.prune.selection import Floors, reachable
from mmcpd.random_state import seeded
from mmcpd.refit import RefitReport, absorb_
from mmcpd.refit import refit as refit_
from mmcpd.slim import mask_
from mmcpd.slim.copying import copied


@dataclass(frozen=True, eq=False)
class PrunedAtOnce:
    """What `prune_at_once` made.

    Attributes:
        model: the masked copy, refitted where that was wanted.
        keep: the kept units.
        scores: raw, (units,) per group.
        left: what remains of each quantity, as a share of the dense model's.
        refitted: what was refitted, None where it was not wanted.
        seconds: of each stage, by its name.
        left_alone: groups on which no output depends, so that nothing is known of them: they keep their units.
    """

    model: nn.Module
    keep: Keep
    scores: Mapping[str, Tensor]
    left: Mapping[str, float]
    refitted: RefitReport | None
    seconds: Mapping[str, float]
    left_alone: Sequence[str] = ()

    def __str__(self) -> str:
        left = ', '.join(f'{share:.1%} of the {quantity}' for quantity, share in self.left.items())
        times = ', '.join(f'{stage} {seconds:.1f} s' for stage, seconds in self.seconds.items())
        lines = [f'chosen at once: {left} remain']
        if self.left_alone:
            lines.append(
                f'{len(self.left_alone)} groups keep their units, because no output depends on them: '
                f"{in_short(self.left_alone)}; importance='magnitude' takes them too"
            )
        if self.refitted is not None:
            number, alone = len(self.refitted.refitted), len(self.refitted.skipped)
            head = str(self.refitted).partition('\n')[0]
            lines.append(f'{number} layers refitted{f", {alone} left alone" if alone else ""}: {head}')
        return '\n'.join([*lines, f'time: {times}'])


def prune_at_once(
    model: nn.Module,
    coupling: Coupling,
    batches: Sequence[Tensor],
    target: Mapping[str, float],
    *,
    importance: str | Mapping[str, object] = 'gauss_newton',
    scores: Mapping[str, Tensor] | None = None,
    normalize_by: str | None = None,
    min_units: int = 1,
    round_to: int = 8,
    remain: Mapping[str, float] = {},
    refit: bool = True,
    absorb: bool = True,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> PrunedAtOnce:
    """Prune a copy of a trained model down to a target in one step, from pictures without labels.

    The model is left as it was. All processes of a group must call it, with the same pictures. The time grows with the
    number of pictures, and with their size; the random numbers of the caller are as before afterwards.

    Args:
        model: the bare dense model that was combed.
        coupling: what combing it found.
        batches: preprocessed pictures, each (N, C, H, W); they go to the model's device.
        target: the share of the dense model's quantity that remains, for some of `macs`, `params`, `memory`, `units`,
            and `latency` of a coupling with timed layers (`mmcpd.deploy.with_latency`).
        importance: one that needs no loss. A `softmax` of 'gauss_newton' that is not given is that of the model's loss.
        scores: raw ones of an earlier call, (units,) per group, instead of new ones.
        normalize_by: what the score is divided by, a name in `mmcpd.prune.NORMALIZERS`; by default 'latency' where that
            is a target, else 'macs'.
        min_units: units that each group keeps.
        round_to: groups of at least 64 units keep a multiple of it.
        remain: the share of their units that groups keep at least, by patterns of their names.
        refit: fit the weights that stay to the dense model's outputs.
        absorb: write batch norm's statistics anew after that, for a training that follows.
        seed: of the score's random numbers.
        progress: called as `progress(stage, done, total)` after each batch of the stages 'score' and 'refit'.

    Raises:
        ValueError: an option that makes no sense, or groups that cannot be scored.
        PruneError: nothing can be pruned, or not as far as the target.

    Example:
        >>> pruned = prune_at_once(model, coupling, [images], {'macs': 0.5})
        >>> pruned.left['macs'] <= 0.5
        True
        >>> small = slim(pruned.model, coupling, pruned.keep)
    """
    check_label_free(importance, seed=seed)
    floors: Floors = {'min_units': min_units, 'round_to': round_to, 'remain': remain}
    check_reachable(coupling, Schedule(target), **floors)
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in batches]
    seconds: dict[str, float] = {}

    def reporting(stage: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(stage, done, total)

    model = copied(model)
    report = None
    with seeded(seed):
        if scores is None:
            with _timed('score', seconds):
                spec = with_softmax(importance, model)
                scores = score(model, coupling, batches, importance=spec, seed=seed, progress=reporting('score'))
        worth = normalize(scores, coupling, coupling.keep(), by=normalize_by or default_normalizer(target, 'macs'))
        silent = _silent(importance, scores)
        _check_heard(coupling, target, silent, floors)
        keep = select(worth, coupling, coupling.keep(), target, fixed=silent, **floors)
        if refit:
            with _timed('refit', seconds):
                found = refit_(model, coupling, keep, batches, progress=reporting('refit'))
                model, report = found.model, found.report
            if absorb:
                with _timed('absorb', seconds):
                    absorb_(model, batches, forward=coupling.example.forward)
        else:
            mask_(model, coupling, keep)
    return PrunedAtOnce(model, keep, scores, shares(coupling, keep), report, seconds, silent)


def _silent(importance: str | Mapping[str, object], scores: Mapping[str, Tensor]) -> list[str]:
    """Return the groups of which a score that reads outputs says nothing at all."""
    name = str(importance['type'] if isinstance(importance, Mapping) else importance)
    silent = [group for group, score in scores.items() if not bool(score.any())]
    return silent if IMPORTANCES[name].needs_outputs else []


def _check_heard(coupling: Coupling, target: Mapping[str, float], silent: Sequence[str], floors: Floors) -> None:
    """Refuse a target that cannot be met without the groups of which the score says nothing.

    Raises:
        PruneError: with these groups, and what to look at.
    """
    lowest = reachable(coupling, **floors, fixed=silent)
    for quantity, share in target.items():
        if silent and lowest[quantity] > share:
            raise PruneError(
                f'{quantity} cannot go down to {share:.4f} of the dense model, only to {lowest[quantity]:.4f}: on '
                f'these pictures no output depends on the groups {in_short(silent)}. Is the head all zeros, or not '
                "loaded? importance='magnitude' scores without outputs"
            )


def check_label_free(importance: str | Mapping[str, object], *, seed: int = 0) -> None:
    """Refuse an importance that cannot be built, or that reads the gradients of a loss; that takes no model.

    Raises:
        ValueError: with those that can be had.

    Example:
        >>> check_label_free('hessian')
        Traceback (most recent call last):
        ValueError: importance 'hessian' reads the gradients of a loss: to prune at once take gauss_newton, ...
    """
    check_importance(importance, seed=seed)
    name = str(importance['type'] if isinstance(importance, Mapping) else importance)
    free = sorted(each for each, kind in IMPORTANCES.items() if kind.needs_outputs or not kind.every_iteration)
    if name not in free:
        raise ValueError(
            f"importance '{name}' reads the gradients of a loss: to prune at once take {', '.join(free)}, or prune "
            'while the model trains'
        )


def with_softmax(importance: str | Mapping[str, object], model: nn.Module) -> Mapping[str, object]:
    """Tell a 'gauss_newton' that does not say so whether the model's outputs go through a softmax.

    Example:
        >>> with_softmax('gauss_newton', model)
        {'type': 'gauss_newton', 'softmax': False}
    """
    options: dict[str, object] = {'type': importance} if isinstance(importance, str) else dict(importance)
    if options['type'] == 'gauss_newton':
        options.setdefault('softmax', ends_in_softmax(model))
    return options


def ends_in_softmax(model: nn.Module) -> bool:
    """Tell whether a model is trained by a softmax over several classes, as its head's losses say; False if in doubt.

    Example:
        >>> ends_in_softmax(nn.Linear(2, 2))
        False
    """
    model = bare_model(model)
    head = getattr(model, 'decode_head', None) or getattr(model, 'head', None) or model
    head = head[-1] if isinstance(head, nn.ModuleList) else head  # a cascade's last is the one that is tested
    classes = getattr(head, 'out_channels', None) or getattr(head, 'num_classes', None) or 2
    read = read_by_losses(head, classes)
    return classes > 1 and read.softmax and not read.sigmoid


@contextmanager
def _timed(stage: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


@torch.no_grad()
def take_over_(model: nn.Module, changed: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a changed copy's weights into a model in training: on all processes those of process 0.

    What the optimizer knows of a parameter that changed (its momentum) is forgotten.

    Example:
        >>> changed = copy.deepcopy(model)
        >>> _ = nn.init.ones_(changed.fc.weight)
        >>> take_over_(model, changed, optimizer)
        >>> model.fc.weight.min().item()
        1.0
    """
    for ours, new in zip(_weights(model), _weights(changed), strict=True):
        broadcast(new)
        if not torch.equal(ours, new):
            ours.copy_(new)
            optimizer.state.pop(ours, None)


def _weights(model: nn.Module) -> list[Tensor]:
    """Return the parameters and the statistics of a model, in a fixed order."""
    return [*model.parameters(), *(buffer for buffer in model.buffers() if buffer.is_floating_point())]


def check_way(at_once: bool, gradual: Mapping[str, object], once: Mapping[str, object], rotate: bool) -> None:
    """Refuse options of pruning in training (`gradual`) where all units go at once, the reverse, and wrong values.

    Raises:
        ValueError: with what to leave out.

    Example:
        >>> check_way(True, {'end': 100}, {'pictures': 512, 'refit': True}, False)
        Traceback (most recent call last):
        ValueError: at_once=True removes all units at begin: leave out end
    """
    for name, value in (('at_once', at_once), ('rotate', rotate), ('refit', once['refit'])):
        if not isinstance(value, bool):
            raise ValueError(f'{name} is True or False: got {value!r}')
    if not is_count(once['pictures'], 1):
        raise ValueError(f'pictures counts training pictures, at least 1: got {once["pictures"]!r}')
    defaults = {field.name: field.default for field in fields(Schedule)} | {'pictures': 512, 'refit': True}
    foreign = [name for name, value in (gradual if at_once else once).items() if value != defaults[name]]
    if foreign and at_once:
        raise ValueError(f'at_once=True removes all units at begin: leave out {", ".join(foreign)}')
    if foreign:
        raise ValueError(f'{", ".join(foreign)} belong to at_once=True: set it, or leave them out')
