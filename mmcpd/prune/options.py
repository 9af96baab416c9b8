"""Check options against the annotations of what takes them, before anything compares or counts with them."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

WORDS = {int: 'an integer', float: 'a finite number', bool: 'True or False', str: 'a name', type(None): 'None'}


def checked_options(taker: Callable[..., Any], options: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the options of a function or class, each of the type that it is annotated with; one name as a list of one.

    What is annotated otherwise than with numbers, names, True and False, and lists of them, is not looked at.

    Raises:
        ValueError: with the first option that does not fit.

    Example:
        >>> from mmcpd.prune import Curvature, Magnitude
        >>> checked_options(Magnitude, {'roles': 'out'}, 'magnitude')
        {'roles': ['out']}
        >>> checked_options(Curvature, {'probes': '2'}, 'curvature')
        Traceback (most recent call last):
        ValueError: curvature: probes is an integer: got '2'
    """
    hints = get_type_hints(vars(taker).get('__init__', taker.__init__) if isinstance(taker, type) else taker)  # type: ignore[misc]
    found = {}
    for name, value in options.items():
        kinds = _kinds(hints.get(name, Any))
        value = [value] if isinstance(value, str) and list in kinds and str not in kinds else value
        if kinds and not any(_fits(value, kind) for kind in kinds):
            words = ' or '.join('a list of names' if kind is list else WORDS[kind] for kind in kinds)
            raise ValueError(f'{owner}: {name} is {words}: got {value!r}')
        found[name] = value
    return found


def _kinds(hint: Any) -> list[type]:
    """Return the plain types of an annotation, `list` for a sequence of names; none where it says anything else."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_kinds(part) for part in get_args(hint)]
        return [kind for part in parts for kind in part] if all(parts) else []
    if get_origin(hint) in (list, Sequence) and get_args(hint) == (str,):
        return [list]
    return [hint] if hint in WORDS else []


def _fits(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is not int or not isinstance(value, bool))
