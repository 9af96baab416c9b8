"""Check what a structure says about a model, before anything is changed: it may come from a stranger's file."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import SlimError, first_line
from ..random_state import seeded
from .attention import REPLACEMENTS
from .call_sites import INFER, Rewrite, rewrite_
from .computed import all_channels
from .noted_rows import are_rows
from .plain_tensors import plain_tensors
from .replace_sizes import LEFT, OUTCOME, RIGHT, is_place
from .weights import all_tensors, is_extra_state, own_tensors

KEYS = ('tensors', 'rows', 'added', 'shared', 'attributes', 'replaced', 'rewritten', 'computed')
NOT_A_SIZE = ('training', 'init_cfg')  # whatever their types: modes, and where MMEngine reads other files from
DTYPES = {
    str(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64, torch.complex128, torch.bool,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    )
}  # fmt: skip
DIMS = 64  # more than torch's tensors can have
NAME, TEXT, REWRITES, ADDED = 200, 2000, 1000, 10_000  # characters of a name and of a call; entries
# Elements that first forwards may make, all tensors together: two lazy layers of a VGG-16 have 120 million. A file's
# own tensors bound them further (`mmcpd.engine.slim_model.cut_to_`).
MADE = 2**28
COUNTED = 1024  # times the elements of the largest tensor: what a forward may count them all to
COMPUTED = 2**16  # channels that a module computes without a weight

_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = 8
_repr.maxlevel = 2


def _short(value: object) -> str:
    """Show a value in a message of one line."""
    text = ' '.join(_repr.repr(value).split())
    return text if len(text) <= NAME else f'{text[:NAME]}...'


def _named(name: object) -> str:
    """Return a name for a message of one line."""
    return name if isinstance(name, str) and name.isprintable() and len(name) <= NAME else _short(name)


@dataclass(frozen=True)
class _Dense:
    """The modules and tensors of a dense model, by name; of the tensors, those that are buffers once they are cut."""

    modules: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]

    def module(self, path: str) -> nn.Module:
        if path not in self.modules:
            raise SlimError(f'this model has no module {_short(path)}, which the structure names: another model')
        return self.modules[path]


def check_structure(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Check that a structure says only what `structure` could have written about this dense model.

    Whatever passes can be applied: names exist, types are exact, and no size is larger than the dense one. The model is
    left as it is.

    Raises:
        SlimError: it says something else; the message is one line and names the entry.

    Example:
        >>> plan = structure(model, small)
        >>> check_structure(build(), plan)
        >>> plan['attributes']['conv1']['out_channels'] = 16
        >>> check_structure(build(), plan)
        Traceback (most recent call last):
        mmcpd.errors.SlimError: conv1.out_channels is 8 in this model, and 16 in the structure: another model
    """
    if type(plan) is not dict or set(plan) != set(KEYS):
        raise SlimError(f'a structure has the entries {", ".join(KEYS)}: got {_short(plan)}')
    for key, entries in plan.items():
        if type(entries) is not dict or not all(type(name) is str for name in entries):
            raise SlimError(f'{key} of the structure is {_short(entries)}, and no table by name')
    modules = dict(model.named_modules())
    dense = _Dense(modules, all_tensors(model), plain_tensors(model) | _checked_channels(modules, plan['computed']))
    _check_added(dense, plan['added'], plan['tensors'])
    _check_tensors(dense, plan['tensors'], plan['added'])
    _check_rows(dense, plan['rows'], plan['tensors'])
    given = {dense.tensors.get(name) for name in plan['tensors']}
    for name, tensor in dense.tensors.items():
        if is_lazy(tensor) and tensor not in given and name not in plan['shared']:
            raise SlimError(f'{name} has no shape in this model, and none in the structure: another model')
    _check_shared(dense, plan)
    _check_replaced(dense, plan)
    _check_attributes(dense, plan)
    _check_rewritten(dense, plan)


