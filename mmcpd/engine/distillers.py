"""One model that wraps a student and a teacher, and to everything else is the student."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import broadcast, is_distributed
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import Tensor, nn

from mmcpd.distill import Taps
from mmcpd.engine.loss_configs import Lesson, labels_of, read_lesson
from mmcpd.engine.teachers import DISTILL, DTYPES, FrozenTeacher, check_same_input, load_teacher

STUDENT = 'student.'  # what nn.Module puts before the student's names, and nobody else sees


@MODELS.register_module()
class Distiller(BaseModel):
    """Train a student on its own losses and on what a teacher says about the same batch.

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
        data_preprocessor: For a student whose config has none; the Runner gives the config's own here.
        teacher_dtype: None: as the student (mixed precision included); or 'bfloat16', 'float16'.
        teacher_compile: Run the teacher through `torch.compile`.
        init_cfg: As for any MMEngine module, over the student and the losses.

    Raises:
        ValueError: If a tap, a loss, its arguments or the teacher are not known or do not fit.

    Example:
        >>> model = dict(
        ...     type='Distiller',
        ...     student=dict(type='mmpretrain.ImageClassifier', ...),
        ...     teacher='self',
        ...     losses=[dict(type='KDLoss', tap='head.fc', tau=1.0, loss_weight=1.0)],
        ... )
    """

    def __init__(
        self,
        student: Mapping[str, Any] | nn.Module,
        teacher: str | Mapping[str, Any] | nn.Module | None = 'self',
        losses: Sequence[Mapping[str, Any]] = (),
        data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
        teacher_dtype: str | None = None,
        teacher_compile: bool = False,
        init_cfg: Mapping[str, Any] | list | None = None,
    ) -> None:
        model = _build_student(student, data_preprocessor)
        super().__init__(model.data_preprocessor, init_cfg)
        del self._modules['data_preprocessor']  # it stays the student's, found there as other attributes are
        self.student = model
        self.distill = nn.ModuleDict()
        self.lessons: dict[str, Lesson] = {}
        for config in losses:
            lesson = read_lesson(config, self.lessons)
            self.distill[lesson.name] = lesson.build(self.student)
            self.lessons[lesson.name] = lesson
        if teacher_dtype not in DTYPES:
            known = ', '.join(map(repr, DTYPES))
            raise ValueError(f'teacher_dtype must be one of {known}, got {teacher_dtype!r}')
        self.teacher_dtype, self.teacher_compile = teacher_dtype, teacher_compile
        # Queues are the same on all processes by themselves, and too large to be sent at each forward.
        self._ddp_params_and_buffers_to_ignore = [
            f'{DISTILL}{name}.{buffer}'
            for name, loss in self.distill.items()
            for buffer in getattr(loss, 'local_buffers', ())
        ]
        self._register_state_dict_hook(_as_student)
        self.register_load_state_dict_post_hook(_report_as_student)
        self._teacher: FrozenTeacher | None = None
        self.teaches_itself = isinstance(teacher, str)
        if isinstance(teacher, Mapping):
            self.set_teacher(load_teacher(teacher))
        elif isinstance(teacher, nn.Module) or teacher is None:
            self.set_teacher(teacher)
        elif teacher != 'self':
            raise ValueError(f"teacher must be 'self', a dict of config and checkpoint, a model or None: {teacher!r}")

    # The teacher ------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module | None:
        """The frozen model that teaches now, if there is one."""
        return None if self._teacher is None else self._teacher.module

    def set_teacher(self, module: nn.Module | None) -> None:
        """Let a model teach from now on; it is frozen and put into eval mode, in place. None: nobody teaches.

        Raises:
            ValueError: If a tap's name is not known there, or its pictures are normalised otherwise.
        """
        if module is None:
            self._teacher = None
            return
        check_same_input(self.student, module)
        taps = dict.fromkeys(lesson.teacher_tap for lesson in self.lessons.values())
        try:
            self._teacher = FrozenTeacher(module, taps, DTYPES[self.teacher_dtype], self.teacher_compile)
        except ValueError as error:
            raise ValueError(f'teacher: {error}') from error
        device = next(self.student.parameters()).device
        self._teacher.apply_(lambda tensor: tensor.to(device))

    def snapshot_teacher(self, state_dict: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Let a copy of the student, as it is now, teach from now on, and return it.

        Args:
            state_dict: Weights for the copy, as when a run goes on that took its snapshot long ago.
        """
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

    # The losses -------------------------------------------------------------------------------------------

    def forward(
        self, inputs: Tensor, data_samples: list | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list | Tensor | tuple:
        """Do what the student does; in mode 'loss' add `loss_distill_<name>` for each loss.

        Args:
            inputs: The preprocessed batch, `(N, C, H, W)`.
            data_samples: As the student takes them.
            mode: 'loss', 'predict' or 'tensor'.

        Raises:
            ValueError: If a tap sees no tensor, or a loss needs labels that the samples do not have.
        """
        if mode != 'loss':
            return self.student(inputs, data_samples, mode=mode)
        if self._teacher is None or not self.distill:
            return dict(self.student(inputs, data_samples, mode='loss')) | self._untaught()
        said = self._teacher(inputs)  # before the student: its activations are gone by then
        with Taps(self.student, {lesson.tap for lesson in self.lessons.values()}) as taps:
            losses = dict(self.student(inputs, data_samples, mode='loss'))
        for name, loss in self.distill.items():
            lesson = self.lessons[name]
            labels = [labels_of(data_samples, name)] if getattr(loss, 'needs_labels', False) else []
            losses[f'loss_distill_{name}'] = loss(taps[lesson.tap], said[lesson.teacher_tap], *labels)
        return losses

    def _untaught(self) -> dict[str, Tensor]:
        """Return a zero for each loss with parameters: several processes expect a gradient for every one."""
        return {
            f'loss_distill_{name}': torch.stack([p.sum() * 0 for p in loss.parameters()]).sum()
            for name, loss in self.distill.items()
            if any(p.requires_grad for p in loss.parameters())
        }

    # Everything else is the student's ---------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get('_modules', {}).get('student')
            if student is None or name.startswith('_'):
                raise
            return getattr(student, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'teacher':  # nn.Module would make it a part of the model
            self.set_teacher(value)
        else:
            super().__setattr__(name, value)

    def val_step(self, data: dict | tuple | list) -> list:
        return self.student.val_step(data)

    def test_step(self, data: dict | tuple | list) -> list:
        return self.student.test_step(data)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.student.parse_losses(losses)

    def named_parameters(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Name the parameters as the bare student does: rules about names (learning rates by layer) still apply."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield _bare(name, prefix), parameter

    def named_buffers(
        self, prefix: str = '', recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in super().named_buffers(prefix, recurse, remove_duplicate):
            yield _bare(name, prefix), buffer

    def get_layer_depth(self, param_name: str, *args: Any) -> tuple[int, int]:
        """Answer mmpretrain's layer-wise learning rates, which walk the modules and so see `student.`."""
        return self.student.get_layer_depth(param_name.removeprefix(STUDENT), *args)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take the bare student's names; torch's and MMEngine's loaders both come by here, with a copy."""
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + DISTILL)]:
            state_dict[prefix + STUDENT + key.removeprefix(prefix)] = state_dict.pop(key)
        for key, own in self.distill.state_dict().items():
            state_dict.setdefault(prefix + DISTILL + key, own)  # a bare student's checkpoint has none: keep ours
        versions = getattr(state_dict, '_metadata', None)
        added = {} if versions is None else {f'{STUDENT}{k}'.rstrip('.'): v for k, v in versions.items()}
        if versions is not None:
            versions.update(added)
        self._loading = (prefix, versions, added, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _as_student(module: Distiller, state_dict: Any, prefix: str, _: dict) -> None:
    """Rename a state dict's entries, and their versions, to the bare student's names, in place and in order."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[_bare(key, prefix.rstrip('.'))] = state_dict.pop(key)
    versions = state_dict._metadata
    inner = prefix + STUDENT
    stateless = not any(key.startswith(prefix + DISTILL) for key in state_dict)
    for key in list(versions):
        if f'{key}.'.startswith(inner):
            versions[(prefix + f'{key}.'.removeprefix(inner)).rstrip('.')] = versions.pop(key)
        elif stateless and f'{key}.'.startswith(prefix + DISTILL):
            del versions[key]


def _report_as_student(module: Distiller, keys: Any) -> None:
    """Name what did not fit as the bare student would, and leave the caller's versions as they were."""
    prefix, versions, added, error_msgs = module.__dict__.pop('_loading')
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [_bare(name, prefix.rstrip('.')) for name in names]
    error_msgs[:] = [message.replace(f' {prefix}{STUDENT}', f' {prefix}') for message in error_msgs]
    for key in added:
        versions.pop(key, None)


def _bare(name: str, prefix: str) -> str:
    """Drop `student.` after the prefix: `('a.student.fc.weight', 'a')` gives `'a.fc.weight'`."""
    before = f'{prefix}.' if prefix else ''
    return before + name.removeprefix(before).removeprefix(STUDENT)


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
