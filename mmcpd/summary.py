"""A coupling as a table that one can read."""

from __future__ import annotations

from .coupling import Coupling, Group, Role


def table(coupling: Coupling) -> str:
    """Return the groups, what is frozen and why, and the operations without a rule."""
    cost = coupling.cost(coupling.keep())
    prunable, total = coupling.prunable()
    lines = [
        f'{len(coupling.groups)} groups, {coupling.units} units; {cost.macs / 1e6:,.1f} M MACs, '
        f'{cost.params / 1e6:,.2f} M parameters ({prunable / max(total, 1):.1%} prunable), '
        f'{cost.memory / 2**20:,.1f} MiB of activations',
        '',
    ]
    rows: list[tuple[str, ...]] = [('group', 'units', 'rows', 'producers', 'consumers', 'MACs saved by one unit')]
    saved = coupling.marginal(coupling.keep())
    for group in coupling.groups:
        rows.append(
            (
                group.name,
                str(group.units),
                str(sum(m.index.shape[1] for m in group.members)),
                _count(group, Role.PRODUCER),
                _count(group, Role.CONSUMER),
                f'{saved[group.name].macs / 1e3:,.1f} k',
            )
        )
    lines += [*_align(rows), '']
    reasons: dict[str, list[tuple[str, int]]] = {}
    for reason, count in coupling.reasons().items():  # the same reason in many modules is one line
        text, _, where = reason.rpartition(' in ')
        reasons.setdefault(text or where, []).append((where, count))
    why: list[tuple[str, ...]] = [('frozen because', 'rows')]
    for text, places in sorted(reasons.items(), key=lambda r: -sum(n for _, n in r[1])):
        where = f' in {places[0][0]}' if places[0][0] != text else ''
        more = f' and {len(places) - 1} more' if len(places) > 1 else ''
        why.append((text + where + more, str(sum(n for _, n in places))))
    lines += _align(why) if len(why) > 1 else []
    for (op, where), count in coupling.unsupported.items():
        lines.append(f'no rule for {op} in {where} (x{count}): what goes through it is frozen')
    return '\n'.join(lines)


def _count(group: Group, role: Role) -> str:
    return str(len({m.tensor for m in group.members if m.role == role and not m.tensor.endswith('bias')}))


def _align(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
    lines = [
        '  '.join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    return [lines[0], '-' * len(lines[0]), *lines[1:]]
