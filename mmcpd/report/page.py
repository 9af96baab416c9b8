"""Write the report of a run as one page of HTML that needs nothing else: no script, no request to anywhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from mmcpd.report.charts import chart
from mmcpd.report.data import Predictions, RunReport, Setting
from mmcpd.report.html import HEAD, STYLE, table
from mmcpd.report.picture import breakable, model_picture
from mmcpd.report.words import answer, compared, facts, number, signed

MORE_STYLE = """
:root { --c0: #0a5cad; --c1: #a3470a; --c2: #1a7036; --c3: #8a3ba8 }
@media screen and (prefers-color-scheme: dark) {
  :root { --c0: #6cb2ff; --c1: #ffab70; --c2: #7ee2a0; --c3: #d8a6ff } }
p.answer { font-size: 1.15em } ul.facts li { flex: 1 1 9em } code, pre { font-family: ui-monospace, monospace }
div.wide table { width: 100% } div.wide { overflow: visible } td, th { white-space: normal; vertical-align: top }
th, td { overflow-wrap: normal } div.long td:first-child, div.long td:last-child { overflow-wrap: anywhere }
td i { display: inline-block; width: .8em; height: .8em; margin-right: .5em; border: 1px solid var(--line) }
td:last-child, th:last-child { padding-right: 0 }
div.long td:last-child, div.long th:last-child { text-align: left; padding-left: 1em } tr { break-inside: avoid }
ol.layers { list-style: none; padding: 0 } ol.layers li { display: grid; column-gap: .7em; break-inside: avoid;
  grid-template-columns: var(--lanes) minmax(0, 22em) minmax(0, 1fr) 6.5em; align-items: center; font-size: .85em }
ol.layers svg.lanes { width: var(--lanes); height: 100%; min-height: 1.6em } ol.layers span { text-align: right }
ol.layers li.part code { grid-column: 2 / -1; font-weight: 600; padding: .5em 0 .1em }
svg.bar { width: 100%; height: .8em } svg.bar .kept { fill: var(--mark) }
svg.bar .dense { fill: none; stroke: var(--soft); vector-effect: non-scaling-stroke }
div.charts { display: grid; gap: 1em; grid-template-columns: repeat(auto-fill, minmax(min(100%, 21em), 1fr)) }
div.views { display: grid; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: .5em } figure { margin: 0 0 1em;
  break-inside: avoid } svg.chart { width: 100%; height: auto } img { width: 100%; height: auto; display: block }
pre { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 6px; padding: .6em; font-size: .85em }
* { print-color-adjust: exact; -webkit-print-color-adjust: exact } h2 { break-after: avoid }
@media (max-width: 40em) { ol.layers li { grid-template-columns: var(--lanes) minmax(0, 1.4fr) minmax(0, 1fr) 5.6em }
  div.views { grid-template-columns: repeat(2, minmax(0, 1fr)) } td, th { font-size: .85em; padding-right: .6em } }
@media print { body { max-width: none; font-size: 11px } details:not([open]) { display: none } }
"""
LANES = (
    'Layers in order. An outline is the dense width, its filled part the share of channels that is kept; outlines grow '
    'with the square root of the width. A coloured lane is a group of channels that several layers share, as those of '
    'a residual stream: a square writes into it, a dash reads from it.'
)


def report_page(report: RunReport) -> str:
    """Return the page of a run: the answer first, then what it is made of.

    Example:
        >>> from mmcpd.report.data import Quantity
        >>> page = report_page(RunReport('my run', 'ResNet', '', '', [Quantity('MACs', 'M', 8.0, 2.0)]))
        >>> '25.0 %' in page, 'http' in page, '<script' in page
        (True, False, False)
    """
    parts = [f'<h1>{escape(report.title)}</h1>', f'<p class="answer">{escape(answer(report))}</p>']
    parts += ['<ul class="facts">', *(f'<li><b>{escape(f.value)}</b> {escape(f.name)}</li>' for f in facts(report))]
    parts += ['</ul>', f'<p class="soft">Data: {escape(report.data)}</p>' if report.data else '']
    parts += _section('Dense and slim', _cells(compared(report)))
    if report.layers:
        picture = model_picture(report.layers, report.streams)
        parts += _section('The model', f'<p class="soft">{LANES}</p>{picture}')
    if report.costs or report.curves:
        parts += _section('The training', _training(report))
    parts += _section('Predictions', _predictions(report.predictions)) if report.predictions else []
    if report.layers:
        parts += _section('Layer by layer', _layers(report))
    if report.frozen:
        rows = [['because', 'rows of tensors'], *([each.reason, f'{each.rows:,}'] for each in report.frozen)]
        parts += _section('What is frozen, and why', f'<div class="long">{_cells(rows)}</div>')
    parts += _repeat(report)
    if report.missing:
        sentences = ''.join(f'<li>{_marked(sentence)}</li>' for sentence in report.missing)
        parts += _section('What is not in this report', f'<ul>{sentences}</ul>')
    style = STYLE + MORE_STYLE
    return '\n'.join([HEAD.format(title=escape(report.title), style=style), *parts, '</body>', '</html>', ''])


def _marked(sentence: str) -> str:
    """Return a sentence as HTML, what stands between backticks as code."""
    return re.sub('`(.+?)`', r'<code>\1</code>', escape(sentence))


def _section(title: str, content: str) -> list[str]:
    return [f'<h2>{title}</h2>', content]


def _cells(rows: Sequence[Sequence[str]]) -> str:
    return table([[escape(cell) for cell in row] for row in rows])


def _training(report: RunReport) -> str:
    costs = chart('what remains', report.costs, '% of the dense model', report.events) if report.costs else ''
    charts = [('What remains', costs)] if costs else []
    charts += [(each.name, chart(each.name, [each], each.unit, report.events)) for each in report.curves]
    figures = ''.join(f'<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>' for name, svg in charts)
    note = f'Marks at the lower edge: {len(report.events)} iterations at which units go.' if report.events else ''
    return f'<p class="soft">{note}</p><div class="charts">{figures}</div>'


def _predictions(found: Predictions) -> str:
    parts = [f'<p class="soft">{escape(found.data)}</p>']
    for picture in found.pictures:
        views = ''.join(
            f'<div><img src="{view.source}" width="{view.width}" height="{view.height}" alt="{escape(view.label)}">'
            f'{escape(view.label)}</div>'
            for view in picture.views
        )
        parts.append(
            f'<figure><figcaption>{escape(picture.caption)}</figcaption><div class="views">{views}</div></figure>'
        )
    if found.classes:
        rows = [['class', found.counted, f'dense {found.measure}', f'slim {found.measure}', 'change']]
        for each in found.classes:
            both = each.dense is not None and each.slim is not None
            moved = signed((each.slim or 0.0) - (each.dense or 0.0)) if both else '–'
            swatch = f'<i style="background: {each.colour}"></i>' if each.colour else ''
            numbers = f'{each.count:,}', number(each.dense), number(each.slim), moved
            rows.append([swatch + escape(each.name), *numbers])
        parts.append(table(rows))
    return '\n'.join(parts)


def _layers(report: RunReport) -> str:
    rows = [['layer', 'channels', 'kept', 'parameters', 'coupled to, or why it keeps channels']]
    for layer in report.layers:
        params = f'{layer.dense_params:,} → {layer.slim_params:,}' if layer.dense_params else 'as above'
        why = '; '.join(filter(None, (layer.group if layer.group != layer.path else '', layer.frozen)))
        kept = f'{layer.kept / layer.dense:.0%}'
        rows.append([breakable(layer.path), f'{layer.dense} → {layer.kept}', kept, params, breakable(why)])
    return f'<div class="long">{table(rows)}</div>'


def _repeat(report: RunReport) -> list[str]:
    parts = []
    if report.command:
        parts += _section('To repeat it', f'<pre>{escape(report.command)}</pre>')
    if report.load:
        parts += _section('To load the slim model', f'<pre>{escape(report.load)}</pre>')
    for title, settings in (('Settings', report.settings), ('Versions', report.versions)):
        if settings:
            parts += _section(title, f'<div class="words long">{_cells(_named(settings))}</div>')
    if report.config:
        parts.append(f'<details><summary>The whole config</summary><pre>{escape(report.config)}</pre></details>')
    return parts


def _named(settings: Sequence[Setting]) -> list[list[str]]:
    return [['name', 'value'], *([each.name, each.value] for each in settings)]
