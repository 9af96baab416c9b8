"""Compare the unpruned self with a larger model as the teacher, as Table III of the paper does.

    python benchmarks/study_teachers.py --seeds 0 1 2
    python benchmarks/study_teachers.py --report

Both teach by CWD. The larger teacher is one and a half times as wide, trained for each seed as long as the dense model.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import study_report as report
from benchmarks.studies import TARGET, Case, Row, Study, main


def cases(seed: int) -> list[Case]:
    return [Case(seed, 'none'), Case(seed, 'CWD'), Case(seed, 'CWD', teacher='large')]


def named(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Return the results by teacher."""
    return {
        'no teacher': report.pick(rows, kind='none', target=TARGET),
        'self': report.pick(rows, kind='CWD', teacher='self', target=TARGET),
        'larger': report.pick(rows, kind='CWD', teacher='large', target=TARGET),
    }


def table(rows: list[Row]) -> str:
    found = named(rows)
    teachers = {'no teacher': {}, 'self': report.pick(rows, kind='dense'), 'larger': report.pick(rows, kind='large')}
    lines = []
    for name, seeds in found.items():
        own = report.spread(report.scores(teachers[name]))
        size = ', '.join({f'{row["params"] / 1e6:.2f} M' for row in teachers[name].values()}) or '-'
        gap = '' if name == 'self' else report.paired(seeds, found['self'])
        lines.append([name, size, own, str(len(seeds)), report.spread(report.scores(seeds)), gap])
    header = [
        'teacher',
        'its parameters',
        'its mIoU, %',
        'seeds',
        "the student's mIoU, %",
        'against self, in pairs (95 %)',
    ]
    return report.table(f'Pruned to {TARGET:.0%} of the MACs under CWD, by teacher', header, lines)


def plot(rows: list[Row], path: Path) -> None:
    report.seeds_plot(f'Pruned to {TARGET:.0%} of the MACs under CWD, by teacher', named(rows), path)


STUDY = Study('teachers', cases, table, plot)

if __name__ == '__main__':
    main(__doc__.splitlines()[0], [STUDY])
