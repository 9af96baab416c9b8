"""What a config says about combing and pruning: `comb = dict(...)`, `prune = dict(...)`, the hooks' arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcpd.engine.build import type_name
from mmcpd.names import near
from mmcpd.prune.pruner import check_options

COMB_OPTIONS = ('heads', 'ignore', 'strict', 'input_shape', 'save')
NOT_OPTIONS = ('type', 'priority')  # of a hook's dict in custom_hooks


def comb_options(cfg: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a config combs with: its `comb = dict(...)`, then what is given to the hook itself.

    Args:
        cfg: the config.
        given: the hook's own arguments; by default those of the CombHook in `custom_hooks`.

    Returns:
        Some of `heads`, `ignore`, `strict` (of `mmcpd.comb.comb`), `input_shape` and `save` (of `CombHook`).

    Raises:
        ValueError: an unknown option.

    Example:
        >>> comb_options(cfg).get('heads', 'dim')
        'dim'
    """
    options = _merged(cfg, 'comb', 'CombHook', given)
    for name in options:
        if name not in COMB_OPTIONS:
            raise ValueError(f"comb has no option '{name}': did you mean {near(name, COMB_OPTIONS)}?")
    return options


def prune_options(cfg: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return what a config prunes with: its `prune = dict(...)`, then what is given to the hook itself.

    Args:
        cfg: the config.
        given: the hook's own arguments; by default those of the PruneHook in `custom_hooks`.

    Raises:
        ValueError: an unknown option, a missing one, or a value that makes no sense.

    Example:
        >>> prune_options(cfg)['target']
        0.5
    """
    options = _merged(cfg, 'prune', 'PruneHook', given)
    try:
        check_options(options)
    except ValueError as error:
        raise ValueError(f'{error} (in prune = dict(...); configs/_base_/cpd.py has all options)') from error
    return options


def _merged(cfg: Mapping[str, Any], section: str, hook: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    if given is None:
        hooks = [h for h in cfg.get('custom_hooks') or () if type_name(h) == hook]
        given = {name: value for h in hooks for name, value in h.items()}
    merged = {**(cfg.get(section) or {}), **given}
    return {name: value for name, value in merged.items() if name not in NOT_OPTIONS}
