"""Time layers alone at several widths in ONNX Runtime, and find the steps of its kernels."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import onnxruntime

from mmcpd.cost import StepTable, WidthGrid
from mmcpd.deploy.layer_graphs import layer_graph
from mmcpd.deploy.layers import Layer, LayerKind
from mmcpd.deploy.onnx import session_options

Widths = tuple[int, ...]
Timer = Callable[[Layer, Sequence[Widths], int], dict[Widths, float]]  # layer, widths, threads -> milliseconds
Progress = Callable[[int, int], None]  # layers done, layers in all

BLOCK = 16  # channels; no kernel works in larger blocks
STEPS = (1, 4, 8, BLOCK)  # what is tried
FINEST = 256  # of a width: a finer part of it saves less than a clock resolves
SHARES = (0.25, 0.5, 0.75)  # of the dense width, beside it and BLOCK
WARMUP, ROUNDS = 1, 10
REORDERS = ('ReorderInput', 'ReorderOutput')  # of a layer alone; within a file they are few


def time_layers(
    layers: Sequence[Layer],
    threads: int,
    *,
    time_limit: float | None = None,
    progress: Progress | None = None,
    timer: Timer | None = None,
) -> dict[str, StepTable]:
    """Time layers over their live widths, by their keys; those of one key are timed once, in the order given.

    No layer is begun after `time_limit` seconds: those that are left have no table.

    Example:
        >>> layer = Layer(LayerKind.PRODUCT, (64, 32, 8), live=(1,))
        >>> tables = time_layers([layer, layer], threads=1)
        >>> [(key == layer.key, table.grids[0].points[-1]) for key, table in tables.items()]
        [(True, 32)]
    """
    timer = timer or profiled
    distinct = {layer.key: layer for layer in layers}
    tables: dict[str, StepTable] = {}
    begun = time.monotonic()
    for key, layer in distinct.items():
        if tables and time_limit is not None and time.monotonic() - begun > time_limit:
            break
        tables[key] = _table(layer, threads, timer)
        if progress is not None:
            progress(len(tables), len(distinct))
    return tables


def _table(layer: Layer, threads: int, timer: Timer) -> StepTable:
    """Time a layer at all combinations of a few widths, and between two multiples of BLOCK where there is room."""
    points = [_points(width) for width in layer.widths]
    between = [
        (*layer.widths[:i], width, *layer.widths[i + 1 :])
        for i, dense in enumerate(layer.widths)
        for width in _between(dense)
    ]
    grid = list(product(*points))
    times = timer(layer, list(dict.fromkeys([*grid, *between])), threads)
    least = [_least_step(layer, place) for place in layer.live]
    steps = [_step(dense, least[i], _along(times, layer.widths, i)) for i, dense in enumerate(layer.widths)]
    grids = tuple(WidthGrid(each, step) for each, step in zip(points, steps, strict=True))
    return StepTable(grids, tuple(times[widths] for widths in grid))


def _points(dense: int) -> tuple[int, ...]:
    """Return the widths at which a layer is timed: every fourth of a narrow one, else multiples of BLOCK and 4."""
    if dense <= BLOCK:
        return tuple(sorted({*range(4, dense, 4), dense, 1}))
    shares = (round(share * dense / BLOCK) * BLOCK for share in SHARES)
    return tuple(sorted({4, 8, BLOCK, dense, *(width for width in shares if BLOCK < width < dense)}))


def _between(dense: int) -> list[int]:
    """Return two multiples of BLOCK near the dense width, and widths between them that show steps."""
    top = dense // BLOCK * BLOCK
    return [] if dense <= BLOCK else [top, *(top - less for less in (1, 4, 8, 12, BLOCK) if top > less)]


def _along(times: Mapping[Widths, float], dense: Widths, place: int) -> dict[int, float]:
    """Return the times at the widths in one place, all others dense."""
    return {
        widths[place]: value
        for widths, value in times.items()
        if widths[:place] + widths[place + 1 :] == dense[:place] + dense[place + 1 :]
    }


def _least_step(layer: Layer, place: int) -> int:
    """Return 4 for the channels of a convolution, whose layout in blocks breaks up at others."""
    return 1 if layer.kind is LayerKind.PRODUCT or place == 2 else 4


def _step(dense: int, least: int, times: Mapping[int, float]) -> int:
    """Return the finest step at which a narrower layer saves at least half of what its width would make one expect."""
    if dense <= BLOCK:
        return least
    top = dense // BLOCK * BLOCK
    low = top - BLOCK
    slope = (times[top] - times.get(low, 0.0)) / BLOCK
    for step in (step for step in STEPS if step >= max(least, dense / FINEST)):
        inner = [width for width in times if low < width < top and width % step == 0 and (step > 1 or width % 4)]
        if slope > 0 and all(times[width] <= times[top] - slope / 2 * (top - width) for width in inner):
            return step
    return BLOCK


def profiled(layer: Layer, widths: Sequence[Widths], threads: int) -> dict[Widths, float]:
    """Return the milliseconds that ONNX Runtime's own profile shows for a layer at some widths, run in turns."""
    with tempfile.TemporaryDirectory() as folder:
        runs: list[tuple[onnxruntime.InferenceSession, Mapping[str, np.ndarray]]] = []
        for each in widths:
            file, fed = layer_graph(layer.at(each))
            options = session_options(threads)
            options.enable_profiling = True
            options.profile_file_prefix = os.path.join(folder, str(len(runs)))
            runs.append((onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider']), fed))
        for number in range(WARMUP + ROUNDS):
            for session, fed in runs if number % 2 else reversed(runs):
                session.run(None, fed)
        return {each: _kernels(session) for each, (session, _) in zip(widths, runs, strict=True)}


def _kernels(session: onnxruntime.InferenceSession) -> float:
    """End a session's profile, and return the milliseconds of its nodes, reorders left out.

    Of each node the fastest run counts: what else the machine does only ever adds, and may add a lot to most of them.
    """
    events = json.loads(Path(session.end_profiling()).read_text(encoding='utf-8'))
    nodes: dict[str, list[float]] = {}
    for event in events:
        kernel = event.get('cat') == 'Node' and event['name'].endswith('_kernel_time')
        if kernel and event['args']['op_name'] not in REORDERS:
            nodes.setdefault(event['name'], []).append(event['dur'])
    return sum(min(durations[WARMUP:]) for durations in nodes.values()) / 1000
