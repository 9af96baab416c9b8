"""Find what no observed pass ran, and freeze the channels that it may use.

Whether a layer ran is asked of its tensors: a forward may read them without calling the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Set
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..slim.mask import named_tensors
from .atoms import AtomTable, Axis
from .storages import memory_of
from .straight import straight_parts

LAYERS = (_ConvNd, nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)  # which sum over a weight's columns
TABLES = (nn.Embedding, nn.EmbeddingBag, nn.ParameterList, nn.ParameterDict)  # which read no width
PARAMETRIZED = 'parametrizations'  # the module below a parametrized one that holds its tensors
REASON = (
    'a layer that never ran may use them: give comb a pass that runs it in `also=[...]`, or say '
    "`unused='leave'` (used by {})"
)


class Ran:
    """What ran of a model: the tensors that operations read, the modules that were called, the axes that these met."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.met: dict[str, list[np.ndarray]] = {'': []}  # atoms of inputs and outputs, by the called module's path
        self.unread: set[int] = set()  # by `id`
        self.operations: Counter[str] = Counter()
        self._same: dict[Hashable, list[int]] = {}
        for tensor in (*model.parameters(), *model.buffers()):
            self.unread.add(id(tensor))
            self._same.setdefault(_memory(tensor), []).append(id(tensor))

    def read(self, op: str, tensors: Iterable[Tensor]) -> None:
        """Note that an operation reads tensors; one that only makes another like it, as `zeros_like`, does not."""
        self.operations[op] += 1
        if self.unread and not op.startswith('new_') and not op.endswith('_like'):
            for tensor in tensors:
                self.unread.difference_update(self._same.get(_memory(tensor), ()))

    @property
    def unread_names(self) -> set[str]:
        """The names of the tensors that nothing read."""
        return {name for name, tensor in named_tensors(self.model).items() if id(tensor) in self.unread}

    def meet(self, path: str, axes: Iterable[Axis | None]) -> None:
        """Note the axes of what a module was given or gave."""
        self.met.setdefault(path, []).extend(axis.all_atoms() for axis in axes if axis is not None)


def _memory(tensor: Tensor) -> Hashable:
    """Return what two objects have in common that are one tensor: `x.data` is another object than `x`."""
    storage = memory_of(tensor)
    if storage is None:
        return id(tensor)
    return storage._cdata, tensor.shape, tensor.stride(), tensor.storage_offset()


class _Use(NamedTuple):
    """A layer that never ran, and the widths that it may read and make."""

    path: str
    reads: frozenset[int]
    makes: frozenset[int]


