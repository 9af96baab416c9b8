"""The size arguments of torch's functions as equations: which axis each must follow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..fixes import Live, Op
from ..nested import tensors_in
from ..slim.call_arguments import PARAMETERS, SOURCE
from ..slim.call_sites import INFER, Spot, spot
from ..slim.replace_sizes import SCALE, argument, bound, in_sequence
from ..slim.size_expressions import leaves, may_change
from .atoms import FIXED, Axis
from .record import Equation
from .trace import Run
from .traced_int import TracedInt, as_int, expression, of_run

PAIR = 2
VIEW_SIZES = {'view': 1, 'reshape': 1, 'unflatten': 2}  # which argument their sizes are
HANDLERS: dict[str, list[Callable[[Run, Any, Any, Any], None]]] = {}


def handles(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register what reads the sizes of calls of these functions, given the arguments and the result."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for name in names:
            HANDLERS.setdefault(name, []).append(function)
        return function

    return register


def equation(
    run: Run, value: Any, atoms: np.ndarray | None, place: Spot | None = None, inferable: bool = False
) -> None:
    """State that a size argument is the live count of these atoms, or without atoms that it stays.

    A literal cannot follow, but may be replaced where it stands.
    """
    value = of_run(value, run)
    if atoms is not None or (isinstance(value, TracedInt) and may_change(value.expression)):
        target = as_int(value) if atoms is None else Live(run.record.number(atoms))
        run.record.sizes.append(Equation(expression(value), target, run.module, place, inferable))


class Sizes(NamedTuple):
    """The sizes that a call asks for, and the places of them in its source."""

    values: list[Any]
    position: int | None  # the argument that holds them all; None where each is an argument

    def place(self, i: int) -> Spot | None:
        """Return where the i-th of them stands."""
        count = len(self.values)
        return spot(i if self.position is None else in_sequence(self.position, i, count), count)


def sizes_of(args: Any, position: int) -> Sizes:
    """Read the sizes that begin with the argument of this number."""
    rest = list(args[position:])
    if rest and isinstance(rest[0], (tuple, list)):
        return Sizes(list(rest[0]), position)
    return Sizes(rest, None)


def in_order(name: str, args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """Return a call's arguments with keywords in their places, as far as they are given without a gap."""
    args, kwargs = list(args), dict(kwargs)
    for names in PARAMETERS.get(name, (SOURCE,))[len(args) :]:
        given = next((keyword for keyword in names if keyword in kwargs), None)
        if given is None:
            break
        args.append(kwargs.pop(given))
    return args, kwargs


def pairs_of(name: str, args: Any) -> list[int]:
    """Return the dimensions of a view that are pairs: a 2 that stands in the source, behind a size that may follow.

    Rotary embeddings and complex numbers are such, `x.view(n, -1, 2)`; two channels of a head are not meant.
    """
    if name not in VIEW_SIZES:
        return []
    sizes = sizes_of(args, VIEW_SIZES[name]).values
    begin = args[1] % args[0].dim() if name == 'unflatten' else 0
    found: list[int] = []
    follows = False  # whether the nearest size before, pairs left out, may follow
    for number, size in enumerate(sizes):
        if type(size) is not int or size != PAIR:
            follows = isinstance(size, TracedInt) or size == INFER
        elif follows:
            found.append(begin + number)
    return found


