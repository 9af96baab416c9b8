"""Compare no distillation, KD, CWD and CIRKD at equal sparsity, as Table IV of the paper does.

    python benchmarks/study_distillers.py --seeds 0 1 2
    python benchmarks/study_distillers.py --report      # table and plot again, from the results

The teacher is the unpruned model; the losses, weights and temperatures are those of `configs/cpd/seaformer_prune_*.py`,
not tuned for these data. Runs go to `--out`, one folder each, and an interrupted study goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import study_report as report
from benchmarks.studies import DISTILLERS, TARGET, Case, Row, Study, main


def cases(seed: int) -> list[Case]:
    return [Case(seed, kind) for kind in DISTILLERS]


def named(rows: list[Row]) -> dict[str, dict[int, Row]]:
    """Return the results by distiller, the unpruned model first."""
    pruned = {kind: report.pick(rows, kind=kind, teacher='self', target=TARGET) for kind in DISTILLERS}
    return {'unpruned': report.pick(rows, kind='dense'), **pruned}


def table(rows: list[Row]) -> str:
    found = named(rows)
    lines = []
    for name, seeds in found.items():
        left = [row['left']['macs'] for row in seeds.values() if 'left' in row]
        macs = f'{sum(left) / len(left):.1%}' if left else '100 %'
        gap = '' if name in ('unpruned', 'none') else report.paired(seeds, found['none'])
        lines.append([name, macs, str(len(seeds)), report.spread(report.scores(seeds)), gap])
    header = ['distillation', 'MACs left', 'seeds', 'mIoU, % (mean ± sd)', 'against none, in pairs (95 %)']
    return report.table(f'Pruned to {TARGET:.0%} of the MACs, by distiller', header, lines)


def plot(rows: list[Row], path: Path) -> None:
    report.seeds_plot(f'Pruned to {TARGET:.0%} of the MACs, by distiller', named(rows), path)


STUDY = Study('distillers', cases, table, plot)

if __name__ == '__main__':
    main(__doc__.splitlines()[0], [STUDY])
