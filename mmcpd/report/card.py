"""Write the card of a slim model, which lies beside its file: what it is, its figures, and how it is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from mmcpd.report.data import RunReport
from mmcpd.report.words import answer, compared

UNKNOWN = 'unknown: this run does not know under which licence the dense weights and the data are; ask their authors'


def card(report: RunReport) -> str:
    """Return the card of a slim model as Markdown.

    Example:
        >>> print(card(RunReport('my run', 'ResNet', 'Digits', '', [])).splitlines()[0])
        # my run
    """
    versions = ', '.join(f'{each.name} {each.value}' for each in report.versions)
    parts = [f'# {report.title}', answer(report), '## Model', f'{report.model}, {report.stage}.']
    parts += ['## Data', report.data or 'unknown', '## Figures', _table(compared(report))]
    parts += ['## How to load it', _code(report.load, 'python')] if report.load else []
    parts += ['## How it was made', _code(report.command, 'bash')] if report.command else []
    parts += [f'With {versions}.'] if versions else []
    parts += ['## Licence', report.license or UNKNOWN]
    parts += ['## What is not known', '\n'.join(f'- {each}' for each in report.missing)] if report.missing else []
    return '\n\n'.join(parts) + '\n'


def _table(rows: Sequence[Sequence[str]]) -> str:
    head, *rest = ([cell.replace('|', '\\|') for cell in row] for row in rows)
    lines = [head, ['---', *['---:'] * (len(head) - 1)], *rest]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def _code(text: str, language: str) -> str:
    return f'```{language}\n{text}\n```'
