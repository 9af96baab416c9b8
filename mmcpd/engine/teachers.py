"""The teacher of a distiller: built from a config and a checkpoint, and held where no one trains or saves it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hub import get_config
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmcpd.distill import Taps
from mmcpd.engine.build import as_config
from mmcpd.engine.checkpoints import load_any
from mmcpd.engine.reader import trust
from mmcpd.errors import SlimError
from mmcpd.slim.compare import evaluating


class FrozenTeacher:
    """Run a model, frozen in place and put into eval mode, on the student's batches, and return what its taps see.

    It is no `nn.Module`, so that a distiller may hold it without its weights being parameters, saved, broadcast or
    put into training mode. Copies of the distiller (an EMA's) share it. From the second batch on it runs no further
    than to the last output of its taps.

    `is_copy` says that it is a copy of the student.

    Example:
        >>> FrozenTeacher(model)(images, taps=['fc'])['fc'][0].requires_grad
        False
    """

    def __init__(self, module: nn.Module, is_copy: bool = False) -> None:
        self.module = module.requires_grad_(False).eval()
        self.is_copy = is_copy
        self.outputs: dict[str, int] = {}  # how many each tap has seen

    def __call__(self, inputs: Any, data_samples: Any = None, *, taps: Collection[str]) -> dict[str, list[Tensor]]:
        """Return what each tap sees for a preprocessed batch.

        Raises:
            ValueError: If a tap's name is not known, its module is not called, or gives no tensor.
        """
        with self.running():
            known = {tap: self.outputs[tap] for tap in taps} if self.outputs.keys() >= set(taps) else None
            seen = run_to_taps(self.module, taps, inputs, data_samples, outputs=known)
        self.outputs.update({name: len(tensors) for name, tensors in seen.items()})
        # Autograd may not save inference tensors; their copies are ordinary ones.
        return {name: [tensor.clone() for tensor in tensors] for name, tensors in seen.items()}

    def running(self) -> AbstractContextManager[Any]:
        return torch.inference_mode()

    def apply_(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow the student to another device or precision."""
        self.module._apply(change)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


class Rehearsal(FrozenTeacher):
    """Let the student itself teach for once, as its copy will later; it is not frozen, and its mode is put back.

    Example:
        >>> Rehearsal(model.train())(images, taps=['fc'])['fc'][0].shape, model.training
        (torch.Size([2, 2]), True)
    """

    def __init__(self, student: nn.Module) -> None:
        self.module, self.is_copy, self.outputs = student, True, {}

    def running(self) -> AbstractContextManager[Any]:
        return evaluating(self.module)


def run_to_taps(
    module: nn.Module,
    taps: Collection[str],
    inputs: Any,
    data_samples: Any = None,
    outputs: Mapping[str, int] | None = None,
) -> dict[str, list[Tensor]]:
    """Run a model for what it gives out, and return what the taps see; `outputs` as in `Taps.run`.

    Example:
        >>> list(run_to_taps(model, ['conv2', 'fc:in'], images))
        ['conv2', 'fc:in']
    """
    if isinstance(module, BaseModel):  # MMEngine's models return what a plain module would only in this mode
        return Taps(module, taps).run(inputs, data_samples, mode='tensor', outputs=outputs)
    return Taps(module, taps).run(inputs, outputs=outputs)


def load_teacher(teacher: Mapping[str, Any]) -> nn.Module:
    """Build a teacher from `dict(config=..., checkpoint=..., cfg_options=..., trust_checkpoint=False)`.

    `config` is a file, `'mmpretrain::resnet/resnet101_8xb32_in1k.py'` or a Config, of a bare model or of a
    distiller; `checkpoint` is a training checkpoint, bare weights, or a `slim.pth` cut from that config.

    Raises:
        ValueError: If a key is missing or unknown, or the checkpoint cannot be read or is of another model.
    """
    keys = {'config', 'checkpoint', 'cfg_options', 'trust_checkpoint'}
    if not {'config', 'checkpoint'} <= teacher.keys() <= keys or teacher.get('checkpoint') is None:
        raise ValueError(
            'teacher needs config and checkpoint, and may have cfg_options and trust_checkpoint; it has '
            f"{', '.join(teacher)}. For the unpruned student itself write teacher='self'"
        )
    if teacher.get('trust_checkpoint'):
        trust()
    cfg = _read_config(teacher['config'])
    cfg.merge_from_dict(dict(teacher.get('cfg_options') or {}))
    try:
        return load_any(cfg, os.fspath(teacher['checkpoint']))
    except SlimError as error:
        raise ValueError(f'teacher: {error}') from error


def _read_config(config: Config | str | os.PathLike) -> Config:
    if isinstance(config, str) and '::' in config:
        return get_config(config)
    try:
        return Config(as_config(config).to_dict())  # a copy, for cfg_options must not reach the caller's
    except OSError as error:
        raise ValueError(f'teacher: there is no config {config}') from error


def check_same_input(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that was trained on pictures normalised otherwise: it sees the student's batch.

    Raises:
        ValueError: If mean, std or the order of channels differ.
    """
    ours, theirs = (getattr(model, 'data_preprocessor', None) for model in (student, teacher))
    if ours is None or theirs is None:
        return
    for name in ('mean', 'std', 'to_rgb', 'channel_conversion'):
        if name in ('to_rgb', 'channel_conversion') and not (hasattr(ours, name) and hasattr(theirs, name)):
            continue  # mmpretrain's name for the order of channels, and mmseg's
        a, b = getattr(ours, name, None), getattr(theirs, name, None)
        same = torch.equal(a.cpu(), b.cpu()) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        if not same:
            raise ValueError(
                f'the teacher was trained with {name} {_short(b)} in its data_preprocessor, the student has '
                f'{_short(a)}; both see one batch: give the student the same data_preprocessor'
            )


def _short(value: Any) -> str:
    return str(value.flatten().tolist()) if isinstance(value, Tensor) else str(value)
