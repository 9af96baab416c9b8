"""What was rotated, and what was left alone and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..compat import StrEnum


class HeadKind(StrEnum):
    """Which two sides of a head share a basis."""

    QUERY_KEY = 'query and key'
    VALUE_PROJECTION = 'value and projection'


@dataclass(frozen=True)
class Rotated:
    """The heads of one attention that were rotated.

    Attributes:
        attention: path of the module that multiplies, '' for the model itself.
        kind: which two sides.
        layers: names of the weights that were written.
        heads: how many.
        width: dimensions of each head.
    """

    attention: str
    kind: HeadKind
    layers: tuple[str, ...]
    heads: int
    width: int


@dataclass(frozen=True)
class SkippedHeads:
    """Heads of one attention that keep their basis, and why; one head where their number is not known."""

    attention: str
    kind: HeadKind
    heads: int
    reason: str


@dataclass(frozen=True)
class Rotations:
    """What `rotate_` did to a model; `str` says it in a few lines."""

    rotated: tuple[Rotated, ...]
    skipped: tuple[SkippedHeads, ...]

    @property
    def heads(self) -> int:
        """The number of heads of which at least one kind was rotated."""
        return _heads(self.rotated)

    @property
    def found(self) -> int:
        """The number of heads that were seen, rotated or not."""
        return _heads((*self.rotated, *self.skipped))

    def __str__(self) -> str:
        if not self.rotated and not self.skipped:
            return 'no attention found, nothing to rotate'
        places = len({r.attention for r in self.rotated})
        lines = [f'rotated {_count(self.heads, "head")} of {_count(places, "attention")}']
        for kind in HeadKind:
            alone = [s for s in self.skipped if s.kind is kind]
            for reason in dict.fromkeys(_without_place(s.reason) for s in alone):
                same = [s for s in alone if _without_place(s.reason) == reason]
                more = len({s.attention for s in same}) - 1
                also = f' and {more} more' if more else ''
                where = same[0].attention or 'the model itself'
                heads = _count(sum(s.heads for s in same), 'head')
                lines.append(f'left alone: {kind} of {heads}: {reason} ({where}{also})')
        return '\n'.join(lines)


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}{"" if number == 1 else "s"}'


def _heads(parts: Iterable[Rotated | SkippedHeads]) -> int:
    by_kind: dict[str, dict[HeadKind, int]] = {}
    for part in parts:
        counts = by_kind.setdefault(part.attention, {})
        counts[part.kind] = counts.get(part.kind, 0) + part.heads
    return sum(max(counts.values()) for counts in by_kind.values())


def _without_place(reason: str) -> str:
    return reason.partition(' in ')[0]
