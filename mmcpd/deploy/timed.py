"""Give a combed model the latency of its exported file as one more quantity, and compare what was promised with it."""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmcpd.cost import LatencyModel, TimedLayer
from mmcpd.coupling import Coupling
from mmcpd.deploy.latency import measure_latency, usable_cores
from mmcpd.deploy.layer_times import Timer, time_layers
from mmcpd.deploy.layers import SeenLayer, layers_of
from mmcpd.deploy.onnx import Forward, Inputs, export_onnx, feed, open_session
from mmcpd.deploy.times import Machine, Times, cache_folder, remember, remembered

TIME_LIMIT, RUNS = 300.0, 30  # seconds of timing layers; runs of the dense file
PAIRS, PAIRS_LIMIT = 200, 60.0  # of the finished model with the dense one; and seconds
CLOSE = 0.02  # of the dense latency: what two measurements of one file differ by
Progress = Callable[[int, int], None]  # layers done, layers in all


def with_latency(
    model: nn.Module,
    coupling: Coupling,
    *,
    inputs: Inputs | None = None,
    forward: Forward | None = None,
    threads: int | None = None,
    time_limit: float | None = TIME_LIMIT,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Coupling:
    """Time a combed model's layers in ONNX Runtime, and return its coupling with latency among its quantities.

    That takes a minute once: what is known of this machine is read from the user's cache.

    Args:
        model: the dense model that was combed; it is left as it was.
        coupling: what combing it found.
        inputs: what the exported file is called with, as in `export_onnx`; by default what it was combed with.
        forward: likewise.
        threads: of ONNX Runtime; by default as many as this process may use cores.
        time_limit: seconds after which no further layer is timed.
        folder: of the cache.
        progress: called as `progress(layers done, layers in all)`.

    Raises:
        DeployError: the model cannot be exported.
        ValueError: threads below 1, or no inputs that are tensors.

    Example:
        >>> coupling = with_latency(model, coupling, threads=1, folder=Path('cache'))
        >>> coupling.cost(keep).latency <= coupling.cost(coupling.keep()).latency
        True
    """
    times = times_of(
        model, coupling, inputs=inputs, forward=forward, threads=threads, time_limit=time_limit, folder=folder,
        progress=progress,
    )  # fmt: skip
    return with_times(model, coupling, times)


def times_of(
    model: nn.Module,
    coupling: Coupling,
    *,
    inputs: Inputs | None = None,
    forward: Forward | None = None,
    threads: int | None = None,
    time_limit: float | None = TIME_LIMIT,
    folder: Path | None = None,
    progress: Progress | None = None,
    timer: Timer | None = None,
) -> Times:
    """Return the times of a model's file and layers: those that are not in the cache are measured, largest first.

    The options are those of `with_latency`; `timer` stands in for a clock.

    Raises:
        DeployError, ValueError: as `with_latency`.

    Example:
        >>> times = times_of(model, coupling, threads=1, folder=Path('cache'))
        >>> len(times.tables), len(times.dense)
        (3, 1)
    """
    threads = usable_cores() if threads is None else threads
    if threads < 1:
        raise ValueError(f'threads must be 1 or more, not {threads}')
    folder = cache_folder() if folder is None else folder
    seen = layers_of(model, coupling)
    name = _name(model, seen)
    known = remembered(Machine.here(threads), folder)
    keys = {each.layer.key for each in seen}
    if name not in known.dense or keys - known.tables.keys():
        if name not in known.dense:
            known = replace(known, dense={name: _dense(model, coupling, inputs, forward, threads)})
        wanted = [each for each in seen if each.layer.key not in known.tables]
        largest = [each.layer for each in sorted(wanted, key=lambda each: -each.macs)]
        new = time_layers(largest, threads, time_limit=time_limit, progress=progress, timer=timer)
        known = replace(known, tables={**known.tables, **new})
        remember(known, folder)
    tables = {key: known.tables[key] for key in sorted(keys & known.tables.keys())}
    return Times(known.machine, {name: known.dense[name]}, tables)


def with_times(model: nn.Module, coupling: Coupling, times: Times) -> Coupling:
    """Return a coupling that knows latency, from times that were measured earlier.

    Raises:
        ValueError: they are of another model.

    Example:
        >>> times = times_of(model, coupling, threads=1, folder=Path('cache'))
        >>> with_times(model, coupling, times).cost(keep).latency > 0
        True
    """
    seen = layers_of(model, coupling)
    name = _name(model, seen)
    if name not in times.dense:
        raise ValueError(f'the times are those of another model than this {type(model).__name__}: measure anew')
    layers = [TimedLayer(times.tables[each.layer.key], each.axes) for each in seen if each.layer.key in times.tables]
    latency = LatencyModel(times.dense[name], tuple(layers))
    return replace(coupling, cost_model=replace(coupling.cost_model, latency=latency))


def in_words(model: nn.Module, coupling: Coupling, times: Times) -> str:
    """Say how well the times explain a model's latency, and which layers were not timed for want of time: one line.

    Example:
        >>> in_words(model, coupling, times_of(model, coupling, threads=1, folder=Path('cache')))
        'latency: ... ms dense on ..., 1 of ... cores, ONNX Runtime ...; 3 layers take ... ms'
    """
    seen = layers_of(model, coupling)
    left = [each for each in seen if each.layer.key not in times.tables]
    dense = times.dense[_name(model, seen)]
    timed = sum(times.tables[each.layer.key](each.layer.widths) for each in seen if each not in left)
    line = f'latency: {dense:.2f} ms dense on {times.machine}; {len(seen) - len(left)} layers take {timed:.2f} ms'
    share = sum(each.macs for each in left) / max(1, sum(each.macs for each in seen))
    missing = f'; {len(left)} layers ({share:.1%} of their MACs) were not timed, the time limit was reached'
    return line + (missing if left else '')


def _name(model: nn.Module, seen: Sequence[SeenLayer]) -> str:
    """Return a name of what a model computes with: its modules and its layers, with their sizes."""
    parts = [type(model).__name__, str(model), *(each.layer.key for each in seen)]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Promise:
    """What a target promised and what came of it: shares of the dense model's latency; medians in milliseconds."""

    target: float
    predicted: float
    measured: float
    dense_ms: float
    slim_ms: float
    pairs: int
    threads: int

    @property
    def kept(self) -> bool:
        """Whether the slim file is as fast as promised, as far as that can be measured."""
        return self.measured <= self.target + CLOSE

    def __str__(self) -> str:
        found = 'kept' if self.kept else f'missed by {100 * (self.measured - self.target):.1f} points'
        return (
            f'latency: promised {self.target:.1%} of the dense model, predicted {self.predicted:.1%}, measured '
            f'{self.measured:.1%} ({self.slim_ms:.2f} of {self.dense_ms:.2f} ms, medians of {self.pairs} pairs, '
            f'{self.threads} threads): {found}'
        )


def promise_of(
    dense: nn.Module,
    slim: nn.Module,
    inputs: Inputs,
    target: float,
    predicted: float,
    *,
    forward: Forward | None = None,
    threads: int | None = None,
    pairs: int = PAIRS,
    progress: Callable[[int, int, float], None] | None = None,
) -> Promise:
    """Export a dense and a slim model, measure them in turns, and compare with what was promised and predicted.

    Raises:
        DeployError: one of them cannot be exported.

    Example:
        >>> promise = promise_of(model, small, images, 0.6, 0.58, pairs=5, threads=1)
        >>> promise.predicted, promise.pairs, promise.measured > 0
        (0.58, 5, True)
    """
    with tempfile.TemporaryDirectory() as name:
        files = {
            each: export_onnx(net, inputs, Path(name, f'{each}.onnx'), dynamic_batch=False, forward=forward)
            for each, net in (('dense', dense), ('slim', slim))
        }
        before, after = measure_latency(
            files, inputs, pairs, time_limit=PAIRS_LIMIT, threads=threads, progress=progress
        )
    return Promise(target, predicted, after.ratio, before.median, after.median, after.n, after.threads)


def _dense(model: nn.Module, coupling: Coupling, inputs: Inputs | None, forward: Forward | None, threads: int) -> float:
    """Return the milliseconds of the dense file: its fastest run, as of the layers alone."""
    if inputs is None:
        given: Sequence[Any] = coupling.example.inputs
        if not all(isinstance(each, Tensor) for each in given):
            raise ValueError('the model was not combed with tensors alone: give the inputs and forward of its export')
        inputs, forward = tuple(given), forward or coupling.example.forward
    with tempfile.TemporaryDirectory() as name:
        path = export_onnx(model, inputs, Path(name, 'dense.onnx'), dynamic_batch=False, forward=forward)
        session = open_session(path, threads)
    fed = feed(session, inputs)
    fastest = float('inf')
    for _ in range(RUNS):
        begin = time.perf_counter_ns()
        session.run(None, fed)
        fastest = min(fastest, (time.perf_counter_ns() - begin) / 1e6)
    return fastest
