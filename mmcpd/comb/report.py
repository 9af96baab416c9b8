"""A comb as a table that one can read."""

from __future__ import annotations

from .groups import Comb, Group

_MOST_REASONS = 25


def table(comb: Comb) -> str:
    """Return the groups, what is frozen and why, and the operations without a rule."""
    cost = comb.cost(comb.keep())
    prunable, total = comb.prunable()
    lines = [
        f'{len(comb.groups)} groups, {comb.units} units; {cost.macs / 1e6:,.1f} M MACs, '
        f'{cost.params / 1e6:,.2f} M parameters ({prunable / max(total, 1):.1%} prunable), '
        f'{cost.memory / 2**20:,.1f} MiB of activations',
        '',
    ]
    rows: list[tuple[str, ...]] = [('group', 'units', 'rows', 'producers', 'consumers', 'MACs saved by one unit')]
    saved = comb.marginal(comb.keep())
    for group in comb.groups:
        rows.append(
            (
                group.name,
                str(group.units),
                str(sum(m.index.shape[1] for m in group.members)),
                _count(group, 'out'),
                _count(group, 'in'),
                f'{saved[group.name].macs / 1e3:,.1f} k',
            )
        )
    lines += [*_align(rows), '']
    reasons = comb.reasons().most_common()
    if reasons:
        lines += _align([('frozen because', 'rows'), *((r, str(n)) for r, n in reasons[:_MOST_REASONS])])
    if len(reasons) > _MOST_REASONS:
        lines.append(f'... and {len(reasons) - _MOST_REASONS} more reasons (comb.frozen)')
    for (op, where), count in comb.unsupported.items():
        lines.append(f'no rule for {op} in {where} (x{count}): what goes through it is frozen')
    return '\n'.join(lines)


def _count(group: Group, role: str) -> str:
    return str(len({m.tensor for m in group.members if m.role == role and not m.tensor.endswith('bias')}))


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return [lines[0], '-' * len(lines[0]), *lines[1:]]
