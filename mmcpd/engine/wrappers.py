"""Find the bare model inside what wraps it: of modules, of configs, and of the names in a state dict."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, cast

from mmengine.config import Config, ConfigDict
from mmengine.model import BaseModel, is_model_wrapper
from torch import Tensor, nn

STUDENT = 'student.'  # what nn.Module puts before the student's names; removed wherever names are read
DISTILL = 'distill.'  # what a distiller adds to a student's checkpoint: no part of the student
# Types of a config that wrap a model, and the key of what they wrap.
WRAPPERS = {'Distiller': 'student', 'slimmed': 'model'}


# -- modules -----------------------------------------------------------------------------------------------------------
def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a data-parallel wrapper."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside a data-parallel wrapper and a distiller: the one that is combed, pruned and slimmed."""
    model = unwrapped(model)
    return model.student if isinstance(model, StudentWrapper) else model


class StudentWrapper(BaseModel):
    """Pass for the student that it holds: in attributes, in names of parameters, and in the state dict.

    Its preprocessor is the student's; `init_cfg` is as for any MMEngine module.
    """

    student: BaseModel

    def __init__(self, student: BaseModel, init_cfg: Mapping[str, Any] | list | None = None) -> None:
        super().__init__(student.data_preprocessor, init_cfg)
        del self._modules['data_preprocessor']  # __getattr__ finds the student's
        self.student = student
        self.distill = nn.ModuleDict()
        self._register_state_dict_hook(_rename_entries)
        self.register_load_state_dict_post_hook(_rename_misfits)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            student = self.__dict__.get('_modules', {}).get('student')
            if student is None or name.startswith('_'):
                raise
            return getattr(student, name)

    def val_step(self, data: dict | tuple | list) -> list:
        return self.student.val_step(data)

    def test_step(self, data: dict | tuple | list) -> list:
        return self.student.test_step(data)

    def parse_losses(self, losses: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return self.student.parse_losses(losses)

    def named_parameters(self, prefix: str = '', *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Name the parameters as the bare student does: rules about names (learning rates by layer) still apply."""
        for name, parameter in super().named_parameters(prefix, *args, **kwargs):
            yield bare_name(name, prefix), parameter

    def named_buffers(self, prefix: str = '', *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        for name, buffer in super().named_buffers(prefix, *args, **kwargs):
            yield bare_name(name, prefix), buffer

    def get_layer_depth(self, param_name: str, *args: Any) -> tuple[int, int]:
        """Answer mmpretrain's layer-wise learning rates, which walk the modules and so see `student.`."""
        return self.student.get_layer_depth(param_name.removeprefix(STUDENT), *args)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Take the bare student's names; torch's and MMEngine's loaders both call this, with a copy."""
        for key in [k for k in state_dict if k.startswith(prefix) and not k.startswith(prefix + DISTILL)]:
            state_dict[prefix + STUDENT + key.removeprefix(prefix)] = state_dict.pop(key)
        for key, own in self.distill.state_dict().items():
            state_dict.setdefault(prefix + DISTILL + key, own)  # a bare student's checkpoint has none: keep ours
        versions = getattr(state_dict, '_metadata', None)
        added = {} if versions is None else {f'{STUDENT}{k}'.rstrip('.'): v for k, v in versions.items()}
        if versions is not None:
            versions.update(added)
        self._loading = (prefix, versions, added, args[-1])  # the last argument is the list of errors
        super()._load_from_state_dict(state_dict, prefix, *args)


# -- names in a state dict ---------------------------------------------------------------------------------------------
def bare_name(name: str, prefix: str = '') -> str:
    """Drop `student.` after the prefix.

    Example:
        >>> bare_name('a.student.fc.weight', 'a')
        'a.fc.weight'
    """
    before = f'{prefix}.' if prefix else ''
    return before + name.removeprefix(before).removeprefix(STUDENT)


def student_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a training checkpoint's weights under the bare student's names.

    Example:
        >>> list(student_weights({'state_dict': {'module.fc.bias': 1, 'module.distill.cirkd.queue': 2}}))
        ['fc.bias']
    """
    weights = {name.removeprefix('module.'): value for name, value in checkpoint['state_dict'].items()}
    return {name: value for name, value in weights.items() if not name.startswith(DISTILL)}


def _rename_entries(module: StudentWrapper, state_dict: Any, prefix: str, _: dict) -> None:
    """Rename a state dict's entries, and their versions, to the bare student's names, in place and in order."""
    for key in [k for k in state_dict if k.startswith(prefix)]:
        state_dict[bare_name(key, prefix.rstrip('.'))] = state_dict.pop(key)
    versions = state_dict._metadata
    inner = prefix + STUDENT
    stateless = not any(key.startswith(prefix + DISTILL) for key in state_dict)
    for key in list(versions):
        if f'{key}.'.startswith(inner):
            versions[(prefix + f'{key}.'.removeprefix(inner)).rstrip('.')] = versions.pop(key)
        elif stateless and f'{key}.'.startswith(prefix + DISTILL):
            del versions[key]


def _rename_misfits(module: StudentWrapper, keys: Any) -> None:
    """Name what did not fit as the bare student would, and leave the caller's versions as they were."""
    prefix, versions, added, error_msgs = module.__dict__.pop('_loading')
    for names in (keys.missing_keys, keys.unexpected_keys):
        names[:] = [bare_name(name, prefix.rstrip('.')) for name in names]
    error_msgs[:] = [message.replace(f' {prefix}{STUDENT}', f' {prefix}') for message in error_msgs]
    for key in added:
        versions.pop(key, None)


# -- configs -----------------------------------------------------------------------------------------------------------
def type_name(config: Mapping[str, Any]) -> str:
    """Return the class name that a config's `type` names, without its scope.

    Example:
        >>> type_name({'type': 'mmcpd.PruneHook'})
        'PruneHook'
    """
    kind = config.get('type', '')
    return kind.rsplit('.', 1)[-1] if isinstance(kind, str) else kind.__name__


def student_config(cfg: Config) -> ConfigDict:
    """Return a copy of the config of the bare model inside a distiller or `slimmed`, with its preprocessor.

    Example:
        >>> student_config(Config({'model': {'type': 'mmcpd.Distiller', 'student': {'type': 'ImageClassifier'}}}))
        {'type': 'ImageClassifier'}
    """
    return _inside(cfg, WRAPPERS)


def trained_config(cfg: Config) -> ConfigDict:
    """Return a copy of the config of the bare model that is trained: that of a `slimmed` one as it is.

    Example:
        >>> slim = {'type': 'mmcpd.slimmed', 'model': {'type': 'ImageClassifier'}, 'structure': 'slim.pth'}
        >>> trained_config(Config({'model': {'type': 'mmcpd.Distiller', 'student': slim}})).type
        'mmcpd.slimmed'
    """
    return _inside(cfg, {'Distiller': WRAPPERS['Distiller']})


def _inside(cfg: Config, wrappers: Mapping[str, str]) -> ConfigDict:
    model = copy.deepcopy(cfg.model)
    preprocessor = model.get('data_preprocessor') or cfg.get('data_preprocessor')
    while type_name(model) in wrappers:
        model = model[wrappers[type_name(model)]]
        preprocessor = model.get('data_preprocessor') or preprocessor
    if preprocessor is not None:  # as Runner does
        model.setdefault('data_preprocessor', copy.deepcopy(preprocessor))
    return model
