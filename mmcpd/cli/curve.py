"""Models of several sizes side by side: metrics, costs and latency, as a table, a file and a plot."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmcpd.cli.stages import Stages
from mmcpd.coupling import aligned
from mmcpd.engine.plot import plot_curve
from mmcpd.engine.report import ROWS
from mmcpd.files import write_json

CURVE = 'curve'  # .json and .png
ROUNDS = 200  # of timing the models in turns


def write_curve(
    out: Path,
    models: Mapping[str, nn.Module],
    facts: Sequence[Mapping[str, Any]],
    example: Tensor,
    threads: int | None,
    stages: Stages,
) -> None:
    """Time models in ONNX Runtime, the dense one first, print the table, and write it and a plot.

    `facts` are the costs and metrics of each; `example` is an input, (1, C, H, W); `threads` are those of ONNX
    Runtime, None: as many as this process may use cores.
    """
    from mmcpd.deploy import deploy  # needs ONNX, which nothing else here does

    with stages('time', 'rounds') as progress, tempfile.TemporaryDirectory() as folder:
        timed = deploy(models, [example], folder, dynamic_batch=False, runs=ROUNDS, threads=threads, progress=progress)
    rows = [
        {'name': entry.name, 'ms': entry.median, 'ratio': entry.ratio, **found}
        for entry, found in zip(timed.latency, facts, strict=True)
    ]
    print(f'\n{curve_table(rows)}')
    write_json(out / f'{CURVE}.json', {'facts': timed.facts, 'rows': rows})
    plot_curve(rows, out / f'{CURVE}.png')
    print(f'wrote {out / CURVE}.json and {out / CURVE}.png')


def curve_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the models of a curve as a table, one line each, shares of the first.

    Example:
        >>> costs = {'macs': 8, 'params': 4, 'memory': 2}
        >>> row = {'name': 'dense', **costs, 'ms': 1.5, 'ratio': 1.0, 'metrics': {'top1': 90}}
        >>> curve_table([row]).splitlines()[-1].split()
        ['dense', '100.0%', '100.0%', '100.0%', '1.50', '1.00', '90.00']
    """
    metrics = list(rows[0]['metrics'])
    lines: list[tuple[str, ...]] = [('model', 'MACs', 'parameters', 'activations', 'ms', 'of dense', *metrics)]
    for row in rows:
        shares = [f'{row[quantity] / rows[0][quantity]:.1%}' for quantity in ROWS]
        found = [f'{row["metrics"][name]:.2f}' if name in row['metrics'] else '-' for name in metrics]
        lines.append((row['name'], *shares, f'{row["ms"]:.2f}', f'{row["ratio"]:.2f}', *found))
    return '\n'.join(aligned(lines))
