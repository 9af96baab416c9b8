"""Read shares from the command line, NAME=SHARE, as `--target macs=0.5` and `--remain 'backbone.layer4.*=0.8'`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from mmcpd.cli.common import UserError
from mmcpd.prune import check_remain

KINDS = {'--target': ('QUANTITY=SHARE', 'macs=0.5'), '--remain': ('PATTERN=SHARE', 'backbone.layer4.*=0.8')}


def read_shares(words: Sequence[str], option: str) -> dict[str, float]:
    """Return the shares that an option of the command line names.

    Raises:
        UserError: a word is no NAME=SHARE, or a name comes twice.

    Example:
        >>> read_shares(['macs=0.5', 'params=0.6'], '--target')
        {'macs': 0.5, 'params': 0.6}
    """
    found: dict[str, float] = {}
    for word in words:
        name, _, share = word.rpartition('=')
        try:
            value = float(share)
        except ValueError:
            value, name = 0.0, ''
        if not name:
            kind, example = KINDS[option]
            raise UserError(f'{option}: {word!r} is not {kind}, as {example}')
        if name in found:
            raise UserError(f'{option}: {name} is there twice')
        found[name] = value
    return found


def add_remain(parser: argparse.ArgumentParser) -> None:
    """Add the option of floors by pattern."""
    parser.add_argument(
        '--remain',
        nargs='+',
        metavar='PATTERN=SHARE',
        help="floors: groups whose names fit keep at least this share of their units, as 'backbone.layer4.*=0.8'; "
        "default: the config's PruneHook's",
    )


def remain_of(words: Sequence[str] | None, hook: Mapping[str, Any]) -> dict[str, float]:
    """Return the floors by pattern that the command line names, else those of the config's PruneHook.

    Raises:
        UserError, ValueError: one of them is no share.
    """
    remain = hook.get('remain', {}) if words is None else read_shares(words, '--remain')
    check_remain(remain)
    return dict(remain)
