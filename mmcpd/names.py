"""Names that a user types: find them, or say which ones are near."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

_T = TypeVar('_T')


def near(name: str, known: Iterable[str], n: int = 3) -> str:
    """List the known names that are most like `name` or end as it does; some of them where none is.

    Example:
        >>> near('head.fcc', ['head.fc', 'backbone'])
        'head.fc'
    """
    known = [k for k in known if k]
    close = difflib.get_close_matches(name, known, n=n, cutoff=0.4)
    last = name.rpartition('.')[2]
    close += [k for k in known if last and k.rpartition('.')[2] == last and k not in close]
    return ', '.join(close[: n + 2] or sorted(known)[: 2 * n]) or 'none at all'


def look_up(table: dict[str, _T], name: object, kind: str) -> _T:
    """Return `table[name]`.

    Raises:
        ValueError: unknown name; the message lists the near ones.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    raise ValueError(f"unknown {kind} '{name}': did you mean {near(str(name), table)}?")


def check_options(options: Iterable[str], known: Sequence[str], owner: str) -> None:
    """Raise a ValueError, with the near names, for an option that `owner` does not have."""
    for name in options:
        if name not in known:
            raise ValueError(f"{owner} has no option '{name}': did you mean {near(name, known)}?")


def match(patterns: Sequence[str], names: Iterable[str], kind: str = 'group') -> set[str]:
    """Return the names that fit any of the shell-style patterns.

    Raises:
        ValueError: a pattern fits nothing; the message lists the near names.
    """
    names = list(names)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if fnmatchcase(name, pattern)}
        if not hits:
            raise ValueError(f"ignore pattern '{pattern}' fits no {kind}: near are {near(pattern, names)}")
        found |= hits
    return found


def in_short(names: Iterable[str], most: int = 3) -> str:
    """Return some names in words, and how many more there are.

    Example:
        >>> in_short(['a', 'b', 'c', 'd', 'e'])
        'a, b, c and 2 more'
    """
    names = list(names)
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
