"""Draw what combing found: a line for each group, a mark at each module that it touches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmcpd.compat import require
from mmcpd.coupling import Coupling
from mmcpd.files import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How a member's role is drawn: marker, size, what the legend calls it. Norms and free tensors share a mark.
ROLES = {
    'out': ('o', 34, 'produces the units'),
    'in': ('D', 20, 'consumes them'),
    'affine': ('|', 40, 'goes along (norm, embedding)'),
}
ALIAS = {'stat': 'affine', 'free': 'affine'}

# What a curve is drawn against, and how the axis is called.
CURVE_AXES = {'macs': 'MACs', 'params': 'parameters', 'ratio': 'latency in ONNX Runtime'}


def plot(coupling: Coupling, path: str | os.PathLike, title: str = '') -> None:
    """Write a picture of the groups, modules from left to right in the order of the state dict.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: `path` has an ending that matplotlib does not know.

    Example:
        >>> plot(coupling, 'resnet50.png')
    """
    require('demo')
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(name.rpartition('.')[0] or name for name in coupling.tensors))
    place = {module: number for number, module in enumerate(modules)}
    size = (3 + 0.11 * len(modules), 1.5 + 0.2 * len(coupling.groups))
    figure = Figure(figsize=(min(size[0], 60), min(size[1], 60)), layout='constrained')
    axes = figure.add_subplot()
    for row, group in enumerate(coupling.groups):
        roles: dict[str, set[int]] = {role: set() for role in ROLES}
        for member in group.members:
            module = member.tensor.rpartition('.')[0] or member.tensor
            roles[ALIAS.get(member.role, member.role)].add(place[module])
        ends = set().union(*roles.values())
        color = f'C{row % 10}'  # matplotlib's cycle
        axes.hlines(row, min(ends), max(ends), color=color, linewidth=1, alpha=0.5)
        for role, (marker, area, _) in ROLES.items():
            axes.scatter(sorted(roles[role]), [row] * len(roles[role]), area, color=color, marker=marker)
    for marker, area, label in ROLES.values():
        axes.scatter([], [], area, color='0.3', marker=marker, label=label)
    axes.legend(loc='upper right', fontsize=8)
    axes.set_yticks(range(len(coupling.groups)), [f'{g.name} ({g.units})' for g in coupling.groups], fontsize=7)
    axes.set_xticks(range(len(modules)), modules, fontsize=5, rotation=90)
    axes.invert_yaxis()
    axes.set_title(title or f'{len(coupling.groups)} coupling groups, {coupling.units} units', fontsize=10)
    _save(figure, Path(path))


def plot_curve(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Write a picture of models of several sizes: their first metric against MACs, parameters and latency.

    Each row has `name`, `macs`, `params`, `ratio` (latency, as a share of the first row's) and `metrics` (name to
    number); the first row is the dense model. Without metrics the latency is drawn against MACs and parameters.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from tempfile import mkdtemp
        >>> rows = [{'name': 'dense', 'macs': 2, 'params': 2, 'ratio': 1.0, 'metrics': {'top1': 90.0}}]
        >>> plot_curve(rows, mkdtemp() + '/curve.png')
    """
    require('demo')
    from matplotlib.figure import Figure

    metric = next(iter(rows[0]['metrics']), None)
    heights = [100 * row['ratio'] if metric is None else row['metrics'][metric] for row in rows]
    figure = Figure(figsize=(12, 4), layout='constrained')
    panels = figure.subplots(1, 3, sharey=True)
    for axes, (key, label) in zip(panels, CURVE_AXES.items(), strict=True):
        shares = [100 * row[key] / rows[0][key] for row in rows]
        axes.plot(shares, heights, marker='o', color='C0')
        for row, share, height in zip(rows, shares, heights, strict=True):
            axes.annotate(row['name'], (share, height), xytext=(4, -10), textcoords='offset points', fontsize=7)
        axes.set_xlabel(f'{label}, % of the dense model')
        axes.grid(alpha=0.3)
    panels[0].set_ylabel('latency, % of the dense model' if metric is None else metric)
    _save(figure, Path(path))


def _save(figure: Figure, path: Path) -> None:
    with whole(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format=path.suffix[1:] or 'png')
