"""Write a slim model as one plain Python file, which builds it with torch and the model's own package alone."""

from __future__ import annotations

import ast
import inspect
import pprint
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config
from torch import nn

from mmcpd.engine.build import build_dense
from mmcpd.engine.method_source import subclass_source
from mmcpd.engine.slim_model import without_pretrained
from mmcpd.engine.tensor_file import DTYPES
from mmcpd.engine.wrappers import student_config
from mmcpd.errors import SlimError
from mmcpd.names import in_short
from mmcpd.slim import attention
from mmcpd.slim.call_sites import Rewrite, rewrites_of
from mmcpd.slim.computed import CHANNELS, buffer_name
from mmcpd.slim.mask import named_tensors
from mmcpd.slim.plain_tensors import plain_tensors
from mmcpd.slim.references import detached_references
from mmcpd.version import __version__

HEAD = '''"""{kind}, slim: built with torch and the model's own package alone.

    from {stem} import build
    model = build()    # in eval mode, with the weights of {stem}.safetensors beside this file

The dense model is built from MODEL and then given the shapes, attributes and methods of the slim one. Do not call its
`init_weights` afterwards. Written by mmcpd {version}.
"""

from __future__ import annotations

import json
from pathlib import Path
{imports}
WEIGHTS = Path(__file__).with_name('{stem}.safetensors')
SCOPE = {scope!r}  # where the names of types in MODEL are looked up
DTYPES = {{{dtypes}}}
'''
BUILD = '''

def read_tensors(path):
    """Return the tensors of a safetensors file by name."""
    raw = Path(path).read_bytes()
    start = 8 + int.from_bytes(raw[:8], 'little')
    entries, values = json.loads(raw[8:start]), bytearray(raw[start:])
    entries.pop('__metadata__', None)
    tensors = {}
    for name, entry in entries.items():
        (begin, end), dtype, shape = entry['data_offsets'], DTYPES[entry['dtype']], entry['shape']
        empty = begin == end
        flat = torch.empty(0, dtype=dtype) if empty else torch.frombuffer(values[begin:end], dtype=dtype)
        tensors[name] = flat.reshape(shape).clone()
    return tensors


def build_dense():
    """Build the dense model; nothing is loaded."""
    with DefaultScope.overwrite_default_scope(SCOPE):
        return revert_sync_batchnorm(MODELS.build(ConfigDict(MODEL)))


def own_tensors(model):
    """Return all parameters and buffers by name, shared ones under each of their names."""
    found = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f'{path}.{name}' if path else name] = tensor
    return found


@torch.no_grad()
def build(weights=WEIGHTS):
    """Build the slim model in eval mode, with its weights."""
    model, values = build_dense(), read_tensors(weights)
'''
END = """    own = own_tensors(model)
    filled = {id(own[name]) for name in values}
    for name, tensor in own.items():
        if id(tensor) not in filled:
            raise ValueError(f'{weights} has no {name}')
    return model.eval()
"""
RESIZE = """    own = own_tensors(model)
    for name, value in values.items():  # a tensor that several modules share stays one
        if name not in own:
            raise ValueError(f'{weights} is of another model: it has {name}')
        if tuple(value.shape) != SHAPES.get(name, tuple(own[name].shape)):
            raise ValueError(f'{weights} is of another model: {name} is {tuple(value.shape)} in it')
        if is_lazy(own[name]):
            own[name].materialize(value.shape)
        own[name].data = value.to(own[name].dtype)
"""


