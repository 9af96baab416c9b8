"""An integer that remembers where it came from, and stays so under `+ - * // % >> <<`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from torch import Tensor

from ..fixes import Equality, Expression, Input, Live, Op
from ..slim.call_sites import Spot, can_be_written, spot
from ..slim.replace_sizes import LEFT, OUTCOME, RIGHT
from ..slim.size_expressions import OPERATORS, leaves, may_change
from .comparing import COMPARED, place_of
from .record import Equation, Note
from .trace import Run

FAR = 1000  # times a size is a bound that was not meant for it
OTHERS = ('torch.', 'einops.', 'numpy.', 'mmcpd.')  # whose own comparisons are no branches of a forward


def as_int(value: Any) -> int:
    """Return the plain number of a size, without a note that the forward took it, which `int` makes."""
    return int.__int__(value) if isinstance(value, int) else int(value)


def expression(value: int) -> Expression:
    """Return where an integer came from; a plain one is itself."""
    return value.expression if isinstance(value, TracedInt) else as_int(value)


def of_run(value: Any, run: Run | None) -> Any:
    """Return a traced integer, or the plain one where another run left it in somebody's cache."""
    return as_int(value) if isinstance(value, TracedInt) and value.run is not run else value


def _binary(symbol: str, swap: bool = False) -> Callable[[TracedInt, Any], Any]:
    function: Callable[[Any, Any], Any] = OPERATORS[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if isinstance(other, (float, Tensor)):
            number = self.as_number(RIGHT if swap else LEFT)
            return function(other, number) if swap else function(number, other)
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        other = of_run(other, self.run)
        left, right = (other, self) if swap else (self, other)
        value = TracedInt.of(
            function(as_int(left), as_int(right)), Op(symbol, expression(left), expression(right)), self.run
        )
        if symbol in ('-', '%', '//'):
            value.parts = _parts_of(left, right)
        if not as_int(value):
            value.parts = value.parts or (*_parts(left), *_parts(right))
        return value

    return method


def _ordered(symbol: str) -> Callable[[TracedInt, Any], Any]:
    """Compare two sizes: as in `if x.shape[1] < 8`, whose answer may not change where channels go."""
    function: Callable[[Any, Any], Any] = OPERATORS[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, (int, float)):
            return NotImplemented
        if isinstance(other, int) and not as_int(other):
            self.keep_zero()
        answer = function(as_int(self), as_int(other) if isinstance(other, int) else other)
        self.keep_answer(symbol, other, answer, sys._getframe(1))
        return answer

    return method


def _shrinks(expr: Expression) -> bool:
    """Say whether an expression is no larger where its widths are: sums and products of no negative numbers are."""
    if isinstance(expr, Op):
        return expr.symbol in '+*' and _shrinks(expr.left) and _shrinks(expr.right)
    return not isinstance(expr, int) or expr >= 0


def _parts(value: int) -> tuple[_Part, ...]:
    return value.parts if isinstance(value, TracedInt) else ()


def _parts_of(left: int, right: int) -> tuple[_Part, ...]:
    """Return what a difference, a quotient or a remainder of a width and something else is made of; not of two widths.

    Of a size of the input it is noted that the place computes with such ones.
    """
    sides = [(side, size) for side, size in ((LEFT, left), (RIGHT, right)) if isinstance(size, TracedInt)]
    found = tuple(_Part(size, spot(side, 0)) for side, size in sides if may_change(size.expression))
    for side, size in sides if not found else ():
        size.compute_with_input(spot(side, 0))
    wide = [bool(leaves(expression(size), Live)) for size in (left, right)]
    return found if wide[0] != wide[1] else ()


class _Part(NamedTuple):
    """A size, and where a forward computes with it."""

    size: TracedInt
    place: Spot | None


class TracedInt(int):
    """An integer that remembers its expression, and the run in which it was read."""

    expression: Expression
    run: Run | None
    parts: tuple[_Part, ...] = ()  # of a difference, a quotient or a remainder, what it is made of

    @classmethod
    def of(cls, value: int, expr: Expression, run: Run | None) -> TracedInt:
        traced = cls(value)
        traced.expression, traced.run = expr, run
        return traced

    __add__, __radd__ = _binary('+'), _binary('+', True)
    __sub__, __rsub__ = _binary('-'), _binary('-', True)
    __mul__, __rmul__ = _binary('*'), _binary('*', True)
    __floordiv__, __rfloordiv__ = _binary('//'), _binary('//', True)
    __mod__, __rmod__ = _binary('%'), _binary('%', True)

    def __neg__(self) -> TracedInt:
        return 0 - self

    __hash__ = int.__hash__

    def as_number(self, side: int) -> int:
        """Note that a forward computes with this width as with any number: as in `x / math.sqrt(d)`."""
        if may_change(self.expression):
            self.compute_with(spot(side, 0))
        elif leaves(self.expression, Input):
            self.compute_with_input(spot(side, 0))
        return as_int(self)

    def compute_with_input(self, place: Spot | None) -> None:
        """Note that a forward computes with a size of the input at a place, where no number may stand."""
        if self.run is not None and place is not None:
            self.run.record.with_inputs.add(place_of(place))

    def compute_with(self, place: Spot | None) -> None:
        """Note that a forward computes with this width at a place, where it must stay what it was."""
        if self.run is not None:
            record = self.run.record
            record.notes.add(Note.WIDTH_COMPUTED)
            if place is not None:
                record.constants.append(Equation(self.expression, as_int(self), self.run.module, place))

    def keep_zero(self) -> None:
        """Note that a forward asks whether a width has anything over, as for a padding: nothing stays nothing."""
        for part in self.parts if not as_int(self) else ():
            part.size.compute_with(part.place)

    def widths_beside(self, other: int) -> list[Live]:
        """Return the widths in this and in another expression."""
        return leaves(self.expression, Live) + leaves(expression(of_run(other, self.run)), Live)

    def keep_answer(self, symbol: str, other: float, answer: bool, frame: FrameType) -> None:
        """Note that a comparison comes out so where channels go, too; where that cannot be written, widths stay."""
        run = self.run
        if run is None or f'{frame.f_globals.get("__name__", "")}.'.startswith(OTHERS):
            return
        number, size = type(other) in (int, float), as_int(self)
        far = number and symbol != '==' and other >= FAR * size > 0
        nothing = number and other <= 0 < size
        if (far or nothing) and _shrinks(self.expression):
            # A guard of memory or of 32-bit numbers, as `x.numel() > 2 ** 31`: no smaller model comes nearer. Or of
            # empty tensors, as `x.numel() == 0`: one unit stays of every group.
            return
        right = expression(of_run(other, run)) if isinstance(other, int) else 0
        compared, place = Op(symbol, self.expression, right), spot(OUTCOME, 0)
        widths, sizes = leaves(compared, Live), leaves(compared, Input)
        if isinstance(other, int) and (widths or sizes) and can_be_written(place):
            run.record.compared.append(Equation(compared, int(answer), run.module, place))
        elif other > 1 and not (symbol == '==' and answer):
            for width in widths:
                run.record.table.freeze(run.atoms_of(width), COMPARED.format(run.where))

    def __bool__(self) -> bool:
        for part in self.parts:
            part.size.compute_with(part.place)
        return as_int(self) != 0

    def __abs__(self) -> int:
        return abs(self.as_number(LEFT))

    def __and__(self, other: Any) -> Any:
        return self.as_number(LEFT) & other

    def __or__(self, other: Any) -> Any:
        return self.as_number(LEFT) | other

    def __xor__(self, other: Any) -> Any:
        return self.as_number(LEFT) ^ other

    def __invert__(self) -> int:
        return ~self.as_number(LEFT)

    def bit_length(self) -> int:
        return self.as_number(LEFT).bit_length()

    def __format__(self, how: str) -> str:
        return format(self.as_number(LEFT), how)

    def __rshift__(self, other: int) -> Any:
        return self // (1 << as_int(other))

    def __lshift__(self, other: int) -> Any:
        return self * (1 << as_int(other))

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __pos__(self, *_: Any) -> TracedInt:
        return self

    __round__ = __floor__ = __ceil__ = __pos__

    def __int__(self) -> int:
        """Return the number alone: what a forward works out from it keeps the value of the dense model."""
        place = spot(LEFT, 0)
        if self.run is not None and place is not None:
            made = as_int(self) if may_change(self.expression) else -1
            self.run.record.casts.setdefault(place_of(place), set()).add(made)
        return self.as_number(LEFT)

    def __float__(self) -> float:
        return float(self.as_number(LEFT))

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(self.as_number(LEFT), other, modulo)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        return pow(other, self.as_number(RIGHT), modulo)

    def __truediv__(self, other: Any) -> Any:
        return self.as_number(LEFT) / (other.as_number(RIGHT) if isinstance(other, TracedInt) else other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.as_number(RIGHT)

    def __eq__(self, other: object) -> bool:
        """Compare as integers; that an axis was found equal to something is an equation too."""
        equal = int.__eq__(self, other)
        if isinstance(other, int):
            self.keep_equality(other, equal, sys._getframe(1))
        return equal

    def keep_equality(self, other: int, equal: bool, frame: FrameType) -> None:
        """Note that two sizes were found equal, or not."""
        if not equal or self.widths_beside(other):
            self.keep_answer('==', other, equal, frame)
        if not equal:
            return
        if not as_int(self) and self.parts:
            self.keep_zero()
        elif self.run is not None:
            found = Equality(expression(self), expression(of_run(other, self.run)))
            if leaves(found.left, Live) or leaves(found.right, Live):
                self.run.record.equalities.append(found)

    def __ne__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if isinstance(other, int):
            self.keep_equality(other, equal, sys._getframe(1))
        return equal if equal is NotImplemented else not equal

    __lt__, __le__, __gt__, __ge__ = map(_ordered, ('<', '<=', '>', '>='))

    def __reduce__(self) -> tuple[Any, ...]:
        return int, (as_int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return as_int(self)
