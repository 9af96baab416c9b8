"""What a distiller's config says about its losses: what each compares, by which name, with which labels."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmcpd import distill
from mmcpd.distill import DistillLoss, Tap, expanded
from mmcpd.names import near
from mmcpd.prune.options import checked_options
from mmcpd.registry import MODELS as OURS

# By name, every loss that `mmcpd.distill` exports.
LOSSES: dict[str, type[nn.Module]] = {
    name: loss
    for name, loss in vars(distill).items()
    if isinstance(loss, type) and issubclass(loss, DistillLoss) and loss is not DistillLoss
}
for _loss in LOSSES.values():  # `mmcpd.distill` knows no registry
    OURS.register_module(module=_loss)
EXAMPLE = "write losses=[dict(type='mmcpd.KDLoss', tau=4.0)]"
LOGITS = 'logits'  # the tap that is found by observing
# Attributes of torch's layers that hold the width of their output, and of their input.
OUTPUT_WIDTHS = ('out_channels', 'out_features', 'num_features')
INPUT_WIDTHS = ('in_channels', 'in_features', 'num_features')


@dataclass(frozen=True)
class LossConfig:
    """One distillation loss: taps on the student, each compared with one on the teacher.

    Attributes:
        name: in the log it is `loss_distill_<name>`.
        kind: the loss's class, or its name.
        arguments: of the class.
        taps, teacher_taps: module outputs as in `mmcpd.distill.Tap`, or patterns of several (`mmcpd.distill.expanded`);
            or 'logits' alone: those of each head, which observing finds.
    """

    name: str
    kind: str | type[nn.Module]
    arguments: dict[str, Any]
    taps: tuple[str, ...]
    teacher_taps: tuple[str, ...]

    @staticmethod
    def read(config: Mapping[str, Any] | str, taken: Collection[str] = ()) -> LossConfig:
        """Read one loss's dict, or its type; what is not about the taps or the name are the loss's own arguments.

        Defaults: `tap` is 'logits', `teacher_tap` is as `tap`, `name` of the type; `taken` are other losses' names.

        Raises:
            ValueError: If there is no type, or the name is taken or no identifier.

        Example:
            >>> LossConfig.read({'type': 'CWDLoss', 'tap': 'decode_head.conv_seg', 'tau': 4.0}).name
            'cwd'
        """
        if not isinstance(config, Mapping | str):
            raise ValueError(f'losses: {config!r} is no loss; {EXAMPLE}')
        arguments = {'type': config} if isinstance(config, str) else dict(config)
        kind = arguments.pop('type', None)
        if not isinstance(kind, str | type) or not kind:
            raise ValueError(f'losses: {config} has no type; known: {", ".join(LOSSES)}')
        taps = _names(arguments, 'tap', kind) or (LOGITS,)
        teacher_taps = _names(arguments, 'teacher_tap', kind) or taps
        name = arguments.pop('name', None)
        if not isinstance(name, str | None):
            raise ValueError(f'losses: name of {_short(kind)} is a name: got {name!r}')
        if name is None:
            label = _short(kind)
            name = label.removesuffix('Loss').lower() or label.lower()
            if name in taken:
                name = f'{name}_{len(taken)}'
        if name in taken or not name.isidentifier() or hasattr(nn.ModuleDict, name):
            raise ValueError(f'losses: {name!r} cannot be the name of {_short(kind)}, or is taken; set another name')
        return LossConfig(name, kind, arguments, taps, teacher_taps)

    def build(self, student: nn.Module) -> nn.Module:
        """Build the loss: one of ours, with or without 'mmcpd.' before its name, or any that MMEngine knows.

        Ours take `student_channels` and `num_classes` from the student, where they need them and have none given.

        Raises:
            ValueError: If the student has no such tap, there is no such loss, or it does not take the arguments.
        """
        taps = [] if self.taps == (LOGITS,) else [Tap.parse(tap, student) for tap in named(self.taps, student)]
        short = _short(self.kind)
        try:
            if isinstance(self.kind, str):
                if self.kind.removeprefix('mmcpd.').removeprefix('distill.') in LOSSES:
                    given = checked_options(LOSSES[short], self.arguments, f'losses: {short}')
                    return LOSSES[short](**{**_sizes(LOSSES[short], student, taps), **given})
                with MODELS.switch_scope_and_registry(None) as registry:
                    if registry.get(self.kind) is None:
                        raise ValueError(f'losses: no loss is called {self.kind!r}; near: {near(short, LOSSES)}')
            return MODELS.build({'type': self.kind, **self.arguments})
        except TypeError as error:
            raise ValueError(f'losses: {short}: {error}') from error


def listed(losses: object) -> list[Any]:
    """Return losses as a list: one dict or name is a list of one, None is an empty one.

    Raises:
        ValueError: If it is none of these.

    Example:
        >>> listed('mmcpd.KDLoss'), listed(None)
        (['mmcpd.KDLoss'], [])
    """
    if isinstance(losses, Mapping | str):
        return [losses]
    if losses is not None and not isinstance(losses, list | tuple):
        raise ValueError(f'losses is a list of dicts, got {losses!r}; {EXAMPLE}')
    return list(losses or ())


def named(taps: Iterable[str], model: nn.Module) -> list[str]:
    """Return the taps on a model that names and patterns stand for, each once.

    Raises:
        ValueError: If a pattern fits no module.

    Example:
        >>> named(['fc', 'conv*'], model)
        ['fc', 'conv1', 'conv2']
    """
    return list(dict.fromkeys(tap for pattern in taps for tap in expanded(pattern, model)))


def _names(arguments: dict[str, Any], option: str, kind: str | type) -> tuple[str, ...]:
    """Take an option out of a loss's dict: a name or a list of names."""
    value = arguments.pop(option, None)
    names = [value] if isinstance(value, str) else value
    if names is not None and not (isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names)):
        raise ValueError(f'losses: {option} of {_short(kind)} is a name or a list of names: got {value!r}')
    return tuple(names or ())


def _sizes(loss: type[nn.Module], student: nn.Module, taps: Sequence[Tap]) -> dict[str, int]:
    """Return those arguments of a loss that are sizes of the student: of its head, and of the modules under the taps.

    The width under several taps is none where they differ.
    """
    head = getattr(student, 'decode_head', None) or getattr(student, 'head', None)
    classes = getattr(head, 'num_classes', None)
    widths = {_width(student.get_submodule(tap.module), tap) for tap in taps}
    width = widths.pop() if len(widths) == 1 else None
    if not taps:
        width = getattr(head, 'out_channels', None) or classes
    sizes = {'num_classes': classes, 'student_channels': width}
    wanted = inspect.signature(loss).parameters
    return {name: size for name, size in sizes.items() if name in wanted and isinstance(size, int)}


def _width(module: nn.Module, tap: Tap) -> object:
    names = INPUT_WIDTHS if tap.part == 'in' else OUTPUT_WIDTHS
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _short(kind: str | type) -> str:
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def labels_of(data_samples: list | None, loss: str) -> Tensor:
    """Return the labels of a batch: `(N, 1, H, W)` of mmseg's samples, `(N,)` of mmpretrain's.

    Raises:
        ValueError: If the samples have neither.
    """
    samples = data_samples or []
    if samples and all('gt_sem_seg' in sample for sample in samples):
        return torch.stack([sample.gt_sem_seg.data for sample in samples])
    if samples and all('gt_label' in sample and sample.gt_label.numel() == 1 for sample in samples):
        return torch.cat([sample.gt_label.flatten() for sample in samples])
    raise ValueError(f'loss {loss!r} needs labels; the samples have no gt_sem_seg and no single gt_label')
