"""What slimming does beyond slicing: sizes, statistics, scales and comparisons, each a small noun."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


# -- size expressions: where an integer of a forward came from ---------------------------------------------------------
@dataclass(frozen=True)
class Attr:
    """An integer attribute of a module, `name` or `name[i]`."""

    module: str
    name: str


@dataclass(frozen=True)
class Live:
    """The number of kept positions of an axis."""

    axis: int


@dataclass(frozen=True)
class Input:
    """A size of an activation that no layer's width decides: a batch, a height."""

    size: int


@dataclass(frozen=True)
class Op:
    """Two expressions joined by `+`, `-`, `*`, `//` or `%`."""

    symbol: str
    left: Expression
    right: Expression


Expression: TypeAlias = Attr | Live | Input | Op | int


# -- what slimming does beyond slicing ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class CallSite:
    """One size in one call, or one operand of one expression, of one method of one module's class.

    Attributes:
        module: its path.
        method: name of the method.
        text: the call as `ast.unparse` writes it.
        index: which of the sizes; of an operand `LEFT` or `RIGHT` (`mmcpd.slim.call_sites`).
        count: how many sizes the call has, 0 where it is an operand.
        inferable: whether torch can work the size out from the others, as where none of a reshape is -1 yet.
    """

    module: str
    method: str
    text: str
    index: int
    count: int
    inferable: bool = False


@dataclass(frozen=True)
class CodePlace:
    """Where a method of a module is: found again in the next run, without its source.

    Attributes:
        module: path of the module.
        function: qualified name of the module's method.
        instructions: offsets in byte code, from that method inward through the helper functions that it calls.
    """

    module: str
    function: str
    instructions: tuple[int, ...]


@dataclass(frozen=True)
class SizeRule:
    """A size that a forward asks for or computes with: `expression` must equal `target`.

    Where no attribute makes it so, the size is written into the source at `site`, if there is one.
    """

    expression: Expression
    target: Live | int
    site: CallSite | None


@dataclass(frozen=True)
class Statistic:
    """A statistic over channels (a norm's, a mean, a softmax), which masking takes over the kept ones.

    Attributes:
        place: where the forward takes it.
        axis: its channels.
        dim: where they are, counted from the end: -1 is the last dimension.
    """

    place: CodePlace
    axis: int
    dim: int


@dataclass(frozen=True)
class Rows:
    """Some rows of one dimension of a tensor."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class QueryScale:
    """A query whose forward divides by the square root of its own width; its rows take up the difference.

    Attributes:
        rows: what produces the query, all heads and the bias.
        axis: the width of one head.
        module: path of the module that divides.
    """

    rows: tuple[Rows, ...]
    axis: int
    module: str


@dataclass(frozen=True)
class Equality:
    """Two sizes that a forward compares and finds equal."""

    left: Expression
    right: Expression


@dataclass(frozen=True)
class Fixes:
    """What slimming does beyond slicing.

    Attributes:
        statistics: over channels; masking needs them.
        scales: of queries, to be folded into their rows.
        sizes: that a forward asks for.
        constants: widths that a forward computes with, and that must stay what they are in the dense model.
        equalities: that must hold afterwards.
    """

    statistics: tuple[Statistic, ...] = ()
    scales: tuple[QueryScale, ...] = ()
    sizes: tuple[SizeRule, ...] = ()
    constants: tuple[SizeRule, ...] = ()
    equalities: tuple[Equality, ...] = ()
