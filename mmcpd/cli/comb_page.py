"""Write what combing found as one page of HTML that needs nothing else: no script, no request to anywhere."""

from __future__ import annotations

from html import escape

from mmcpd.coupling import Coupling
from mmcpd.engine.preview import Preview
from mmcpd.engine.report import ROWS
from mmcpd.engine.sensitivity import Sensitivity
from mmcpd.prune import LATENCY
from mmcpd.report.html import HEAD, STYLE, table

WIDE, HIGH, EDGE = 150, 44, 4  # of a chart, and its margin, in pixels


def comb_page(title: str, coupling: Coupling, ahead: Preview | None, found: Sensitivity | None, latency: str) -> str:
    """Return a page: the answer, the groups, widths by layer, sensitivity, and what is frozen and why.

    `latency` is the measured latency in words, '' where it was not measured.

    Example:
        >>> page = comb_page('toy', coupling, None, None, '')
        >>> '<h1>toy</h1>' in page, 'http' in page
        (True, False)
    """
    cost = coupling.cost(coupling.keep())
    facts = [(name, f'{cost[key] / unit:,.2f}{sign}') for key, (name, unit, sign) in ROWS.items()]
    if ahead is not None:
        facts = [
            (f'{name} remain ({ahead.slim[key] / unit:,.2f}{sign})', f'{ahead.slim[key] / ahead.dense[key]:.1%}')
            for key, (name, unit, sign) in ROWS.items()
        ]
        facts += [('latency remains (predicted)', f'{ahead.left[LATENCY]:.1%}')] if LATENCY in ahead.left else []
    parts = [f'<h1>{escape(title)}</h1>', f'<p>{escape(coupling.summary())}</p>', '<ul class="facts">']
    parts += [f'<li><b>{escape(value)}</b> {escape(name)}</li>' for name, value in facts]
    parts += ['</ul>', *([f'<p>{escape(latency)}</p>'] if latency else [])]
    if ahead is not None:
        by = f'Target {ahead.goal}; units chosen by {ahead.scored.importance} ({ahead.scored.why}).'
        parts += [f'<h2>Widths by layer</h2><p class="soft">{escape(by)}</p>', _widths(ahead)]
    parts += ['<h2>Groups</h2>', table([[escape(cell) for cell in row] for row in coupling.table()])]
    if found is not None:
        parts += [f'<h2>Sensitivity</h2><p class="soft">{escape(_measured(found))}</p>', _charts(found)]
    frozen = [[escape(why), str(rows)] for why, rows in coupling.merged_reasons()]
    parts += ['<h2>What is frozen</h2>', table([['because', 'rows'], *frozen]) if frozen else '<p>Nothing.</p>']
    return '\n'.join([HEAD.format(title=escape(title), style=STYLE), *parts, '</body>', '</html>', ''])


def _widths(ahead: Preview) -> str:
    rows = [['layer', 'dense', 'slim', 'kept']]
    for layer in ahead.layers:
        share = layer.kept / layer.dense
        bar = f'<meter value="{share:.3f}">{share:.0%}</meter> {share:.0%}'
        rows.append([escape(layer.layer), str(layer.dense), str(layer.kept), bar])
    return table(rows)


def _measured(found: Sensitivity) -> str:
    scale = max((value for group in found.groups for value in group.values), default=0.0)
    top = max(scale, found.dense)
    return (
        f'{found.measure}, where one group alone is pruned and the others are whole; dense {found.dense:.4g}. Charts: '
        f'from all units on the left to {min(found.ratios):.0%} of them on the right, from 0 to {top:.4g}.'
    )


def _charts(found: Sensitivity) -> str:
    """Return a table of the values, with a small line for each group."""
    top = max([found.dense, *(value for group in found.groups for value in group.values)]) or 1.0
    rows = [['group', *(f'{ratio:.0%} kept' for ratio in found.ratios), 'chart']]
    for group in found.groups:
        values, kept = (found.dense, *group.values), (1.0, *found.ratios)
        span = 1 - min(kept)
        points = ' '.join(
            f'{EDGE + (WIDE - 2 * EDGE) * (1 - ratio) / span:.1f},{HIGH - EDGE - (HIGH - 2 * EDGE) * value / top:.1f}'
            for ratio, value in zip(kept, values, strict=True)
        )
        words = escape(f'{group.group}: ' + ', '.join(f'{v:.4g}' for v in values), quote=True)
        chart = (
            f'<svg width="{WIDE}" height="{HIGH}" role="img" aria-label="{words}"><rect class="frame" fill="none" '
            f'x=".5" y=".5" width="{WIDE - 1}" height="{HIGH - 1}"/><polyline class="line" fill="none" '
            f'points="{points}"/></svg>'
        )
        rows.append([escape(group.group), *(f'{value:.4g}' for value in group.values), chart])
    return table(rows)