def plain_code(cfg: Config, plan: Mapping[str, Any], small: nn.Module, stem: str) -> str:
    """Return the text of a Python file that builds a slim model; its weights are beside it in `stem`.safetensors.

    Args:
        cfg: the config that was pruned.
        plan: the structure of the slim.pth, as `mmcpd.slim.structure` describes it.
        small: the slim model.
        stem: the file's name without its ending.

    Raises:
        SlimError: something that cannot be written plainly; the message says what.
    """
    dense = build_dense(Config({'model': without_pretrained(student_config(cfg)), 'default_scope': _scope(cfg)}))
    refuse(dense, small, plan)
    model, kinds = _plain(without_pretrained(student_config(cfg)), 'model'), plan['replaced']
    used = dict.fromkeys(tensor.dtype for tensor in named_tensors(small).values())
    dtypes = ', '.join(f'{DTYPES[dtype]!r}: {dtype}' for dtype in used if dtype in DTYPES)
    shapes = {name: tuple(shape) for name, shape in plan['tensors'].items()}
    subclasses, lines = _rewritten(small, plan['rewritten'])
    parts = [
        HEAD.format(kind=type(small).__name__, stem=stem, version=__version__, scope=_scope(cfg), dtypes=dtypes,
                    imports=_imports(cfg, bool(kinds), bool(plan['added']))),
        f'MODEL = {_shown(model)}\n# Shapes and attributes that differ from those of the dense model.\n',
        f'SHAPES = {_shown(shapes)}\nATTRIBUTES = {_shown(_attributes(small, plan["attributes"]))}\n',
        *(f'\n\n{text.strip()}\n' for text in (*(_replacements() if kinds else ()), *subclasses)),
        BUILD, *_registered(dense, plan), *_computed(plan), *_added(plan), RESIZE, *_shared(plan), *_replaced(kinds),
    ]  # fmt: skip
    if plan['attributes']:
        parts.append(
            '    for path, attributes in ATTRIBUTES.items():\n        for name, value in attributes.items():\n'
        )
        parts.append('            setattr(model.get_submodule(path), name, value)\n')
    return ''.join([*parts, *lines, END])


def refuse(dense: nn.Module, small: nn.Module, plan: Mapping[str, Any]) -> None:
    """Refuse what plain code cannot say.

    Raises:
        SlimError: with what it is.
    """
    if any(True for _ in detached_references(dense)):
        raise SlimError('a module keeps detached tensors of another one (state_dict()): no plain code follows them')
    for path, module in small.named_modules():
        kind = type(module).__bases__[0] if rewrites_of(module) else type(module)
        if kind.__module__.startswith('mmcpd.') and kind is not attention.SlimMultiheadAttention:
            raise SlimError(f"{path or 'the model'} is a {kind.__name__}, which is mmcpd's own: it needs mmcpd")
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise SlimError(f'{path or "the model"} has an extra state, which is no tensor: it cannot be written')
    unknown = {entry['kind'] for entry in plan['replaced'].values()} - {'MultiheadAttention'}
    if unknown:
        raise SlimError(f'the replacement of {in_short(sorted(unknown))} has no plain source')


def _shown(value: Any) -> str:
    return pprint.pformat(value, width=118, sort_dicts=False)


def _scope(cfg: Config) -> str:
    return str(cfg.get('default_scope') or 'mmengine')


def _plain(value: Any, where: str) -> Any:
    """Return a config in plain Python values: a class is named by its path.

    Raises:
        SlimError: a value is none.
    """
    if isinstance(value, Mapping):
        return {name: _plain(each, f'{where}.{name}') for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(each, f'{where}[{i}]') for i, each in enumerate(value))
    if where.endswith('.type') and (isinstance(value, type) or inspect.isfunction(value)):
        value = f'{value.__module__}.{value.__qualname__}'
    if value is not None and type(value) not in (bool, int, float, str):
        raise SlimError(f'{where} is a {type(value).__name__}, which cannot be written as a plain value')
    if isinstance(value, float) and (value != value or abs(value) == float('inf')):
        raise SlimError(f'{where} is {value}, which cannot be written as a plain value')
    return value


def _imports(cfg: Config, attention_too: bool, adds: bool) -> str:
    """Return the lines of imports: torch, MMEngine, and what the config imports."""
    lines = ['from functools import reduce', 'from typing import Any'] if attention_too else []
    lines += ['', 'import torch']
    lines += ['import torch.nn.functional as F'] if attention_too else []
    lines += ['from mmengine.config import ConfigDict', 'from mmengine.model import revert_sync_batchnorm']
    lines += ['from mmengine.registry import MODELS, DefaultScope']
    lines += ['from torch import Tensor, nn'] if attention_too else ['from torch import nn'] if adds else []
    lines += ['from torch.nn.parameter import is_lazy']
    custom = (cfg.get('custom_imports') or {}).get('imports') or []
    names = [custom] if isinstance(custom, str) else custom
    lines += [f'import {name}  # registers parts of the model' for name in names if name.partition('.')[0] != 'mmcpd']
    return '\n'.join([*lines, ''])


