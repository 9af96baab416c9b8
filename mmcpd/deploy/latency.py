"""Measure ONNX files side by side in ONNX Runtime."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmcpd.deploy.onnx import Inputs, feed, open_session

Progress = Callable[[int, int, float], None]  # rounds done, rounds in all, seconds left


@dataclass(frozen=True)
class Latency:
    """Summarise the runs of one file; times in milliseconds.

    Attributes:
        name: As given.
        median, mean, p90: Of the single runs.
        ratio: Median over the rounds of this file's time by the first file's time in the same round.
        ratio_p10, ratio_p90: The same ratio's 10th and 90th percentile.
        n: Number of runs.
        threads: Threads within an operator.
    """

    name: str
    median: float
    mean: float
    p90: float
    ratio: float
    ratio_p10: float
    ratio_p90: float
    n: int
    threads: int


def measure_latency(
    paths: Mapping[str, str | os.PathLike],
    inputs: Inputs,
    n: int = 1000,
    time_limit: float | None = None,
    warmup: int = 20,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Latency]:
    """Measure ONNX files on one input in alternating runs, so that what else the machine does hits all alike.

    A round runs each file once; the order turns round from one round to the next. Idle threads do not spin. The first
    file is what the others are compared with. There are `n` rounds after `warmup` rounds that do not count; none starts
    after `time_limit` seconds, warm-up apart. Threads are those within an operator, by default as many as this process
    may use cores. `progress` is called after each round, outside of what is measured.

    Raises:
        ValueError: No files, or n, warmup or threads out of range.

    Example:
        >>> from mmcpd.deploy import export_onnx
        >>> models = {'dense': model, 'slim': small}
        >>> files = {name: export_onnx(each, images, f'{name}.onnx') for name, each in models.items()}
        >>> [entry.n for entry in measure_latency(files, images, n=5)]
        [5, 5]
    """
    threads = usable_cores() if threads is None else threads
    if not paths or n < 1 or warmup < 0 or threads < 1:
        raise ValueError(
            f'nothing to measure: {len(paths)} files, n={n} (from 1), warmup={warmup} (from 0), threads={threads} '
            '(from 1)'
        )
    sessions = [open_session(path, threads) for path in paths.values()]
    runs = [(session, feed(session, inputs)) for session in sessions]
    for _ in range(warmup):
        for session, arrays in runs:
            session.run(None, arrays)
    times = np.zeros((n, len(runs)))
    start = time.perf_counter()
    done = 0
    while done < n and (done == 0 or time_limit is None or time.perf_counter() - start < time_limit):
        order = range(len(runs)) if done % 2 == 0 else reversed(range(len(runs)))
        for column in order:
            session, arrays = runs[column]
            begin = time.perf_counter_ns()
            session.run(None, arrays)
            times[done, column] = (time.perf_counter_ns() - begin) / 1e6
        done += 1
        if progress is not None:
            elapsed = time.perf_counter() - start
            left = elapsed / done * (n - done)
            progress(done, n, left if time_limit is None else min(left, max(time_limit - elapsed, 0.0)))
    return _summaries(list(paths), times[:done], threads)


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    affinity = getattr(os, 'sched_getaffinity', None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8', errors='replace').splitlines() if info.is_file() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def _summaries(names: list[str], times: np.ndarray, threads: int) -> list[Latency]:
    """Summarise times (rounds, files) in milliseconds."""
    return [
        Latency(
            name=name,
            median=float(np.median(own)),
            mean=float(np.mean(own)),
            p90=float(np.percentile(own, 90)),
            ratio=float(np.median(ratios)),
            ratio_p10=float(np.percentile(ratios, 10)),
            ratio_p90=float(np.percentile(ratios, 90)),
            n=len(times),
            threads=threads,
        )
        for name, own, ratios in zip(names, times.T, (times / times[:, :1]).T, strict=True)
    ]
