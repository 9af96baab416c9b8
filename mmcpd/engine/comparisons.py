"""Decide where each distillation loss looks in the student and in the teacher, and what its logits mean."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mmcpd.engine.logits import Observed
from mmcpd.engine.loss_configs import LOGITS, LossConfig, named

PATIENCE = 50  # iterations for which a loss may be 0


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a loss compares: the outputs at the student's tap with those at the teacher's, one by one.

    Outputs of four dimensions have their channels second, or as `channels_last` says: `(layers, N, queries, C)`.
    """

    tap: str
    teacher_tap: str
    loss: nn.Module
    channels_last: bool = False

    def compare(self, ours: Tensor, theirs: Tensor, *labels: Tensor) -> Tensor:
        if self.channels_last and ours.ndim == theirs.ndim == 4:
            ours, theirs = ours.flatten(0, 1), theirs.flatten(0, 1)  # (layers, N, L, C) -> (layers * N, L, C)
        loss: Tensor = self.loss(ours, theirs, *labels)
        return loss


def find_comparisons(
    configs: Mapping[str, LossConfig],
    losses: Mapping[str, nn.Module],
    student: Observed,
    teacher: Observed,
    teacher_module: nn.Module,
) -> dict[str, list[Comparison]]:
    """Return for each loss what it compares: for the tap 'logits' the logits of each head.

    `teacher` may be the student as it was observed, where no logits of the teacher are looked for.

    Raises:
        ValueError: It cannot be told where the logits are, or student and teacher do not have as many outputs.
    """
    found = {}
    for name, config in configs.items():
        finds = config.taps == (LOGITS,)
        taps = [each.tap for each in student.logits()] if finds else named(config.taps, student.model)
        finds_theirs = config.teacher_taps == (LOGITS,)
        theirs = _paired(taps, teacher) if finds_theirs else named(config.teacher_taps, teacher_module)
        if len(theirs) != len(taps):
            raise ValueError(
                f'loss {name!r}: the student has the {"logits" if finds else "taps"} {", ".join(taps)}, the teacher '
                f'{", ".join(theirs)}; set tap= and teacher_tap= to as many of each'
            )
        if len(taps) > 1 and losses[name].state_dict():
            raise ValueError(
                f'loss {name!r} keeps a state, of one output: the student has the {"logits" if finds else "taps"} '
                f'{", ".join(taps)}; set tap= to one of them'
            )
        found[name] = [
            Comparison(tap, other, _reading(losses[name], student.reads_sigmoid(tap)), student.channels_last(tap))
            for tap, other in zip(taps, theirs, strict=True)
        ]
    return found


def described(comparisons: Mapping[str, Sequence[Comparison]], numbers: Mapping[str, int]) -> str:
    """Say in one line for each loss what it compares; `numbers` are those of the outputs at the student's taps."""
    lines = []
    for name, several in comparisons.items():
        taps = ' + '.join(
            each.tap + ('' if each.teacher_tap == each.tap else f" (the teacher's {each.teacher_tap})")
            + (f' (x{numbers[each.tap]})' if numbers.get(each.tap, 1) > 1 else '')
            + {True: ' by sigmoid', False: ' by softmax', None: ''}[getattr(each.loss, 'sigmoid', None)]
            for each in several
        )  # fmt: skip
        lines.append(f'distillation: {type(several[0].loss).__name__} {name!r} compares {taps}')
    return '\n'.join(lines)


def _paired(taps: list[str], teacher: Observed) -> list[str]:
    """Return the taps on a teacher's logits: the student's, where the teacher gives out the same."""
    given = {str(output) for each in teacher.tested for output in each.outputs}
    return taps if given.issuperset(taps) else [each.tap for each in teacher.logits()]


def _reading(loss: nn.Module, sigmoid: bool | None) -> nn.Module:
    """Return the loss, told to take sigmoids or a softmax where its `sigmoid` was left open and that is known."""
    if sigmoid is None or getattr(loss, 'sigmoid', False) is not None:
        return loss
    told = copy.copy(loss)  # heads may differ
    setattr(told, 'sigmoid', sigmoid)  # noqa: B010 - not of every module
    return told


def same_samples(taught: Tensor, tap: str, rows: int, data_samples: object) -> Tensor:
    """Return those rows of a teacher's output whose samples the student's head saw: all, or those that have its label.

    mmpretrain's MultiTaskHead gives each task the samples that have a field of the task's name, which is in the tap.

    Example:
        >>> samples = [{'colour': 1}, {}, {'colour': 2}]
        >>> same_samples(torch.arange(3.0), 'head.task_heads.colour.fc', 2, samples)
        tensor([0., 2.])
    """
    if rows == len(taught) or not isinstance(data_samples, list):
        return taught
    for name in tap.split('.'):
        having = [i for i, sample in enumerate(data_samples) if name in sample]
        if len(having) == rows:
            return taught[having]
    return taught


def zero_reason(name: str, several: Sequence[Comparison]) -> str:
    """Say why a loss may be 0, and what to do."""
    taps = ', '.join(each.tap for each in several)
    loss = several[0].loss
    if getattr(loss, 'loss_weight', 1) == 0:
        cure = 'its loss_weight is 0: give it a weight, or leave the loss out'
    else:
        cure = (
            f'student and teacher look the same to it at {taps}. A softmax over one channel is always 1 (KDLoss takes '
            'sigmoid=True), and a constant output says nothing: tap another module'
        )
    return f'loss_distill_{name} was exactly 0 for {PATIENCE} iterations: {cure}'


class ZeroWatch:
    """Notice losses that are exactly 0 for `PATIENCE` iterations, without waiting for the device in each."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()
        self.warned: set[str] = set()

    def see(self, name: str, value: Tensor) -> bool:
        """Take a loss of this iteration; return whether it was 0 in the last `PATIENCE` ones, and nobody warned yet."""
        self._sums[name] = self._sums.get(name, 0) + value.detach().abs()
        self._counts[name] += 1
        if self._counts[name] % PATIENCE or name in self.warned:
            return False
        return float(self._sums.pop(name)) == 0
