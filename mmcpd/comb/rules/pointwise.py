"""Element-wise operations: what meets after broadcasting is equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ..atoms import Axis
from ..trace import AXES, Call, Run

MULTI_HEAD = 'multi_head_attention_forward'  # which scales its queries inside
PADDING = 'pad'  # makes an empty tensor where it wraps around, and fills it part by part with all other dimensions
WIDENING = ('_pad_packed_sequence', MULTI_HEAD, PADDING)
Rule = Callable[[Run, Call], None]
ZeroRule = Callable[[Call, Sequence[Axis], int], bool]


# -- where a result is zero, given the axes that met at a removed position and the number of operands ------------------
def lost(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """f(0) is not 0: sigmoid, exp."""
    return False


def stays(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """f(0) is 0, so a channel that is zero before is zero after: relu, tanh."""
    return all(axis.zero for axis in met)


def any_factor(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """mul(self, other): one zero factor is enough."""
    return any(axis.zero for axis in met)


def numerator(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """div(self, other): the numerator decides, where it has the channels and the denominator is not zero too."""
    own = any(axis is met[0] for axis in getattr(call.named.get('self'), AXES, ()))
    return own and met[0].zero and not any(axis.zero for axis in met[1:])


def all_summands(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """add(self, other), maximum, lerp: all operands are zero there, and no number is added."""
    scalar = call.named.get('other')
    return stays(call, met, operands) and len(met) == operands and (isinstance(scalar, Tensor) or scalar in (None, 0))


def within_bounds(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """clamp(self, min, max), hardtanh(self, min_val=-1, max_val=1), clamp_min, clamp_max: zero lies within."""
    if not stays(call, met, operands):
        return False
    low = call.named.get('min', call.named.get('min_val'))
    high = call.named.get('max', call.named.get('max_val'))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        # A bound for each channel, which is zero where the channel is; `clamp_min` and `clamp_max` have one alone.
        return call.op == 'clamp' and len(met) == operands
    return (low is None or low <= 0) and (high is None or high >= 0)


def positive_power(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """pow(self, exponent): 0 ** exponent is 0 above 0."""
    exponent = call.named.get('exponent')
    return stays(call, met, operands) and isinstance(exponent, (int, float)) and exponent > 0


def filled(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """masked_fill(self, mask, value): zero before, and filled with zeros."""
    own = [axis for axis in met if any(axis is a for a in getattr(call.named['self'], AXES, ()))]
    return bool(own) and own[0].zero and _zero_number(call.named.get('value'))


def selected(call: Call, met: Sequence[Axis], operands: int) -> bool:
    """where(condition, self, other): both are zero, whichever is taken."""
    values = [call.named.get(name) for name in ('self', 'other')]
    axes = [[axis for axis in met if any(axis is a for a in getattr(v, AXES, ()))] for v in values]
    return all(own[0].zero if own else _zero_number(v) for own, v in zip(axes, values, strict=True))


def _zero_number(value: object) -> bool:
    return (
        float(value) == 0
        if isinstance(value, (int, float)) or (isinstance(value, Tensor) and not value.dim())
        else False
    )


# -- rules -------------------------------------------------------------------------------------------------------------
def copied(run: Run, call: Call) -> None:
    # copy_(self, src): an empty tensor, which nobody has a view of, becomes what fills it, whatever made its sizes
    into, source = call.named['self'], call.named['src']
    if run.is_bare(into) and into.shape == source.shape:
        run.set(call.out, run.axes(source))
    else:
        meet(run, call)


def pointwise(zero_after: ZeroRule = lost) -> Rule:
    """Return the rule of an element-wise operation; `zero_after` says where its result is zero."""
    return lambda run, call: meet(run, call, zero_after)


def never_zero(operand: str, zero_after: ZeroRule = lost) -> Rule:
    """Return the rule of an element-wise operation that has no value where this operand is zero: a divisor, a log."""

    def rule(run: Run, call: Call) -> None:
        if isinstance(tensor := call.named.get(operand), Tensor):
            run.never_zero(tensor)
        meet(run, call, zero_after)

    return rule


def power(run: Run, call: Call) -> None:
    # pow(self, exponent): 0 has no negative power
    exponent = call.named.get('exponent')
    if isinstance(exponent, int | float) and exponent < 0:
        run.never_zero(call.named['self'])
    meet(run, call, positive_power)


def meet(run: Run, call: Call, zero_after: ZeroRule = lost) -> None:
    """Make the axes that meet after broadcasting equal. A size of one, or a stride of zero, is a broadcast."""
    out: Tensor = call.out if isinstance(call.out, Tensor) else call.out[0]
    tensors = call.tensors()
    result: list[Axis | None] = []
    weight = all(map(run.of_weights, tensors))
    for back in range(out.dim(), 0, -1):
        wide = [tensor for tensor in tensors if tensor.dim() >= back and tensor.shape[-back] != 1]
        met = [axis for tensor in wide if (axis := run.axes(tensor)[-back]) is not None]
        bare = any(run.axes(t)[-back] is None and t.stride(-back) != 0 and t.shape[-back] > 1 for t in wide)
        if not met:
            result.append(None)
            continue
        first = met[0]
        for axis in met[1:]:
            run.equate(first, axis, call.op)
        if bare:  # frozen from here on, so nothing that follows needs to know
            run.equate(first, None, call.op)
            result.append(None)
            continue
        zero = zero_after(call, met, len(tensors))
        if call.op == 'add' and len(met) == 2 and met[0].weight != met[1].weight:  # a bias that is added by itself
            activation, bias = sorted(met, key=lambda axis: axis.weight)
            run.beside(activation, bias)
        full = first.full if first.full is not None and first.full.dim() == out.dim() else None
        result.append(Axis(first.atoms, zero, weight, full))
    for tensor in call.outputs():
        if tensor.shape == out.shape:
            run.set(tensor, tuple(result))


def fresh(run: Run, call: Call) -> None:
    """Leave an output without axes: nothing of the input is in it.

    What torch makes inside one of its functions is as wide as what it meets there.
    """
    if run.cursor.function in WIDENING and isinstance(call.out, Tensor):
        zero = call.named.get('fill_value', 0) == 0 and run.cursor.function != PADDING
        sizes, padded = call.out.shape, run.cursor.padded
        wide = [size > 1 and number < len(sizes) - padded for number, size in enumerate(sizes)]
        run.set(call.out, [run.new_axis(n, zero) if new else None for n, new in zip(sizes, wide, strict=True)])


def same(run: Run, call: Call) -> None:
    """Pass the axes through untouched."""
    run.set(call.out, run.axes(call.tensors()[0]))


def like(zero: bool) -> Rule:
    """Return the rule of a tensor that is made in the shape of another, of zeros or of anything else."""
    return lambda run, call: run.set(call.out, [a and a.activation(zero) for a in run.axes(call.tensors()[0])])


def as_strided(run: Run, call: Call) -> None:
    # as_strided(self, size, stride, storage_offset): only a relabelling of strides is understood
    source = call.named['self']
    moved = any(s > 1 and a != b for s, a, b in zip(source.shape, source.stride(), call.out.stride(), strict=False))
    if call.out.shape != source.shape or moved:
        unknown(run, call)
    else:
        same(run, call)


def compared(run: Run, call: Call) -> None:
    """Freeze what a loss compares with labels: classes, coordinates."""
    for tensor in call.tensors():
        run.freeze_all(tensor, f'a loss compares it in {run.where}')


def unknown(run: Run, call: Call) -> None:
    """Freeze what goes through an operation without a rule, and report it."""
    if any(map(run.layered, call.tensors())):
        run.unsupported(call.op)
    for tensor in call.tensors():
        run.freeze_all(tensor, f'no rule for {call.op} in {run.where}')