# -- tensors -----------------------------------------------------------------------------------------------------------
def _checked_channels(modules: Mapping[str, nn.Module], computed: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the numbers of channels that modules without a tensor compute, by their buffers' names."""
    for path, entry in computed.items():
        if path not in modules or all_tensors(modules[path]):
            raise SlimError(f'this model has no module {_short(path)} that computes channels: another model')
        known = type(entry) is dict and set(entry) == {'dim', 'width'} and all(type(n) is int for n in entry.values())
        if not known or not (0 <= entry['dim'] < DIMS and 1 <= entry['width'] <= COMPUTED):
            raise SlimError(f'{_named(path)} computes the channels {_short(entry)} in the structure: another model')
    return all_channels(computed)


def _check_tensors(dense: _Dense, shapes: Mapping[str, Any], added: Mapping[str, Any]) -> None:
    made, seen = 0, dict[Tensor, list[int]]()
    for name, shape in shapes.items():
        if type(shape) is not list or len(shape) > DIMS or not all(type(n) is int and n >= 0 for n in shape):
            raise SlimError(f'{_named(name)} is {_short(shape)} in the structure, which is no shape')
        tensor = dense.tensors.get(name, dense.plain.get(name))
        if name in added or (tensor is not None and is_lazy(tensor)):
            made += math.prod(shape)
            if made > MADE:
                raise SlimError(f'{_named(name)} is too large in the structure: {_short(tuple(shape))}')
            continue
        if tensor is None or not _contains(tensor.shape, shape) or seen.setdefault(tensor, shape) != shape:
            have = 'missing' if tensor is None else tuple(tensor.shape)
            there = _short(tuple(shape))
            raise SlimError(f'{_named(name)} is {have} in this model, and {there} in the structure: another model')


def _contains(have: Sequence[int], shape: Sequence[int]) -> bool:
    """Say whether a tensor can be cut to a shape; slimming keeps one row at least."""
    return len(have) == len(shape) and all(s == h or 1 <= s <= h for s, h in zip(shape, have, strict=True))


def _check_rows(dense: _Dense, rows: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    for name, dims in rows.items():
        path, _, local = name.rpartition('.')
        cut = local in dense.module(path)._non_persistent_buffers_set or name in dense.plain
        if name not in shapes or not cut:
            raise SlimError(f'{_named(name)} is no buffer outside of the state dict that is cut: another model')
        have, shape = {**dense.plain, **dense.tensors}[name].shape, shapes[name]
        if type(dims) is not list or len(dims) != len(shape) or not all(map(are_rows, dims, shape, have)):
            raise SlimError(f'{name} keeps the rows {_short(dims)} in the structure: another model')


def _check_added(dense: _Dense, added: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    if len(added) > ADDED:
        raise SlimError(f'the structure adds {len(added)} tensors, more than {ADDED}')
    for name, entry in added.items():
        if type(entry) is not dict or set(entry) != {'parameter', 'dtype'} or type(entry['parameter']) is not bool:
            raise SlimError(f'{_named(name)} is added as {_short(entry)}, which says no kind of tensor')
        if type(entry['dtype']) is not str or entry['dtype'] not in DTYPES:
            raise SlimError(f'{_named(name)} is added with an unknown dtype, {_short(entry["dtype"])}')
        path, _, local = name.rpartition('.')
        module = dense.module(path)
        named = local.isprintable() and 0 < len(local) <= NAME and not local.startswith('__')
        free = _is_free(module, local, entry['parameter']) and local not in NOT_A_SIZE and not is_extra_state(local)
        if not named or not free or name not in shapes:
            kind = type(module).__name__
            raise SlimError(f'{_named(name)} of the structure does not fit what {kind} has: another model')


def _is_free(module: nn.Module, local: str, parameter: bool) -> bool:
    """Say whether a first forward could register a tensor under a name: a parameter takes the place of a None."""
    if local in module._buffers:
        return module._buffers[local] is None
    places: tuple[Mapping[str, Any], ...] = (vars(module), module._parameters, module._modules)
    found = [place[local] for place in places if local in place]
    missing = object()
    if (of_class := inspect.getattr_static(type(module), local, missing)) is not missing:
        found.append(of_class)
    return not found or (parameter and all(value is None for value in found))


def _check_shared(dense: _Dense, plan: Mapping[str, Any]) -> None:
    shared, shapes = plan['shared'], plan['tensors']
    for name, other in shared.items():
        known = type(other) is str and name in dense.tensors and (other in dense.tensors or other in plan['added'])
        if not known or other in shared:
            text = f'{_named(name)} and {_named(other)} are one tensor in the structure, and missing in this'
            raise SlimError(f'{text} model')
        mine, own = dense.tensors[name], dense.tensors.get(other)
        parameter = plan['added'][other]['parameter'] if own is None else isinstance(own, nn.Parameter)
        shape = shapes.get(other, None if own is None or is_lazy(own) else list(own.shape))
        fits = shape is None or is_lazy(mine) or _contains(mine.shape, shape)
        if not fits or (isinstance(mine, nn.Parameter) and not parameter):
            raise SlimError(f'{name} and {other} are one tensor in the structure, and cannot be in this model')


# -- modules -----------------------------------------------------------------------------------------------------------
def _check_replaced(dense: _Dense, plan: Mapping[str, Any]) -> None:
    for path, entry in plan['replaced'].items():
        module = dense.module(path)
        if type(entry) is not dict or set(entry) != {'kind', 'arguments'}:
            raise SlimError(f'{path} is replaced by {_short(entry)}, which says no kind and arguments')
        row = REPLACEMENTS.get(entry['kind']) if type(entry['kind']) is str else None
        if row is None or not row.source(module) or not path:
            kind = type(module).__name__
            raise SlimError(f'{path} is a {kind}, which {_short(entry["kind"])} of the structure cannot replace')
        with seeded(0):
            twin: Any = row.kind(module)
        own, given = twin.arguments(), entry['arguments']
        if type(given) is not dict or set(given) != set(own):
            raise SlimError(f'{path} is replaced with the arguments {_short(given)}, and takes {", ".join(own)}')
        for name, value in own.items():
            fewer = type(value) is int and type(given[name]) is int and 1 <= given[name] <= value
            if not fewer and (type(given[name]) is not type(value) or given[name] != value):
                raise SlimError(_differs(path, name, value, given[name]))
    for key in ('replaced', 'attributes', 'rewritten'):
        for path in plan[key]:
            above = [r for r in plan['replaced'] if path.startswith(f'{r}.') or (path == r and key != 'replaced')]
            if above:
                raise SlimError(f'{_named(path)} is named among {key}, and {above[0]} is replaced')


def _check_attributes(dense: _Dense, plan: Mapping[str, Any]) -> None:
    shapes: dict[str, dict[str, list[int]]] = {}  # by module and local name
    for name, shape in plan['tensors'].items():
        path, _, local = name.rpartition('.')
        shapes.setdefault(path, {})[local] = shape
    for path, entries in plan['attributes'].items():
        module, where = dense.module(path), path or 'the model'
        if type(entries) is not dict:
            raise SlimError(f'the attributes of {where} are {_short(entries)}, and no table by name')
        made = largest_made(module, shapes.get(path, {}))
        for name, value in entries.items():
            if name not in vars(module):
                text = f'{where} has no attribute {_named(name)}, which the structure sets'
                raise SlimError(f'{text}: another model')
            if not may_become(name, vars(module)[name], value, made):
                raise SlimError(_differs(where, name, vars(module)[name], value))


def may_become(name: str, dense: object, value: object, made: int = 0) -> bool:
    """Say whether slimming could set an attribute: sizes only, by integers from 1 to the dense ones.

    One leading underscore is allowed, since forwards read `self._width` too. No module of torch's or MMEngine's keeps
    an integer of its own under such a name.

    Args:
        name: of the attribute.
        dense: its value in the dense model.
        value: the new one, as JSON has it: a list also where the dense model has a tuple.
        made: the most that a 0 may become, which stands for a width until the first forward makes the tensors.

    Example:
        >>> may_become('out_channels', 8, 4), may_become('out_channels', 8, 9), may_become('training', True, 1)
        (True, False, False)
    """
    if name in NOT_A_SIZE or name.startswith('__'):
        return False
    if isinstance(dense, tuple | list) and type(dense) in (tuple, list):
        pairs = zip(dense, value, strict=True) if type(value) is list and len(value) == len(dense) else [(0, None)]
        return all(_may_be(have, given, made) for have, given in pairs)
    return _may_be(dense, value, made)


def _may_be(dense: object, value: object, made: int) -> bool:
    return type(dense) is int and type(value) is int and (value == dense or 1 <= value <= (dense or made))


def largest_made(module: nn.Module, shapes: Mapping[str, Sequence[int]]) -> int:
    """Return the elements of the largest of a module's own tensors that its first forward makes; 0 without one.

    Example:
        >>> largest_made(nn.LazyLinear(4), {'weight': [4, 6]}), largest_made(nn.Linear(6, 4), {'weight': [4, 6]})
        (24, 0)
    """
    there = {name for name, tensor in own_tensors(module) if not is_lazy(tensor)}
    return max((math.prod(shape) for name, shape in shapes.items() if name not in there), default=0)


def _differs(where: str, name: str, dense: object, value: object) -> str:
    have, there = _short(dense), _short(value)
    return f'{where}.{_named(name)} is {have} in this model, and {there} in the structure: another model'


# -- calls -------------------------------------------------------------------------------------------------------------
def _check_rewritten(dense: _Dense, plan: Mapping[str, Any]) -> None:
    shapes = [*(t.shape for t in dense.tensors.values() if not is_lazy(t)), *plan['tensors'].values()]
    largest = max(map(math.prod, shapes), default=1)  # a forward may flatten a whole tensor
    for path, rewrites in plan['rewritten'].items():
        module, kind = dense.module(path), type(dense.modules[path])
        if type(rewrites) is not list or len(rewrites) > REWRITES:
            raise SlimError(f'what is rewritten in {path or "the model"} is {_short(rewrites)}: another model')
        for rewrite in rewrites:
            if not _is_rewrite(rewrite, largest):
                where = path or 'the model'
                raise SlimError(f'{where} is rewritten by {_short(rewrite)}, which slimming never writes')
        try:
            rewrite_(module, [Rewrite(*rewrite) for rewrite in rewrites])
        except SlimError as error:
            raise SlimError(first_line(error)) from error
        except Exception as error:  # a number in a decorator's or a default's call is passed to it
            raise SlimError(f'{path or "the model"} cannot be rewritten: {first_line(error)}') from error
        finally:
            module.__class__ = kind


def _is_rewrite(rewrite: object, largest: int) -> bool:
    """Say whether this is a method, the text of a call, an index, a count and a number, as slimming writes them."""
    if type(rewrite) is not list or [type(value) for value in rewrite] != [str, str, int, int, int]:
        return False
    method, text, index, count, number = rewrite
    placed = 0 <= count <= DIMS and is_place(index, count)
    *behind, local = method.split('.')
    named = local.isidentifier() and behind == ['super'] * len(behind) and len(method) <= NAME
    said = named and text.isprintable() and len(text) <= TEXT
    if index == OUTCOME:
        return said and placed and number in (0, 1)
    if index in (LEFT, RIGHT):  # what a forward computes with may be a difference, or count all elements
        return said and placed and abs(number) <= COUNTED * largest
    return said and placed and (number == INFER or 1 <= number <= largest)
