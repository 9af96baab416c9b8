"""One model that wraps a student and a teacher, and to everything else is the student."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import broadcast, is_distributed
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmcpd.distill import Taps
from mmcpd.engine.loss_configs import LossConfig, labels_of
from mmcpd.engine.teachers import FrozenTeacher, check_same_input, load_teacher
from mmcpd.engine.wrappers import DISTILL, StudentWrapper
from mmcpd.registry import MODELS


@MODELS.register_module()
class Distiller(StudentWrapper):
    """Train a student on its own losses, and to match a teacher on the same batch.

    Its predictions, parameter names and state dict are those of the bare student; losses that have a state of their
    own (queues, projections) add `distill.*` to the state dict. Attributes it lacks are the student's.

    Args:
        student: Config of a model of mmpretrain or mmseg (any MMEngine model), or the model.
        teacher: 'self': the student as it is when `begin_distillation` is called (until then only the task's
            losses are returned); or `dict(config=..., checkpoint=..., cfg_options=...)`, or a model, from the
            start; or None.
        losses: Dicts of `type` (a name in `mmcpd.distill`, or of a loss registered in MMEngine's MODELS), `tap` (a
            module output as in `mmcpd.distill.Tap`, 'logits' by default), `teacher_tap` (as `tap` by default),
            `name` (in the log: `loss_distill_<name>`), and the arguments of the loss. It is called as
            `loss(student, teacher)`, or `(student, teacher, labels)` if its `needs_labels` is True.
        task_weight: Factor of the task's own losses (`loss_task` in the log, where the student calls it `loss`) while
            a teacher teaches. 0: they are not computed, and samples need no labels (take `LoadAnnotations` out of the
            pipeline). Auxiliary heads then get no gradient: leave them out of the model, or with several processes
            set `find_unused_parameters=True`.
        data_preprocessor: For a student whose config has none; the Runner gives the config's own here.
        init_cfg: As for any MMEngine module, over the student and the losses.

    Raises:
        ValueError: If a tap, a loss, its arguments or the teacher are not known or do not fit, or `task_weight` is
            negative, or 0 without any loss to train by.

    Example:
        >>> model = dict(
        ...     type='mmcpd.Distiller',
        ...     student=dict(type='mmpretrain.ImageClassifier', backbone=dict(type='mmpretrain.ResNet', depth=50)),
        ...     teacher='self',
        ...     losses=[dict(type='mmcpd.KDLoss', tap='head.fc', tau=4.0, loss_weight=1.0)],
        ... )
    """

    def __init__(
        self,
        student: Mapping[str, Any] | nn.Module,
        teacher: str | Mapping[str, Any] | nn.Module | None = 'self',
        losses: Sequence[Mapping[str, Any]] = (),
        task_weight: float = 1.0,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        init_cfg: Mapping[str, Any] | list | None = None,
    ) -> None:
        super().__init__(_build_student(student, data_preprocessor), init_cfg)
        if not isinstance(task_weight, int | float) or not 0 <= task_weight < math.inf:
            raise ValueError(f'task_weight is a number, 0 or more: got {task_weight!r}')
        if task_weight == 0 and not (losses and teacher is not None):
            raise ValueError('task_weight=0 leaves nothing to train by: give a teacher and losses')
        self.task_weight = float(task_weight)
        self.loss_configs: dict[str, LossConfig] = {}
        for each in losses:
            config = LossConfig.read(each, self.loss_configs)
            self.distill[config.name] = config.build(self.student)
            self.loss_configs[config.name] = config
        # Queues are the same on all processes by themselves, and too large to be sent at each forward.
        local = ((name, buffer) for name, loss in self.distill.items() for buffer in getattr(loss, 'local_buffers', ()))
        self._ddp_params_and_buffers_to_ignore = [f'{DISTILL}{name}.{buffer}' for name, buffer in local]
        self._teacher: FrozenTeacher | None = None
        self.teaches_itself = isinstance(teacher, str)
        if isinstance(teacher, Mapping):
            self.set_teacher(load_teacher(teacher))
        elif isinstance(teacher, nn.Module) or teacher is None:
            self.set_teacher(teacher)
        elif teacher != 'self':
            raise ValueError(f"teacher must be 'self', a dict of config and checkpoint, a model or None: {teacher!r}")

    # -- the teacher ---------------------------------------------------------------------------------------------------
    @property
    def teacher(self) -> nn.Module | None:
        """The frozen model that teaches now, if there is one."""
        return None if self._teacher is None else self._teacher.module

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'teacher':  # nn.Module would make it a part of the model
            self.set_teacher(value)
        else:
            super().__setattr__(name, value)

    def set_teacher(self, module: nn.Module | None) -> None:
        """Let a model teach from now on, or none; it is frozen and put into eval mode, in place.

        Raises:
            ValueError: If a tap's name is not known there, or its pictures are normalised otherwise.
        """
        if module is None:
            self._teacher = None
            return
        check_same_input(self.student, module)
        taps = dict.fromkeys(config.teacher_tap for config in self.loss_configs.values())
        try:
            self._teacher = FrozenTeacher(module, taps)
        except ValueError as error:
            raise ValueError(f'teacher: {error}') from error
        device = next(self.student.parameters()).device
        self._teacher.apply_(lambda tensor: tensor.to(device))

    def snapshot_teacher(self, state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Let a copy of the student, as it is now or with the weights of an earlier snapshot, teach, and return it."""
        module = copy.deepcopy(self.student)
        if state_dict is not None:
            module.load_state_dict(state_dict)
        if is_distributed():
            for buffer in module.buffers():  # each process has batch norm statistics of its own
                broadcast(buffer)
        self.set_teacher(module)
        return module

    def begin_distillation(self) -> None:
        """Take the snapshot, if the student teaches itself and there is none yet."""
        if self.teaches_itself and self._teacher is None:
            self.snapshot_teacher()

    def _apply(self, fn: Any, recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)
        if self._teacher is not None:
            self._teacher.apply_(fn)
        return self

    # -- the losses ----------------------------------------------------------------------------------------------------
    def forward(
        self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list | Tensor | tuple:
        """Do what the student does with a preprocessed batch `(N, C, H, W)`; in mode 'loss' add `loss_distill_<name>`.

        Raises:
            ValueError: If a tap sees no tensor, or a loss needs labels that the samples do not have.
        """
        if mode != 'loss':
            return self.student(inputs, data_samples, mode=mode)
        if self._teacher is None or not self.distill:
            return dict(self.student(inputs, data_samples, mode='loss')) | self._zero_losses()
        taught = self._teacher(inputs)  # before the student: its activations are freed by then
        with Taps(self.student, {config.tap for config in self.loss_configs.values()}) as taps:
            losses = self._task_losses(inputs, data_samples)
        for name, loss in self.distill.items():
            config = self.loss_configs[name]
            labels = [labels_of(data_samples, name)] if getattr(loss, 'needs_labels', False) else []
            losses[f'loss_distill_{name}'] = loss(taps[config.tap], taught[config.teacher_tap], *labels)
        return losses

    def _task_losses(self, inputs: Tensor, data_samples: list | None) -> dict[str, Any]:
        """Run the student, and return its own losses times `task_weight`; of weight 0 none, and no label is read."""
        if self.task_weight == 0:
            self.student(inputs, mode='tensor')
            return {}
        weighted = {}
        for name, value in self.student(inputs, data_samples, mode='loss').items():
            if 'loss' in name:  # what MMEngine adds up; the rest are metrics
                value = [v * self.task_weight for v in value] if isinstance(value, list) else value * self.task_weight
            weighted['loss_task' if name == 'loss' else name] = value  # `loss` is the total in the log
        return weighted

    def _zero_losses(self) -> dict[str, Tensor]:
        """Return a zero for each loss with parameters: several processes expect a gradient for every one."""
        return {
            f'loss_distill_{name}': torch.stack([p.sum() * 0 for p in loss.parameters()]).sum()
            for name, loss in self.distill.items()
            if any(p.requires_grad for p in loss.parameters())
        }


def _build_student(
    student: Mapping[str, Any] | nn.Module, preprocessor: Mapping[str, Any] | nn.Module | None
) -> BaseModel:
    if not isinstance(student, nn.Module):
        config = dict(student)
        if preprocessor is not None and config.get('data_preprocessor') is None:
            config['data_preprocessor'] = preprocessor
        student = MODELS.build(config)
    if not isinstance(student, BaseModel):
        raise ValueError(f'student must be an MMEngine model, got {type(student).__name__}')
    if 'distill' in dict(student.named_children()):
        raise ValueError(f"{type(student).__name__} has a part called 'distill', where the losses' state goes")
    return student