class Unused:
    """What of a model never ran; `made` are the widths that layers made."""

    def __init__(self, ran: Ran, made: Set[int]) -> None:
        self.ran, self.made, self.model = ran, made, ran.model
        self.modules = dict(self.model.named_modules(remove_duplicate=False))
        called = {id(self.modules[path]) for path in ran.met}
        self.called = {path for path, module in self.modules.items() if id(module) in called}
        self.idle = {path for path, module in self.modules.items() if path not in self.called and self._idle(module)}

    def _idle(self, module: nn.Module) -> bool:
        """Say whether a module has tensors, and none of them was read."""
        held = [*module.parameters(), *_saved_buffers(module)]
        return bool(held) and all(id(tensor) in self.ran.unread for tensor in held)

    @property
    def names(self) -> tuple[str, ...]:
        """The paths of all layers that never ran, and the names of single tensors that nothing read."""
        found: dict[str, None] = {}
        for path, module in self.model.named_modules():
            if f'.{PARAMETRIZED}' in f'.{path}':
                continue
            if path in self.idle:
                if _own(module):
                    found[path] = None
                continue
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and id(tensor) in self.ran.unread and self.made & set(tensor.shape):
                    found[f'{path}.{name}'.lstrip('.')] = None
        return tuple(found)

    def freeze_(self, table: AtomTable) -> None:
        """Freeze the channels of running tensors that layers which never ran may read or make.

        These are the axes of as many channels among what goes in and out of the nearest module around it that was
        called, and of the modules called directly inside that one, weights that were read without a call included.
        Where none has the width that a layer reads, all narrower ones may be joined or flattened for it. A part is
        passed over that the forward around it cannot run: one without branches, which does not mention it.
        """
        scopes = self._scopes(table)
        for top in (path for path in self.idle if path.rpartition('.')[0] not in self.idle and self._may_run(path)):
            uses = list(_ends(top, self.modules[top]))
            made = frozenset().union(*(_widths(module)[1] for module in self.modules[top].modules()))
            for use in uses:
                met = scopes.get(self._caller(top), [])
                for atoms in met:
                    if len(atoms) in use.reads | use.makes:
                        table.freeze(atoms, REASON.format(use.path))
                for width in use.reads - made - {len(atoms) for atoms in met}:
                    for atoms in met:
                        if len(atoms) < width:
                            table.freeze(atoms, REASON.format(use.path))

    def _may_run(self, path: str) -> bool:
        """Say whether the module around a part may run it for another input."""
        around, _, name = path.rpartition('.')
        parts = straight_parts(self.modules[around]) if around in self.called else None
        return parts is None or name in parts

    def _caller(self, path: str) -> str:
        """Return the nearest module around one that was called."""
        while path and path not in self.called:
            path = path.rpartition('.')[0]
        return path

    def _scopes(self, table: AtomTable) -> dict[str, list[np.ndarray]]:
        """Return the axes that meet in each called module; see `freeze_`."""
        found: dict[str, dict[bytes, np.ndarray]] = {}

        def add(where: str, met: Iterable[np.ndarray]) -> None:
            found.setdefault(where, {}).update({atoms.tobytes(): atoms for atoms in met})

        by_module = {id(self.modules[path]): met for path, met in self.ran.met.items()}
        for path in self.called:
            met = by_module[id(self.modules[path])]
            add(path, met)
            add(self._caller(path.rpartition('.')[0]), met)
        tensors = named_tensors(self.model)
        for row in table.rows:
            owner = row.tensor.rpartition('.')[0]
            if id(tensors[row.tensor]) not in self.ran.unread and (not owner or owner not in self.called):
                add(self._caller(owner), [np.arange(row.start, row.start + row.size)])
        return {where: list(met.values()) for where, met in found.items()}


# -- the widths of a layer ---------------------------------------------------------------------------------------------
def _saved_buffers(module: nn.Module) -> Iterator[Tensor]:
    for each in module.modules():
        for name, buffer in each._buffers.items():
            if buffer is not None and buffer.is_floating_point() and name not in each._non_persistent_buffers_set:
                yield buffer


def _own(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a module holds itself, or below it where it is parametrized."""
    held = getattr(module, PARAMETRIZED, nn.Module())
    own = [*module._parameters.values(), *module._buffers.values(), *held.parameters()]
    return [tensor for tensor in own if tensor is not None]


def _widths(module: nn.Module) -> tuple[frozenset[int], frozenset[int]]:
    """Return the widths that a layer may read and make, by the shapes of its tensors: `(O, I, ...)` of torch's layers.

    A norm, and any layer of another kind, may read and make each size of its tensors.
    """
    shapes = [tuple(tensor.shape) for tensor in _own(module)]
    reads = makes = {size for shape in shapes for size in shape}
    if isinstance(module, TABLES):
        reads = makes = set()
    elif isinstance(module, LAYERS):
        groups, columns = getattr(module, 'groups', 1), int(not getattr(module, 'transposed', False))
        weights = [shape for shape in shapes if len(shape) > 1]
        reads = {shape[columns] * (groups if columns else 1) for shape in weights}
        makes = {shape[1 - columns] * (1 if columns else groups) for shape in weights}
    return frozenset(reads - {1}), frozenset(makes - {1})


def _ends(path: str, module: nn.Module, reads: bool = True, makes: bool = True) -> Iterator[_Use]:
    """Return the layers of a part that never ran by which channels may go in or out: all but those inside a chain."""
    if _own(module):
        none: frozenset[int] = frozenset()
        read, made = _widths(module)
        yield _Use(path, read if reads else none, made if makes else none)
    chain = type(module).forward is nn.Sequential.forward
    parts = [n for n, part in module.named_children() if n != PARAMETRIZED and any(map(_own, part.modules()))]
    for name in parts:
        first, last = not chain or name == parts[0], not chain or name == parts[-1]
        yield from _ends(f'{path}.{name}', module.get_submodule(name), reads and first, makes and last)
