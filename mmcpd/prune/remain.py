"""The share of its units that a group keeps at least, by patterns of group names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase

from ..coupling import Coupling
from ..names import near


def check_remain(remain: object) -> None:
    """Refuse shares that make no sense; that takes no model.

    Raises:
        ValueError: it is no mapping from patterns to shares above 0 and up to 1.

    Example:
        >>> check_remain({'backbone.layer4.*': 0.8})
    """
    if not isinstance(remain, Mapping) or not all(isinstance(name, str) and name for name in remain):
        raise ValueError(
            'remain names patterns of groups and the share of their units that remains at least: '
            f"remain={{'backbone.layer4.*': 0.8}}; got {remain!r}"
        )
    for pattern, share in remain.items():
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f'remain[{pattern!r}] is a share above 0 and up to 1 (keep all units): got {share!r}')


def least_units(coupling: Coupling, remain: Mapping[str, float]) -> dict[str, int]:
    """Return how many units each group keeps at least, 0 where no pattern fits; of several patterns the highest holds.

    Patterns are shell-style ones (`fnmatch`) of group names, shares are of the units that the model was combed with.

    Raises:
        ValueError: a pattern fits no group; the message lists the near names.

    Example:
        >>> least_units(coupling, {'conv*': 0.5, 'conv2': 0.75})
        {'conv1': 4, 'conv2': 3}
    """
    least = {group.name: 0 for group in coupling.groups}
    for pattern, share in remain.items():
        fitting = [group for group in coupling.groups if fnmatchcase(group.name, pattern)]
        if not fitting:
            raise ValueError(f"remain pattern '{pattern}' fits no group: near are {near(pattern, list(least))}")
        for group in fitting:
            # 0.28 * 25 is 7.000000000000001 in float64
            least[group.name] = max(least[group.name], math.ceil(share * group.units * (1 - 1e-12)))
    return least
