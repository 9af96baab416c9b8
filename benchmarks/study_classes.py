"""Show the score of each class, unpruned and pruned under each distiller, as Fig. 6 of the paper does.

    python benchmarks/study_classes.py --seeds 0 1 2
    python benchmarks/study_classes.py --report

The models are those of `study_distillers.py`; whichever study comes first trains them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import study_distillers
from benchmarks import study_report as report
from benchmarks.studies import TARGET, Row, Study, main
from mmcpd.datasets import DigitScenesDataset

CLASSES = DigitScenesDataset.METAINFO['classes']


def means(rows: list[Row]) -> dict[str, np.ndarray]:
    """Return the IoU of each class (11,), percent, averaged over seeds, by model."""
    found = study_distillers.named(rows)
    return {
        name: np.array([row['iou'] for row in seeds.values()], dtype=float).mean(0)
        for name, seeds in found.items()
        if seeds
    }


def table(rows: list[Row]) -> str:
    lines = [[name, *(f'{value:.1f}' for value in iou)] for name, iou in means(rows).items()]
    seeds = len(study_distillers.named(rows)['none'])
    caption = f'IoU of each class, %, pruned to {TARGET:.0%} of the MACs, mean of {seeds} seed(s)'
    return report.table(caption, ['', *CLASSES], lines)


def plot(rows: list[Row], path: Path) -> None:
    found = means(rows)
    fig, axes = report.figure(f'IoU of each class, pruned to {TARGET:.0%} of the MACs', (8.4, 3.6))
    width = 0.8 / len(found)
    for at, (name, iou) in enumerate(found.items()):
        axes.bar(np.arange(len(CLASSES)) + (at - (len(found) - 1) / 2) * width, iou, width, label=name)
    axes.set_xticks(range(len(CLASSES)), CLASSES)
    axes.set_ylabel('IoU, %')
    axes.legend(fontsize=8, frameon=False, ncols=5, loc='lower center', bbox_to_anchor=(0.5, -0.28))
    report.save_figure(fig, path)


STUDY = Study('classes', study_distillers.cases, table, plot)

if __name__ == '__main__':
    main(__doc__.splitlines()[0], [STUDY])
