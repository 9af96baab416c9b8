"""The end of a pruning run: the slim model, checked, saved, and its costs beside the dense one's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from mmcpd.cost import COSTS
from mmcpd.coupling import Coupling, Keep
from mmcpd.engine.slimmed import save_slim
from mmcpd.errors import SlimError
from mmcpd.slim import slim, structure
from mmcpd.slim.compare import compare

TOLERANCE = 1e-3  # of the largest output, in float32
# Metric -> name, unit and its sign in the table.
ROWS = {
    'macs': ('MACs', 1e6, ' M'),
    'params': ('parameters', 1e6, ' M'),
    'memory': ('activations', 2**20, ' MiB'),
}


def finish(model: nn.Module, comb: Coupling, keep: Keep, path: Path, meta: Mapping[str, Any]) -> nn.Module:
    """Cut a masked model, compare the two, and save the slim one.

    Args:
        model: the bare model, masked by `keep`.
        comb: what belongs together.
        keep: the units that stay.
        path: where the slim checkpoint goes.
        meta: what its reader should know, plain values.

    Raises:
        SlimError: the two models do not compute the same; then nothing is written.

    Example:
        >>> finish(model, c, keep, Path('slim.pth'), {'dense': {}, 'slim': {}})
    """
    small = slim(model, comb, keep)
    off = compare(model, comb, keep, small)
    if off > TOLERANCE:
        raise SlimError(
            f'the slim model is off the masked one by {off:.1e} of the largest output, so {path} is not written: '
            'a forward does something that combing does not see. tools/comb.py lists the groups; cut the last '
            'checkpoint again by tools/slim.py with some of them ignored (--cfg-options comb.ignore=...) to find '
            'the one at fault'
        )
    save_slim(path, small, structure(model, small), meta)
    return small


def costs(comb: Coupling, keep: Keep) -> dict[str, int]:
    """Return MACs, parameters, memory (bytes) and units under a keep, as plain numbers."""
    cost = comb.cost(keep)
    return {**{metric: int(cost[metric]) for metric in COSTS}, 'units': sum(int(k.sum()) for k in keep.values())}


def comparison(dense: Mapping[str, Any], small: Mapping[str, Any]) -> str:
    """Return a table of costs and metrics, dense beside slim.

    Args:
        dense: what `costs` returns, and `metrics` (name to number) where the model was validated.
        small: the same of the slim model.

    Example:
        >>> meta = read_slim('slim.pth')['meta']
        >>> print(comparison(meta['dense'], meta['slim']))
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
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [[row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))] for row in rows]
    return '\n'.join('  '.join(line).rstrip() for line in lines)
