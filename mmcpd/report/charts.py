"""Draw curves as SVG that stands inside a page and takes its colours from the page's style sheet."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

from mmcpd.report.data import Curve

# What matplotlib draws in, and the variable of the style sheet that stands in its place.
INK, SOFT, LINE = '#010203', '#010204', '#010205'
COLOURS = ('#010206', '#010207', '#010208', '#010209')
VARIABLES = {INK: 'ink', SOFT: 'soft', LINE: 'line', **{c: f'c{i}' for i, c in enumerate(COLOURS)}}
DASHES = ('-', '--', ':', '-.')  # colours are not all that tells lines apart
SIZE = (4.6, 2.7)  # inches, of a chart that a phone shows whole
SETTINGS = {
    'svg.fonttype': 'none', 'font.family': 'sans-serif', 'font.size': 10, 'text.color': INK, 'axes.labelcolor': INK,
    'axes.edgecolor': SOFT, 'xtick.color': SOFT, 'ytick.color': SOFT, 'xtick.labelcolor': INK, 'ytick.labelcolor': INK,
    'grid.color': LINE, 'axes.spines.top': False, 'axes.spines.right': False, 'legend.frameon': False,
}  # fmt: skip


def chart(name: str, curves: Sequence[Curve], unit: str, events: Sequence[int] = ()) -> str:
    """Return a chart of curves over iterations as SVG; short lines on the axis mark the events.

    Example:
        >>> svg = chart('loss', [Curve('loss', '', [1, 2], [2.0, 1.0])], '')
        >>> svg.startswith('<svg'), 'http' in svg, 'iteration' in svg
        (True, False, True)
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context({**SETTINGS, 'svg.hashsalt': name}):
        figure = Figure(figsize=SIZE, layout='constrained')
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for number, curve in enumerate(curves):
            colour, dash = COLOURS[number % 4], DASHES[number % 4]
            marker = 'o' if len(curve.values) < 30 else ''
            axes.plot(
                curve.iterations,
                curve.values,
                marker=marker,
                markersize=3,
                label=curve.name,
                color=colour,
                linestyle=dash,
            )
        if events:
            axes.plot(events, [0.03] * len(events), '|', transform=axes.get_xaxis_transform(), color=INK, markersize=7)
        axes.set_xlabel('iteration')
        axes.set_ylabel(unit or name)
        axes.grid(True, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, prune='upper'))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if len(curves) > 1:
            figure.legend(loc='outside upper left', ncols=2, fontsize=9)
        file = io.StringIO()
        figure.savefig(
            file, format='svg', transparent=True, metadata=dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
        )
    return _inline(file.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """Return the SVG without what a file needs, with colours of the page and names that are its own."""
    svg = svg[svg.index('<svg') :]
    svg = re.sub(r'<metadata>.*?</metadata>|<!--.*?-->| xmlns(:\w+)?="[^"]*"', '', svg, flags=re.DOTALL)
    svg = svg.replace('xlink:href', 'href').replace("font: 10px 'sans-serif'", 'font: 10px sans-serif')
    mark = re.sub(r'\W', '-', name)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf'\g<1>{mark}-', svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f'var(--{variable})')
    return re.sub(r'<svg ', f'<svg class="chart" role="img" aria-label="{mark} over iterations" ', svg, count=1)
