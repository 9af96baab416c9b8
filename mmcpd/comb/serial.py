"""A comb as plain JSON types and back."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import numpy as np
import torch

from .groups import Comb, Frozen, Group, Member, SizeRule
from .source import Site

FORMAT = 1


def _member(member: Member) -> list[Any]:
    return [member.tensor, member.dim, member.index.tolist(), member.role]


def _read_member(row: list[Any]) -> Member:
    return Member(row[0], row[1], torch.tensor(row[2], dtype=torch.int64), row[3])


def _size(rule: SizeRule) -> list[Any]:
    return [rule.expression, rule.target, rule.constant, rule.site and list(astuple(rule.site))]


def _read_size(row: list[Any]) -> SizeRule:
    return SizeRule(row[0], row[1], row[2], Site(*row[3]) if row[3] else None)


def dump(comb: Comb) -> dict[str, Any]:
    """Return everything but the example inputs."""
    return {
        'format': FORMAT,
        'groups': [
            {
                'name': g.name,
                'units': g.units,
                'members': list(map(_member, g.members)),
                'cut': list(map(_member, g.cut)),
            }
            for g in comb.groups
        ],
        'frozen': [[f.tensor, f.dim, f.rows, f.reason] for f in comb.frozen],
        'unsupported': [[op, where, n] for (op, where), n in comb.unsupported.items()],
        'axes': [a.tolist() for a in comb.axes],
        'macs': comb.macs,
        'memory': comb.memory,
        'params': comb.params,
        'norms': comb.norms,
        'scales': comb.scales,
        'sizes': list(map(_size, comb.sizes)),
        'numbers': list(map(_size, comb.numbers)),
        'equal': comb.equal,
        'shapes': comb.shapes,
        'parameters': comb.parameters,
    }


def load(data: dict[str, Any]) -> Comb:
    """Read what `dump` returned.

    Raises:
        ValueError: if another version wrote it.
    """
    if data.get('format') != FORMAT:
        raise ValueError(f'a comb of format {data.get("format")!r}; this version reads {FORMAT}: comb the model again')
    return Comb(
        groups=[
            Group(
                g['name'],
                tuple(map(_read_member, g['members'])),
                g['units'],
                tuple(map(_read_member, g['cut'])),
            )
            for g in data['groups']
        ],
        frozen=[Frozen(*row) for row in data['frozen']],
        unsupported={(op, where): n for op, where, n in data['unsupported']},
        axes=[np.array(a, np.int64) for a in data['axes']],
        macs=_terms(data['macs']),
        memory=_terms(data['memory']),
        params=_terms(data['params']),
        norms=[(path, axis, dim) for path, axis, dim in data['norms']],
        scales=[([(t, d, i) for t, d, i in rows], axis, path) for rows, axis, path in data['scales']],
        sizes=list(map(_read_size, data['sizes'])),
        numbers=list(map(_read_size, data['numbers'])),
        equal=[(left, right) for left, right in data['equal']],
        shapes={name: tuple(shape) for name, shape in data['shapes'].items()},
        parameters=tuple(data['parameters']),
    )


def _terms(rows: list[Any]) -> list[tuple[int, tuple[int, ...]]]:
    return [(constant, tuple(axes)) for constant, axes in rows]
