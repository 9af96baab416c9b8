"""Pieces of a page of HTML that needs nothing else: its head, its style sheet and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

HEAD = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body>"""
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --line: #d0d7de; --mark: #0a5cad }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #a3adb8; --paper: #14181d; --line: #3a424c; --mark: #6cb2ff } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70em;
  margin: 0 auto; padding: 1em; overflow-wrap: anywhere }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } p.soft, caption { color: var(--soft) }
ul.facts { display: flex; flex-wrap: wrap; gap: .6em; padding: 0; list-style: none }
ul.facts li { border: 1px solid var(--line); border-radius: 6px; padding: .4em .8em }
ul.facts b { display: block; font-size: 1.3em }
div.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left } th, td { padding: .2em .8em .2em 0; border-bottom: 1px solid var(--line);
  text-align: right; white-space: nowrap } th:first-child, td:first-child { text-align: left }
svg { display: block } svg .frame { stroke: var(--line) } svg .line { stroke: var(--mark); stroke-width: 2 }
meter { width: 6em } @media print { div.wide { overflow: visible } td, th { white-space: normal } }
"""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of HTML cells, the first of them the header, in a box that scrolls sideways.

    Example:
        >>> '<td>4</td>' in table([['layer', 'width'], ['conv1', '4']])
        True
    """
    head, *rest = ([f'<th scope="col">{c}</th>' for c in rows[0]], *([f'<td>{c}</td>' for c in r] for r in rows[1:]))
    lines: Iterable[str] = (f'<tr>{"".join(cells)}</tr>' for cells in rest)
    return (
        f'<div class="wide"><table><thead><tr>{"".join(head)}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )
