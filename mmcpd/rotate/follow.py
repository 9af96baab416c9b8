"""Follow the rows of parameters through a running forward."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..slim.call_sites import code_place
from .ledger import UNKNOWN, ZERO, Ledger, Rows, numbers_in

# The very same operation runs on the numbers of rows.
MOVEMENT = set(
    'permute transpose t expand unsqueeze squeeze select slice split split_with_sizes unsafe_split '
    'unsafe_split_with_sizes unbind roll flip repeat repeat_interleave index index_select diagonal unfold'.split()
)
VIEWS = {'view', '_unsafe_view', '_reshape_alias'}  # of numbers with stride 0, which need a reshape
SAME = {'clone', 'detach', 'alias', '_to_copy', 'lift_fresh', 'neg'}
SHAPES = set(
    'zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty '
    'new_empty_strided is_same_size'.split()
)  # read no values
WORDS = {
    'norm': 'a norm', 'mul': 'a factor for each channel or position (rotary embeddings, a gate)',
    'add': 'a sum (a position table, a residual)', 'sub': 'a difference', 'pool': 'pooling',
    'softmax': 'a softmax', 'cat': 'a concatenation', 'copy': 'a copy into another tensor', 'mean': 'a mean',
    'mm': 'a product with a table or learned matrix (relative positions)',
}  # fmt: skip


class Follow(TorchDispatchMode):
    """Follow rows through movements of data and common factors; what else reads them must see them as they are."""

    def __init__(self, model: nn.Module, ledger: Ledger) -> None:
        super().__init__()
        self.ledger, self.paused = ledger, False
        self.paths: dict[nn.Module | None, str] = {module: name for name, module in model.named_modules()}
        self.found: Any = WeakTensorKeyDictionary()
        storages: dict[int, str] = {}
        for name, parameter in model.named_parameters():
            if name in ledger.starts:
                rows = ledger.rows(name).reshape(-1, *[1] * (parameter.dim() - 1)).expand(parameter.shape)
                self.found[parameter] = Rows(rows, weight=True)
                other = storages.setdefault(parameter.data_ptr(), name)
                if other != name:
                    for shared in (name, other):
                        ledger.spoil_tensors(ledger.rows(shared).numpy(), f'{other} and {name} share memory')

    # -- what rules need ---------------------------------------------------------------------------------------------
    def path(self) -> str:
        """Return the path of the module whose method runs, '' for the model itself."""
        return self.paths.get(code_place()[0], '')

    @property
    def where(self) -> str:
        """The same for messages."""
        return self.path() or 'the model itself'

    def rows(self, tensor: Any) -> Rows | None:
        return self.found.get(tensor) if isinstance(tensor, Tensor) else None

    def turning(self, tensor: Any) -> Tensor | None:
        """Return the rows of an activation that turns as they do."""
        rows = self.rows(tensor)
        return None if rows is None or rows.weight or rows.lost else rows.numbers

    def read(self, tensor: Any, reason: str) -> None:
        """Note a reader under which a tensor's rows must stay as they are."""
        rows = self.rows(tensor)
        if rows is not None and rows.numbers is not None and not rows.lost:
            spoil = self.ledger.spoil_tensors if rows.weight else self.ledger.spoil
            spoil(numbers_in(rows.numbers), reason)

    # -- operations --------------------------------------------------------------------------------------------------
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.paused:
            return out
        tensors = tensors_of((*args, *kwargs.values()))
        if not any(t in self.found for t in tensors):
            return out
        op = func._schema.name.split('::')[-1].rstrip('_')
        if op in SHAPES:
            pass
        elif op in MOVEMENT or op in VIEWS or op in SAME:
            self.move(op, func, args, kwargs, out)
        elif op in ('cat', 'stack'):
            self.join(func, args, kwargs, out)
        elif op == 'constant_pad_nd':
            self.pad(func, args, kwargs, out)
        elif op in ('mul', 'div') and self.scale(op, args, out):
            pass
        elif not self.multiply(op, args, kwargs, out):
            self.lose(op, tensors, out)
        return out

    def multiply(self, op: str, args: Any, kwargs: Any, out: Any) -> bool:
        """Take up a product of two activations, and say whether it is one."""
        return False

    def lose(self, op: str, tensors: Sequence[Any], out: Any) -> None:
        """Note that an operation reads rows in a way that a change of basis would show."""
        known = [(t, rows) for t in tensors if (rows := self.rows(t)) is not None]
        if not known:
            return
        lost = next((rows.lost for _, rows in known if rows.lost), '')
        if not all(rows.lost for _, rows in known):
            words = next((w for part, w in WORDS.items() if part in op), f'the operation {op}')
            reason = f'{words} in {self.where}'
            lost = lost or reason
            for tensor, _ in known:
                self.read(tensor, reason)
        if any(not rows.weight for _, rows in known):
            for result in tensors_of([out]):
                same = (rows.numbers for t, rows in known if not rows.weight and t.shape == result.shape)
                self.found[result] = Rows(next(same, None), lost=lost)

    def move(self, op: str, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        source = args[0]
        rows = self.rows(source)
        for other in tensors_of((*args[1:], *kwargs.values())):
            self.read(other, 'it is an index')
        if rows is None:
            return
        outs = tensors_of([out])
        if rows.numbers is None or op in SAME:
            moved: Sequence[Tensor | None] = [rows.numbers] * len(outs)
        elif op in VIEWS:
            moved = [rows.numbers.reshape(out.shape)]
        else:
            moved = tensors_of(
                [func(rows.numbers.detach(), *_on_cpu(args[1:]), **{k: _on_cpu(v) for k, v in kwargs.items()})]
            )
        for tensor, numbers in zip(outs, moved, strict=True):
            self.found[tensor] = Rows(numbers, rows.weight, rows.lost)

    def join(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        parts = [(tensor, self.rows(tensor)) for tensor in args[0]]
        lost = next((rows.lost for _, rows in parts if rows is not None and rows.lost), '')
        weight = all(rows is None or rows.weight for _, rows in parts)
        if lost or any(rows is not None and rows.weight != weight for _, rows in parts):
            self.lose('cat', args[0], out)
            return
        numbers = [
            rows.numbers if rows is not None and rows.numbers is not None else _unmade(tensor) for tensor, rows in parts
        ]
        self.found[out] = Rows(func(numbers, *args[1:], **kwargs), weight)

    def pad(self, func: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        rows = self.rows(args[0])
        value = args[2] if len(args) > 2 else kwargs.get('value', 0)
        if rows is not None:
            numbers = rows.numbers if rows.numbers is None else func(rows.numbers, args[1], UNKNOWN if value else ZERO)
            self.found[out] = Rows(numbers, rows.weight, rows.lost)

    def scale(self, op: str, args: Any, out: Tensor) -> bool:
        """Follow rows through a factor that is the same for all channels of a head, and say whether it is one."""
        for tensor, factor in ((args[0], args[1]), (args[1], args[0]))[: 1 if op == 'div' else 2]:
            numbers = self.turning(tensor)
            if numbers is None or tensor.shape != out.shape:
                continue
            if isinstance(factor, Tensor) and factor.numel() > 1:
                width = _width(numbers)
                if width is None or factor.broadcast_to(out.shape).stride(width) != 0:
                    continue
            self.read(factor, 'it is a factor')
            self.found[out] = Rows(numbers)
            return True
        return False


def tensors_of(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among arguments, lists included."""
    flat = (v for value in values for v in (value if isinstance(value, (list, tuple)) else [value]))
    return [v for v in flat if isinstance(v, Tensor)]


def _on_cpu(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(v) for v in value)
    return value.cpu() if isinstance(value, Tensor) else value


def _unmade(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that no layer makes; a bias may have zeros that are constant (BEiT's keys)."""
    if tensor.dim() == 1:
        return torch.where(tensor.cpu() == 0, ZERO, UNKNOWN).int()
    return torch.full(tensor.shape, UNKNOWN, dtype=torch.int32)


def _width(numbers: Tensor) -> int | None:
    """Return the dimension along which rows follow one another, or None."""
    for dim in reversed(range(numbers.dim())):
        pair = numbers.narrow(dim, 0, min(2, numbers.shape[dim]))
        if numbers.shape[dim] > 1 and numbers.stride(dim) and bool((pair.diff(dim=dim) == 1).all()):
            return dim
    return None
