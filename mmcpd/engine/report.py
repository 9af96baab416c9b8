"""Compare the slim model with the dense one, in numbers and as a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmcpd.cost import COSTS
from mmcpd.coupling import Coupling, Keep, aligned

# Quantity -> name, unit and its sign.
ROWS = {'macs': ('MACs', 1e6, ' M'), 'params': ('parameters', 1e6, ' M'), 'memory': ('activations', 2**20, ' MiB')}
NO_OBJECT, COCO = -1, re.compile(r'(^|[/_])m?A[PR]([@_ ]|$)')  # a value, and the names of metrics that have it


def costs(coupling: Coupling, keep: Keep) -> dict[str, int]:
    """Return MACs, parameters, memory (bytes) and units under a keep, as plain numbers.

    Example:
        >>> costs(coupling, coupling.keep())['units']
        12
    """
    cost = coupling.cost(keep)
    return {**{quantity: cost[quantity] for quantity in COSTS}, 'units': sum(int(k.sum()) for k in keep.values())}


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers; names of classes, tables and missing values are no part of a comparison.

    COCO's metrics are -1 where the data have no object of that size: such a precision or recall is missing too.

    Example:
        >>> numbers({'mIoU': torch.tensor(71.5), 'worst_class': 'c3', 'mDice': None, 'coco/bbox_mAP_l': -1.0})
        {'mIoU': 71.5}
    """
    single = {name: value.item() if hasattr(value, 'item') and np.ndim(value) == 0 else value
              for name, value in metrics.items()}  # fmt: skip
    return {
        name: float(value)
        for name, value in single.items()
        if isinstance(value, int | float) and not (value == NO_OBJECT and COCO.search(name))
    }


def comparison(dense: Mapping[str, Any], small: Mapping[str, Any]) -> str:
    """Return a table of what `costs` returns, and of `metrics` (name to number) where validated, dense beside slim.

    Example:
        >>> print(comparison(costs(coupling, coupling.keep()), costs(coupling, keep)).splitlines()[0].split())
        ['dense', 'slim', 'slim', '/', 'dense']
    """
    rows: list[tuple[str, ...]] = [('', 'dense', 'slim', 'slim / dense')]
    for key, (name, unit, sign) in ROWS.items():
        values = [f'{model[key] / unit:,.2f}{sign}' for model in (dense, small)]
        rows.append((name, *values, f'{small[key] / dense[key]:.1%}'))
    rows.append(('units', str(dense['units']), str(small['units']), f'{small["units"] / dense["units"]:.1%}'))
    before = dense.get('metrics') or {}
    for name, value in (small.get('metrics') or {}).items():
        known = name in before
        change = f'{value - before[name]:+.2f}' if known else ''
        rows.append((name, f'{before[name]:.2f}' if known else '-', f'{value:.2f}', change))
    return '\n'.join(aligned(rows))
