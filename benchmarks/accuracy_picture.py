"""Draw accuracy against the MACs that remain, with nothing trained, from the results of `benchmarks/accuracy.py`.

python benchmarks/accuracy_picture.py     # into docs/images/accuracy.svg
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout, installed or not

from benchmarks.accuracy_store import Row, Store  # noqa: E402

matplotlib.use('svg')
from matplotlib import pyplot  # noqa: E402

TABLES = {'resnet20': 'ResNet-20, CIFAR-10', 'resnet56': 'ResNet-56, CIFAR-10', 'vit': 'small ViT, CIFAR-10'}
# Colours that differ for colour-blind readers too (Okabe and Ito), and a marker for each.
LOOKS = {
    'mmcpd': ('#0072B2', 'o'),
    'Torch-Pruning Taylor': ('#D55E00', 's'),
    'Torch-Pruning group L2': ('#E69F00', '^'),
    'magnitude at once': ('#009E73', 'v'),
    'random at once': ('#767676', 'x'),
}


def points(rows: Sequence[Row], recipe: str) -> dict[float, tuple[float, float]]:
    """Return mean and deviation of the test accuracy over seeds, in percent, by the share of the MACs that remains."""
    found: Mapping[float, list[float]] = defaultdict(list)
    for row in rows:
        if row['recipe'] == recipe and not row['iterations'] and 'test' in row:
            found[row['share']].append(row['test'])
    return {share: (float(np.mean(each)), float(np.std(each))) for share, each in sorted(found.items())}


def draw(stores: Mapping[str, Store], file: Path) -> None:
    """Draw one plot for each table, side by side, into an SVG file that is the same for the same results."""
    style = {'svg.hashsalt': 'mmcpd', 'svg.fonttype': 'none', 'font.size': 10, 'axes.spines.top': False}
    with pyplot.rc_context({**style, 'axes.spines.right': False, 'font.family': 'sans-serif'}):
        figure, axes = pyplot.subplots(1, len(stores), figsize=(9, 3.4), sharey=True, layout='constrained')
        for axis, (name, store) in zip(np.atleast_1d(axes), stores.items(), strict=True):
            rows = store.read('rows')
            ((dense, _),) = points(rows, 'dense').values()
            axis.axhline(dense, color='#444444', linestyle=':', linewidth=1)
            axis.annotate('dense', (100, dense), (0, 3), textcoords='offset points', ha='right', fontsize=9)
            for recipe, (colour, marker) in LOOKS.items():
                if found := points(rows, recipe):
                    shares = [100 * share for share in found]
                    means, deviations = zip(*found.values(), strict=True)
                    axis.errorbar(shares, means, deviations, label=recipe, color=colour, marker=marker, capsize=2)
            axis.set(title=TABLES[name], xlabel='MACs that remain, %', xlim=(30, 102), ylim=(0, 100))
        np.atleast_1d(axes)[0].set_ylabel('test accuracy, %')
        lines, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
        figure.legend(lines, labels, loc='outside lower center', ncols=len(labels), frameon=False, fontsize=9)
        figure.savefig(file, format='svg', metadata={'Date': None}, facecolor='white')
        pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=ROOT / 'docs' / 'images' / 'accuracy.svg')
    args = parser.parse_args()
    results = ROOT / 'benchmarks' / 'results'
    draw({name: Store(results / f'accuracy_{name}.json') for name in TABLES}, args.out)


if __name__ == '__main__':
    main()
