"""Show how the score falls as more goes, with and without distillation, as Fig. 5 of the paper does.

    python benchmarks/study_sparsity.py --seeds 0 1 2
    python benchmarks/study_sparsity.py --report

Each point is a model of its own, pruned from the same dense model to another share of its MACs (the paper's axis is
channel sparsity along one run).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import study_report as report
from benchmarks.studies import TARGET, Case, Row, Study, main

TARGETS = (0.7, 0.5, TARGET, 0.2)
KINDS = ('none', 'CWD')


def cases(seed: int) -> list[Case]:
    return [Case(seed, kind, target=target) for target in TARGETS for kind in KINDS]


def table(rows: list[Row]) -> str:
    dense = report.pick(rows, kind='dense')
    lines = [['100 %', '100 %', report.spread(report.scores(dense)), '', '']]
    for target in TARGETS:
        found = [report.pick(rows, kind=kind, teacher='self', target=target) for kind in KINDS]
        units = [row['left']['units'] for seeds in found for row in seeds.values()]
        means = [report.spread(report.scores(seeds)) for seeds in found]
        stay = f'{np.mean(units):.0%}' if units else '-'
        lines.append([f'{target:.0%}', stay, *means, report.paired(found[1], found[0])])
    header = ['MACs left', 'units left', 'mIoU, % without', 'mIoU, % with CWD', 'CWD against none, in pairs (95 %)']
    return report.table('From the same dense models to less and less', header, lines)


def plot(rows: list[Row], path: Path) -> None:
    fig, axes = report.figure('Score against what was removed')
    dense = report.scores(report.pick(rows, kind='dense'))
    axes.axhline(dense.mean(), color='grey', ls='--', lw=1, label='unpruned')
    for kind, colour in zip(KINDS, ('#b0413e', '#2b6cb0'), strict=True):
        found = {target: report.pick(rows, kind=kind, teacher='self', target=target) for target in TARGETS}
        found = {target: seeds for target, seeds in found.items() if seeds}
        removed = [100 * (1 - target) for target in found]
        axes.plot(removed, [report.scores(seeds).mean() for seeds in found.values()], color=colour, label=kind)
        for at, seeds in zip(removed, found.values(), strict=True):
            axes.plot([at] * len(seeds), report.scores(seeds), 'o', ms=3, color=colour, alpha=0.6)
    axes.set_xlabel('MACs removed, %')
    axes.set_ylabel('mIoU, %')
    axes.legend(fontsize=8, frameon=False)
    report.save_figure(fig, path)


STUDY = Study('sparsity', cases, table, plot)

if __name__ == '__main__':
    main(__doc__.splitlines()[0], [STUDY])
