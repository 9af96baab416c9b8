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
    """One size in one call, or one operand of one expression, of one method of one module's class."""

    module: str  # its path
    method: str
    text: str  # the call as `ast.unparse` writes it
    index: int  # which of the sizes; of an operand `LEFT` or `RIGHT` (`mmcpd.slim.call_sites`)
    count: int  # how many sizes the call has, 0 where it is an operand
    inferable: bool = False  # torch can work the size out from the others, as where none of a reshape is -1 yet


@dataclass(frozen=True)
class CodePlace:
    """Where a method of a module is: found again in the next run, without its source."""

    module: str  # its path
    function: str  # qualified name of the module's method
    instructions: tuple[int, ...]  # offsets in byte code, from that method inward through the functions that it calls


@dataclass(frozen=True)
class SizeRule:
    """A size that a forward asks for or computes with: `expression` must equal `target`.

    Where no attribute makes it so, the size is written into the source at `site`, if there is one.
    """

    expression: Expression
    target: Live | int
    site: CallSite | None
    where: str = ''  # the module and the source line, for messages


@dataclass(frozen=True)
class Statistic:
    """A statistic over channels (a norm's, a mean, a softmax), which masking takes over the kept ones."""

    place: CodePlace  # where the forward takes it
    axis: int  # its channels
    dim: int  # where they are, counted from the end: -1 is the last dimension
    alone: bool  # whether that line never took another one along that dimension


@dataclass(frozen=True)
class Rows:
    """Some rows of one dimension of a tensor."""

    tensor: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Unmasked:
    """Rows that a forward divides by, or by their norm: not zero where masked; what they go with is."""

    tensor: str
    dim: int


@dataclass(frozen=True)
class QueryScale:
    """A query whose forward divides by the square root of its own width; its rows take up the difference."""

    rows: tuple[Rows, ...]  # what produces the query, all heads and the bias
    axis: int  # the width of one head
    module: str  # path of the module that divides


@dataclass(frozen=True)
class Equality:
    """Two sizes that a forward compares and finds equal."""

    left: Expression
    right: Expression


@dataclass(frozen=True)
class ComputedChannels:
    """A module without a weight whose output has channels, as an encoding of positions: it gives out the kept ones."""

    module: str  # its path
    dim: int  # of its output
    width: int  # of the dense model


@dataclass(frozen=True)
class Fixes:
    """What slimming does beyond slicing."""

    statistics: tuple[Statistic, ...] = ()  # over channels; masking needs them
    scales: tuple[QueryScale, ...] = ()  # of queries, to be folded into their rows
    sizes: tuple[SizeRule, ...] = ()  # that a forward asks for
    constants: tuple[SizeRule, ...] = ()  # widths that a forward computes with, to stay as in the dense model
    equalities: tuple[Equality, ...] = ()  # that must hold afterwards
    unmasked: tuple[Unmasked, ...] = ()  # rows that masking leaves as they are, since a forward divides by them
    computed: tuple[ComputedChannels, ...] = ()  # channels that no weight has
    squeezed: tuple[int, ...] = ()  # axes that a forward drops where one channel is left
