"""One model that wraps a student and a teacher, and to everything else is the student."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import broadcast, is_distributed
from mmengine.logging import print_log
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmcpd.distill import Taps
from mmcpd.engine.comparisons import Comparison, ZeroWatch, described, find_comparisons, same_samples, zero_reason
from mmcpd.engine.logits import observe, restored
from mmcpd.engine.loss_configs import LOGITS, LossConfig, labels_of, listed, named
from mmcpd.engine.teachers import FrozenTeacher, Rehearsal, check_same_input, load_teacher
from mmcpd.engine.wrappers import DISTILL, StudentWrapper
from mmcpd.registry import MODELS
from mmcpd.slim.copying import copied


@MODELS.register_module()
class Distiller(StudentWrapper):
    """Train a student on its own losses, and to match a teacher on the same batch.

    Its predictions, parameter names and state dict are those of the bare student; losses that have a state of their
    own (queues, projections) add `distill.*` to the state dict. Attributes it lacks are the student's.

    Args:
        student: Config of a model of mmpretrain, mmseg or mmdet (any MMEngine model), or the model.
        teacher: 'self': the student as it is when `begin_distillation` is called (until then only the task's
            losses are returned); or `dict(config=..., checkpoint=..., cfg_options=...)`, or a model, from the
            start; or None.
        losses: Dicts of `type` (a name in `mmcpd.distill`, or of a loss registered in MMEngine's MODELS), `tap` (a
            module output as in `mmcpd.distill.Tap`, a pattern such as `'neck.fpn_convs.*'`, or a list of these; by
            default 'logits': what the model gives out and its loss compares with the labels, found by observing the
            first iteration), `teacher_tap` (as `tap` by default), `name` (in the log: `loss_distill_<name>`), and the
            arguments of the loss. It is called as `loss(student, teacher)`, or `(student, teacher, labels)` if its
            `needs_labels` is True, for each output of several heads, levels or calls of a module, and added up.
        task_weight: Factor of the task's own losses (`loss_task` in the log, where the student calls it `loss`) while
            a teacher teaches. 0: they are not computed, and samples need no labels (take `LoadAnnotations` out of the
            pipeline). Auxiliary heads then get no gradient: leave them out of the model, or with several processes
            set `find_unused_parameters=True`.
        data_preprocessor: For a student whose config has none; the Runner gives the config's own here.
        init_cfg: As for any MMEngine module, over the student and the losses.

    Raises:
        ValueError: If a tap, a loss, its arguments or the teacher are not known or do not fit, or `task_weight` is
            negative, or 0 without any loss to train by; in the first iteration if a tap sees no tensor.

    Example:
        >>> model = dict(
        ...     type='mmcpd.Distiller',
        ...     student=dict(type='mmpretrain.ImageClassifier', backbone=dict(type='mmpretrain.ResNet', depth=50)),
        ...     teacher='self',
        ...     losses=[dict(type='mmcpd.KDLoss', tau=4.0, loss_weight=1.0)],
        ... )
    """

    def __init__(
        self,
        student: Mapping[str, Any] | nn.Module,
        teacher: str | Mapping[str, Any] | nn.Module | None = 'self',
        losses: Sequence[Mapping[str, Any] | str] | Mapping[str, Any] | str | None = (),
        task_weight: float = 1.0,
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        init_cfg: Mapping[str, Any] | list | None = None,
    ) -> None:
        super().__init__(_build_student(student, data_preprocessor), init_cfg)
        losses = listed(losses)
        if isinstance(task_weight, bool) or not isinstance(task_weight, int | float) or not 0 <= task_weight < math.inf:
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
        self._comparisons: dict[str, list[Comparison]] = {}  # found in the first iteration
        self._numbers: dict[str, int] = {}  # of the outputs that each tap on the student has
        self._watch = ZeroWatch()
        self.teaches_itself = isinstance(teacher, str)
        if isinstance(teacher, Mapping):
            self.set_teacher(load_teacher(teacher))
        elif isinstance(teacher, nn.Module) or teacher is None:
            self.set_teacher(teacher)
        elif teacher != 'self':
            raise ValueError(f"teacher must be 'self', a dict of config and checkpoint, a model or None: {teacher!r}")
        else:
            self._check_teacher_taps(self.student)

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
        self._comparisons = {}
        if module is None:
            self._teacher = None
            return
        check_same_input(self.student, module)
        self._check_teacher_taps(module)
        self._teacher = self._frozen(module)

    def _check_teacher_taps(self, module: nn.Module) -> None:
        try:
            for config in self.loss_configs.values():
                if config.teacher_taps != (LOGITS,):
                    Taps(module, named(config.teacher_taps, module))
        except ValueError as error:
            raise ValueError(f'teacher: {error}') from error

    def _frozen(self, module: nn.Module, is_copy: bool = False) -> FrozenTeacher:
        teacher, device = FrozenTeacher(module, is_copy), next(self.student.parameters()).device
        teacher.apply_(lambda tensor: tensor.to(device))
        return teacher

    def snapshot_teacher(self, state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Let a copy of the student, as it is now or with the weights of an earlier snapshot, teach, and return it."""
        module = copied(self.student)
        if state_dict is not None:
            module.load_state_dict(state_dict)
        if is_distributed():
            for buffer in module.buffers():  # each process has batch norm statistics of its own
                broadcast(buffer)
        self._teacher = self._frozen(module, is_copy=True)  # its taps are the student's
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
        if self.distill and not self._comparisons and (self.teaches_itself or self._teacher is not None):
            self._find_comparisons(inputs, data_samples)
        if self._teacher is None or not self.distill:
            return dict(self.student(inputs, data_samples, mode='loss')) | self._zero_losses()
        losses = self._distil(inputs, data_samples, self._teacher)
        self._warn_of_zeros(losses)
        return losses

    def _distil(self, inputs: Tensor, data_samples: list | None, teacher: FrozenTeacher) -> dict[str, Any]:
        """Run the student, and return its own losses and those that compare it with the teacher."""
        # Before the student: its activations are freed by then.
        taught = teacher(inputs, data_samples, taps=self._taps(of_teacher=True))
        with Taps(self.student, self._taps()) as taps:
            losses = self._task_losses(inputs, data_samples)
        for name, several in self._comparisons.items():
            wants_labels = getattr(self.distill[name], 'needs_labels', False)
            labels = [labels_of(data_samples, name)] if wants_labels else []
            terms = []
            for pair in several:
                if len(several) == 1 or pair.tap in taps.seen:  # else no sample has a label of that head
                    self._count(pair.tap, len(taps[pair.tap]), len(taught[pair.teacher_tap]))
                    for ours, theirs in zip(taps[pair.tap], taught[pair.teacher_tap], strict=False):
                        same = same_samples(theirs, pair.tap, len(ours), data_samples)
                        terms.append(pair.compare(ours, same, *labels))
            none = next(self.student.parameters()).sum() * 0
            losses[f'loss_distill_{name}'] = torch.stack(terms).sum() if terms else none
        return losses

    def _count(self, tap: str, ours: int, theirs: int) -> None:
        """Note how many outputs a tap has, and warn once where the teacher has another number of them."""
        if ours != theirs and tap not in self._numbers:
            line = f'tap {tap!r}: the student has {ours} outputs, the teacher {theirs}; the first of each are compared'
            print_log(line, logger='current', level=logging.WARNING)
        self._numbers[tap] = ours

    def _taps(self, of_teacher: bool = False) -> set[str]:
        pairs = (pair for several in self._comparisons.values() for pair in several)
        return {pair.teacher_tap if of_teacher else pair.tap for pair in pairs}

    def _find_comparisons(self, inputs: Tensor, data_samples: list | None) -> None:
        """Find the taps by observing a batch, and see that all losses can be computed, long before they are needed."""
        with_labels = self._teacher is None or self.task_weight > 0
        student = teacher = observe(self.student, inputs, data_samples, labelled=with_labels)
        finds_teacher_taps = any(config.teacher_taps == (LOGITS,) for config in self.loss_configs.values())
        if finds_teacher_taps and self._teacher is not None and not self._teacher.is_copy:
            teacher = observe(self._teacher.module, inputs, data_samples, labelled=False)
        module = self.student if self._teacher is None else self._teacher.module
        found = find_comparisons(self.loss_configs, dict(self.distill.items()), student, teacher, module)
        self._comparisons, self._numbers = found, {}
        if self._teacher is None:
            self._rehearse(inputs, data_samples)
        print_log(described(found, self._numbers), logger='current')

    def _rehearse(self, inputs: Tensor, data_samples: list | None) -> None:
        """Compute all losses once with the student as its own teacher, which it will be; nothing changes by it."""
        training = self.distill.training
        self.distill.eval()  # queues are not written
        try:
            with restored(self.student), torch.no_grad():
                self._distil(inputs, data_samples, Rehearsal(self.student))
        except Exception:
            self._comparisons = {}
            raise
        finally:
            self.distill.train(training)

    def _warn_of_zeros(self, losses: Mapping[str, Any]) -> None:
        for name, several in self._comparisons.items():
            if self._watch.see(name, losses[f'loss_distill_{name}']) and not self._is_teacher():
                self._watch.warned.add(name)
                print_log(zero_reason(name, several), logger='current', level=logging.WARNING)

    def _is_teacher(self) -> bool:
        """Tell whether the student has the teacher's weights: nothing was pruned or learnt yet."""
        ours, theirs = ((m.state_dict() if m is not None else {}) for m in (self.student, self.teacher))
        return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())

    def _task_losses(self, inputs: Tensor, data_samples: list | None) -> dict[str, Any]:
        """Run the student, and return its own losses times `task_weight`; of weight 0 none, and no label is read."""
        if self.task_weight == 0:
            self.student(inputs, data_samples, mode='tensor')
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
        if not isinstance(student, Mapping):
            raise ValueError(f"student is the config of a model, as dict(type='ImageClassifier', ...): got {student!r}")
        config = dict(student)
        if preprocessor is not None and config.get('data_preprocessor') is None:
            config['data_preprocessor'] = preprocessor
        student = MODELS.build(config)
    if not isinstance(student, BaseModel):
        raise ValueError(f'student must be an MMEngine model, got {type(student).__name__}')
    if 'distill' in dict(student.named_children()):
        raise ValueError(f"{type(student).__name__} has a part called 'distill', where the losses' state goes")
    return student