def _attributes(small: nn.Module, changed: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the new attributes by path and name, of the types that the module has.

    Raises:
        SlimError: a value is no plain one.
    """
    found = {path: {name: vars(small.get_submodule(path))[name] for name in names} for path, names in changed.items()}
    for path, values in found.items():
        for name, value in values.items():
            if not _is_literal(value):
                raise SlimError(f'{path}.{name} is {value!r}, which cannot be written as a plain value')
    return found


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError):  # as of a torch.Size
        return False


def _replacements() -> list[str]:
    """Return the source of what takes the place of modules that know one width only."""
    return [inspect.getsource(each) for each in (attention.SlimMultiheadAttention, attention.merge_masks)]


def _rewritten(small: nn.Module, rewritten: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the sources of the subclasses, one for each class and sizes, and the lines that put them in place."""
    names: dict[tuple[type, tuple[Any, ...]], str] = {}
    sources, lines = [], []
    for path, entries in rewritten.items():
        kind, _ = key = _key(small, path, entries)
        if key not in names:
            names[key] = f'slim_{kind.__name__.lower()}_{len(names)}'
            sources.append(subclass_source(kind, [Rewrite(*entry) for entry in entries], names[key]))
    for key, name in names.items():
        paths = [path for path, entries in rewritten.items() if _key(small, path, entries) == key]
        lines.append(f'    kind = {name}()\n    for path in {pprint.pformat(paths, width=100)}:\n')
        lines.append('        model.get_submodule(path).__class__ = kind\n')
    return sources, lines


def _key(small: nn.Module, path: str, entries: Any) -> tuple[type, tuple[Any, ...]]:
    return type(small.get_submodule(path)).__bases__[0], tuple(map(tuple, entries))


def _registered(dense: nn.Module, plan: Mapping[str, Any]) -> list[str]:
    """Return the lines that make buffers of plain tensors which were cut."""
    lines = []
    for name in sorted(plain_tensors(dense).keys() & plan['tensors'].keys()):
        path, _, local = name.rpartition('.')
        lines.append(f'    del model.get_submodule({path!r}).{local}\n')
        lines.append(f'    model.get_submodule({path!r}).register_buffer({local!r}, values[{name!r}], False)\n')
    return lines


def _computed(plan: Mapping[str, Any]) -> list[str]:
    """Return the lines that let modules without a weight give out the kept ones of the channels that they compute."""
    lines = []
    for path, entry in plan['computed'].items():
        kept = buffer_name(path)
        hook = f'lambda module, _, out: out.index_select({entry["dim"]}, module.{CHANNELS})'
        lines.append(f'    model.get_submodule({path!r}).register_buffer({CHANNELS!r}, values[{kept!r}], False)\n')
        lines.append(f'    model.get_submodule({path!r}).register_forward_hook({hook})\n')
    return lines


def _added(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, entry in plan['added'].items():
        path, _, local = name.rpartition('.')
        put = 'register_parameter' if entry['parameter'] else 'register_buffer'
        value = (
            f'nn.Parameter(values[{name!r}], values[{name!r}].is_floating_point())'
            if entry['parameter']
            else f'values[{name!r}]'
        )
        lines.append(f'    model.get_submodule({path!r}).{put}({local!r}, {value})\n')
    return lines


def _shared(plan: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, other in plan['shared'].items():
        (path, _, local), (of, _, its) = name.rpartition('.'), other.rpartition('.')
        first = f'model.get_submodule({of!r}).{its}'
        lines.append(f'    model.get_submodule({path!r}).{local} = {first}  # one tensor\n')
    return lines


def _replaced(kinds: Mapping[str, Any]) -> list[str]:
    lines = []
    for path, entry in kinds.items():
        arguments = ', '.join(f'{name}={value!r}' for name, value in entry['arguments'].items())
        lines.append(f'    old = model.get_submodule({path!r})\n    new = SlimMultiheadAttention(old, {arguments})\n')
        lines.append('    for parent in list(model.modules()):\n')
        lines.append('        for name in [name for name, child in parent._modules.items() if child is old]:\n')
        lines.append('            setattr(parent, name, new)\n')
    return lines
