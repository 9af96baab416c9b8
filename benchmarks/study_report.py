"""Tables and plots of the distillation studies, from their results; every one says that the scenes are synthetic."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Row = dict[str, Any]
SYNTHETIC = 'SYNTHETIC scenes of digits, 32x32'
CONFIDENCE = 0.95


def pick(rows: Sequence[Row], **wanted: Any) -> dict[int, Row]:
    """Return the results of a case by seed: `pick(rows, kind='CWD', target=0.35)`."""
    found = [row for row in rows if all(row['case'][name] == value for name, value in wanted.items())]
    return {row['case']['seed']: row for row in sorted(found, key=lambda row: row['case']['seed'])}


def scores(rows: dict[int, Row]) -> np.ndarray:
    """Return the mIoU of each seed, percent."""
    return np.array([row['miou'] for row in rows.values()])


def spread(values: Sequence[float] | np.ndarray) -> str:
    """Return mean and standard deviation over seeds: '71.20 ± 0.41'."""
    if len(values) == 0:
        return '-'
    return f'{np.mean(values):.2f}' + (f' ± {np.std(values, ddof=1):.2f}' if len(values) > 1 else ' (one seed)')


def interval(gaps: Sequence[float] | np.ndarray) -> float:
    """Return half of the 95 % confidence interval of the mean of paired differences (Student's t); inf for one."""
    n = len(gaps)
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(gaps, ddof=1) / n**0.5) if n > 1 else float('inf')


def paired(rows: dict[int, Row], reference: dict[int, Row]) -> str:
    """Compare two cases on the seeds that both have: the mean difference, its interval, and what that allows to say."""
    gaps = np.array([row['miou'] - reference[seed]['miou'] for seed, row in rows.items() if seed in reference])
    if len(gaps) == 0:
        return '-'
    half = interval(gaps)
    if len(gaps) == 1:
        return f'{gaps[0]:+.2f} (one seed)'
    verdict = ('better' if gaps.mean() > 0 else 'worse') if abs(gaps.mean()) > half else 'within noise'
    ahead = int((gaps > 0).sum())
    return f'{gaps.mean():+.2f} ± {half:.2f}, ahead in {ahead} of {len(gaps)}: {verdict}'


def table(caption: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table under a caption that says on what it was measured."""
    rows = [' | '.join(line) for line in (header, ['---'] * len(header), *lines)]
    return f'*{caption}, on {SYNTHETIC}.*\n\n' + '\n'.join(f'| {row} |' for row in rows)


def write_table(document: Path, name: str, text: str) -> None:
    """Put a table into a document, between `<!-- begin name -->` and `<!-- end name -->`.

    Raises:
        ValueError: The document is missing, or has no such place.
    """
    begin, end = f'<!-- begin {name} -->', f'<!-- end {name} -->'
    before = document.read_text(encoding='utf-8') if document.is_file() else ''
    pattern = re.compile(f'{re.escape(begin)}.*?{re.escape(end)}', re.DOTALL)
    if not pattern.search(before):
        raise ValueError(f'{document} has no place for the table: write {begin} and {end} where it belongs')
    document.write_text(pattern.sub(lambda _: f'{begin}\n{text}\n{end}', before), encoding='utf-8')


def figure(title: str, size: tuple[float, float] = (6.4, 3.6)) -> tuple[Any, Any]:
    """Return an empty figure and its axes, with a title that says on what was measured."""
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot

    fig, axes = pyplot.subplots(figsize=size, layout='constrained')
    axes.set_title(f'{title}\n{SYNTHETIC}', fontsize=10)
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(axis='y', alpha=0.3)
    return fig, axes


def save_figure(fig: Any, path: Path) -> None:
    """Write a figure, without the version and date that would change the file each time."""
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={'Software': None})
    pyplot.close(fig)


def seeds_plot(title: str, named: dict[str, dict[int, Row]], path: Path) -> None:
    """Plot the mIoU of each seed over the names, points of one seed joined, and the means as bars behind."""
    fig, axes = figure(title)
    kept = {name: rows for name, rows in named.items() if rows}
    axes.bar(range(len(kept)), [scores(rows).mean() for rows in kept.values()], width=0.55, color='#d5dbe6')
    for seed in sorted({seed for rows in kept.values() for seed in rows}):
        points = [(at, rows[seed]['miou']) for at, rows in enumerate(kept.values()) if seed in rows]
        axes.plot(*zip(*points, strict=True), 'o-', lw=0.8, ms=4, label=f'seed {seed}')
    axes.set_xticks(range(len(kept)), kept)
    every = np.concatenate([scores(rows) for rows in kept.values()])
    axes.set_ylim(max(0, every.min() - 3), every.max() + 2)
    axes.set_ylabel('mIoU, % (axis cut)')
    axes.legend(fontsize=8, frameon=False, ncols=3)
    save_figure(fig, path)