@handles('expand', 'broadcast_to')
def _expand(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes, source = sizes_of(args, 1), args[0].shape
    for i, size in enumerate(sizes.values):
        axis, at = run.axes(out)[i], i - len(sizes.values)
        if as_int(size) != -1 and -at <= len(source) and source[at] != 1:  # else it may be of any size
            equation(run, size, None if axis is None else axis.atoms, sizes.place(i), True)


@handles('squeeze', 'squeeze_')
def _squeeze(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    """Note channels whose dimension would go with all of them but one: `x.squeeze()`, and `x.squeeze(1)` as well."""
    source = out if run.cursor.function == 'squeeze_' else args[0]
    given = args[1:] if run.cursor.function == 'squeeze' else ()
    dims = given[0] if given and isinstance(given[0], (tuple, list)) else given or range(source.dim())
    axes = run.axes(source)
    run.record.squeezed += [run.record.number(axis.atoms) for dim in dims if (axis := axes[dim]) is not None]


@handles('view', 'reshape')
def _reshape(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = sizes_of(args, VIEW_SIZES['view'])
    if len(sizes.values) != out.dim():  # view(dtype)
        return
    inferable = all(as_int(size) != INFER for size in sizes.values)
    for i, (size, axis) in enumerate(zip(sizes.values, run.axes(out), strict=True)):
        if as_int(size) != INFER and (
            axis is not None or (isinstance(size, TracedInt) and may_change(size.expression))
        ):
            equation(run, size, None if axis is None else axis.atoms, sizes.place(i), inferable)


@handles('unflatten')  # unflatten(dim, sizes)
def _unflatten(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    dim = args[1] % args[0].dim()
    sizes = sizes_of(args, VIEW_SIZES['unflatten'])
    inferable = all(as_int(size) != INFER for size in sizes.values)
    for i, (size, axis) in enumerate(zip(sizes.values, run.axes(out)[dim:], strict=False)):
        if as_int(size) != INFER:
            equation(run, size, None if axis is None else axis.atoms, sizes.place(i), inferable)


def _tie_pieces(run: Run, source: np.ndarray, lengths: Sequence[int]) -> None:
    """Couple pieces of one dimension position by position, so that they stay equally long.

    A shorter one stays with the first positions of the others; what these have beyond it stays or goes in all of them.
    So a dimension cut in 30, 30 and 28 is cut in a + b, a + b and a, which is how it is cut anew.
    """
    ends = np.cumsum(lengths)
    pieces = np.full((len(lengths), max(lengths)), FIXED)
    for piece, end, length in zip(pieces, ends, lengths, strict=True):
        piece[:length] = source[end - length : end]
    run.tie(pieces.T)


@handles('chunk', 'tensor_split')  # chunk(chunks, dim=0)
def _chunk(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    _cut(run, args[0], args[1], args[2] if len(args) > 2 else 0, out)


@handles('hsplit')
def _hsplit(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    _cut(run, args[0], args[1], min(1, args[0].dim() - 1), out)


@handles('vsplit')
def _vsplit(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    _cut(run, args[0], args[1], 0, out)


@handles('dsplit')
def _dsplit(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    _cut(run, args[0], args[1], 2, out)


def _cut(run: Run, source: Tensor, count: Any, dim: int, out: Sequence[Tensor]) -> None:
    """Couple equal pieces position by position; pieces that begin at numbers freeze the dimension."""
    axis = run.axes(source)[dim]
    if axis is None:
        return
    lengths = [t.shape[dim] for t in out]
    if isinstance(count, int) and as_int(count) == len(out) and min(lengths):
        _tie_pieces(run, axis.atoms, lengths)
    else:
        run.freeze(axis, f'a dimension cut into unequal chunks in {run.where}')


@handles('split', 'split_with_sizes')  # split(size or sizes, dim=0)
def _split(run: Run, args: Any, kwargs: Any, out: Sequence[Tensor]) -> None:
    sizes, dim = args[1], args[2] if len(args) > 2 else 0
    axis = run.axes(args[0])[dim]
    if axis is None:
        return
    if isinstance(sizes, int):
        _tie_pieces(run, axis.atoms, [t.shape[dim] for t in out])
        equation(run, sizes, axis.atoms[: as_int(sizes)], spot(argument(1), 0))
        return
    start, places = 0, Sizes(list(sizes), 1)
    for i, size in enumerate(sizes):
        equation(run, size, axis.atoms[start : start + as_int(size)], places.place(i))
        start += as_int(size)


@handles('narrow')  # narrow(dim, start, length)
def _narrow(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    dim, start, length = args[1:4]
    axis, begin = run.axes(args[0])[dim], as_int(start) % args[0].shape[dim]
    if axis is not None:
        _bound(run, axis, start, spot(argument(2), 0))
        equation(run, length, axis.atoms[begin : begin + as_int(length)], spot(argument(3), 0))


@handles('__getitem__', '__setitem__')
def _getitem(run: Run, args: Any, kwargs: Any, out: Tensor | None) -> None:
    source, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if not any(isinstance(i, (slice, TracedInt)) for i in index):
        return
    used = sum(1 for i in index if i is not None and i is not Ellipsis)
    dim = 0
    for number, item in enumerate(index):
        if item is Ellipsis:
            dim += source.dim() - used
        elif item is not None:
            axis = run.axes(source)[dim] if dim < source.dim() else None
            if isinstance(item, slice) and item.step in (None, 1) and axis is not None:
                for stop, value in enumerate((item.start, item.stop)):
                    if value is not None:
                        _bound(run, axis, value, spot(bound(number, bool(stop), as_int(value) < 0), 0))
            elif isinstance(item, TracedInt) and may_change(item.expression):
                run.freeze(axis, f'picked by an index that depends on a width in {run.where}')
            dim += 1


def _bound(run: Run, axis: Axis, value: Any, where: Spot | None) -> None:
    """Read one bound of a slice: the number of live units before it, or behind it where it counts from the end."""
    n = len(axis)
    if as_int(value) == 0 or as_int(value) >= n or as_int(value) < -n:
        return
    place = as_int(value) % n
    expr = expression(value)
    if place and n % place == 0 and any(np.array_equal(run.atoms_of(w), axis.atoms) for w in leaves(expr, Live)):
        _tie_pieces(run, axis.atoms, [place] * (n // place))  # x[:, : x.shape[1] // 2]
    if as_int(value) < 0:
        flipped = TracedInt.of(-as_int(value), Op('-', 0, expr), run) if isinstance(value, TracedInt) else -value
        equation(run, flipped, axis.atoms[place:], where)
    else:
        equation(run, value, axis.atoms[:place], where)


# conv2d(input, weight, bias, stride, padding, dilation, groups), transposed (..., padding, output_padding, groups)
@handles('conv1d', 'conv2d', 'conv3d', 'conv_transpose1d', 'conv_transpose2d', 'conv_transpose3d')
def _conv(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    groups = kwargs.get('groups', args[6] if len(args) > 6 else 1)
    axis = run.axes(args[0])[1] if args[0].dim() == args[1].dim() else None
    if axis is not None and groups != 1:
        narrowed = run.module in run.policy.narrowed
        equation(run, groups, None if narrowed else axis.atoms[:: len(axis) // as_int(groups)], spot(argument(6), 0))


@handles('group_norm')  # group_norm(input, num_groups, weight, bias, eps)
def _group_norm(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    groups, axis = kwargs.get('num_groups', args[1] if len(args) > 1 else 1), run.axes(args[0])[1]
    if axis is not None and as_int(groups) == len(axis) > 1:  # each channel for itself
        equation(run, groups, axis.atoms, spot(argument(1), 0))


@handles('layer_norm', 'rms_norm')  # layer_norm(input, normalized_shape, ...)
def _layer_norm(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    sizes = sizes_of(args, 1)
    for i, (size, axis) in enumerate(zip(sizes.values, run.axes(args[0])[-len(sizes.values) :], strict=True)):
        equation(run, size, None if axis is None else axis.atoms, sizes.place(i))


@handles('scaled_dot_product_attention')  # (query, key, value, attn_mask, dropout_p, is_causal, *, scale=None)
def _attention(run: Run, args: Any, kwargs: Any, out: Tensor) -> None:
    axis, own = run.axes(args[0])[-1], kwargs.get('scale') is None
    run.reads(tensors_in([*args[1 if own else 0 :], kwargs]))
    if own and axis is not None:
        run.scaled(axis, spot(SCALE, 0))


# multi_head_attention_forward(query, key, value, embed_dim_to_check, num_heads, in_proj_weight, ..., need_weights)
@handles('multi_head_attention_forward')
def _multi_head(run: Run, args: Any, kwargs: Any, out: Any) -> None:
    """Couple the embedding with the rows of all heads: where a module calls the function, it has one width for both."""
    place = spot(argument(3), 0)
    if place is None:  # torch's own module, which is replaced
        return
    embed, width = run.axes(args[0])[-1], args[0].shape[-1]
    packed = None if args[5] is None else run.axes(args[5])[0]
    query = run.axes(kwargs['q_proj_weight'])[0] if packed is None else Axis(packed.atoms[:width], weight=True)
    value = run.axes(kwargs['v_proj_weight'])[0] if packed is None else Axis(packed.atoms[2 * width :], weight=True)
    run.equate(embed, query, 'multi-head attention')
    run.equate(query, value, 'multi-head attention')
    if query is None:
        return
    equation(run, args[3], query.atoms, place)
    heads = query.atoms.reshape(as_int(args[4]), -1)
    if kwargs.get('need_weights', True):
        run.scaled(Axis(heads.max(axis=0), full=torch.from_numpy(heads.astype(np.int32))))
