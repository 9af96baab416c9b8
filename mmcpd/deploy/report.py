"""Export models, check and measure them, and report that as a table and as JSON."""

from __future__ import annotations

import datetime
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from mmcpd.deploy.latency import Latency, Progress, measure_latency, usable_cores
from mmcpd.deploy.onnx import (
    NEW_EXPORTER,
    Forward,
    Inputs,
    default_exporter,
    drawing_nodes,
    export_onnx,
)
from mmcpd.deploy.parity import Parity, check_parity
from mmcpd.errors import DeployError
from mmcpd.files import write_json
from mmcpd.version import __version__

Check = Callable[[Path, nn.Module, list[Any], Forward | None], Parity]


@dataclass(frozen=True)
class Exported:
    """Describe one exported model; `batch` is the size that the file is fixed to, None where it is open."""

    name: str
    file: str
    bytes: int
    params: int
    parity: Parity
    batch: int | None = None


@dataclass(frozen=True)
class Report:
    """Hold what was exported and measured, and in which circumstances; `print` shows a table."""

    models: tuple[Exported, ...]
    latency: tuple[Latency, ...]  # empty where nothing was measured
    facts: dict[str, Any]

    def __str__(self) -> str:
        head = f'{"model":<12}{"params":>12}{"file MB":>9}{"parity":>10}'
        if self.latency:
            head += f'{"median ms":>11}{"mean ms":>10}{"p90 ms":>10}{"ratio":>8}{"p10..p90":>14}'
        times = {entry.name: entry for entry in self.latency}
        lines = [_circumstances(self.facts, self.latency), '', head, '-' * len(head)]
        for model in self.models:
            line = f'{model.name:<12}{model.params:>12,}{model.bytes / 1e6:>9.2f}{model.parity.max_rel:>10.1e}'
            if model.name in times:
                t = times[model.name]
                spread = f'{t.ratio_p10:.3f}..{t.ratio_p90:.3f}'
                line += f'{t.median:>11.3f}{t.mean:>10.3f}{t.p90:>10.3f}{t.ratio:>8.3f}{spread:>14}'
            lines.append(line)
        lines += [
            f'{model.name}: the batch size is fixed to {model.batch}, since the model computes with it as a number'
            for model in self.models
            if model.batch is not None and self.facts['dynamic_batch']
        ]
        return '\n'.join(lines)

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything as JSON, whole or not at all."""
        write_json(Path(path), asdict(self))


def deploy(
    models: Mapping[str, nn.Module],
    batches: list[Inputs],
    out: str | os.PathLike,
    opset: int = NEW_EXPORTER,
    dynamic_batch: bool = True,
    forward: Forward | None = None,
    runs: int = 1000,
    time_limit: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
    check: Check = check_parity,
) -> Report:
    """Export models as `out/<name>.onnx`, check each against torch, measure them in pairs, write `latency.json`.

    The first model is what the others are compared with. The first batch of real inputs is what the latency is measured
    on and what a static batch is fixed to; batches are all of one size for a static batch, of several sizes for a
    dynamic one. A model that fixes its batch size is exported with that of the first batch, and the report says so.
    Files appear in the folder `out`, which is made if it is not there, when all of them have passed.

    `opset`, `dynamic_batch` and `forward` are as in `export_onnx`; `time_limit`, `threads` and `progress` as in
    `measure_latency`, with `runs` rounds (0: nothing is measured). `facts` is what else should stand in the report,
    e.g. the config and where the inputs come from. `check(path, model, batches, forward)` compares a file with a model.

    Raises:
        DeployError: A model cannot be exported, or its file computes something else.
        ValueError: No models, or no batches.

    Example:
        >>> report = deploy({'dense': model, 'slim': small}, [images], 'deployed', runs=5, facts={'inputs': 'noise'})
        >>> [entry.file for entry in report.models]
        ['dense.onnx', 'slim.onnx']
    """
    if not models or not batches:
        raise ValueError(f'nothing to deploy: {len(models)} models, {len(batches)} batches')
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        made = [
            _exported(model, Path(folder, f'{name}.onnx'), batches, opset, dynamic_batch, forward, check)
            for name, model in models.items()
        ]
        times: list[Latency] = []
        if runs:
            paths = {entry.name: Path(folder) / entry.file for entry in made}
            times = measure_latency(paths, batches[0], runs, time_limit, threads=threads, progress=progress)
        circumstances = {
            **environment(),
            'opset': opset,
            'exporter': default_exporter(opset).value,
            'dynamic_batch': dynamic_batch,
            'shape': [list(x.shape) for x in ([batches[0]] if isinstance(batches[0], Tensor) else batches[0])],
            **(facts or {}),
        }
        report = Report(tuple(made), tuple(times), circumstances)
        for entry in made:
            os.replace(Path(folder) / entry.file, out / entry.file)
    report.to_json(out / 'latency.json')
    return report


def environment() -> dict[str, Any]:
    """Return versions, processor, cores and date, as a report needs them."""
    return {
        'mmcpd': __version__,
        'python': platform.python_version(),
        'torch': torch.__version__,
        'numpy': np.__version__,
        'onnx': onnx.__version__,
        'onnxruntime': onnxruntime.__version__,
        'provider': 'CPUExecutionProvider',
        'cpu': cpu_name(),
        'cores': usable_cores(),
        'system': f'{platform.system()} {platform.machine()}',
        'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds'),
    }


def cpu_name() -> str:
    """Return the processor's name, as far as the system tells it."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8', errors='replace').splitlines() if info.is_file() else []
    names = (line.split(':', 1)[1].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())


def _exported(
    model: nn.Module,
    path: Path,
    batches: list[Inputs],
    opset: int,
    dynamic_batch: bool,
    forward: Forward | None,
    check: Check,
) -> Exported:
    """Export a model; with the size of the first batch where torch cannot leave it open.

    Raises:
        DeployError: it cannot be exported so either; the message says what both gave.
    """
    size = None if dynamic_batch else _size(batches[0])
    try:
        parity = _attempt(model, path, batches, opset, dynamic_batch, forward, check)
    except DeployError as error:
        if not dynamic_batch:
            raise
        size = _size(batches[0])
        try:
            parity = _attempt(model, path, [_first(batch, size) for batch in batches], opset, False, forward, check)
        except DeployError as fixed:
            raise DeployError(f'{error} With the batch size fixed to {size}: {fixed}') from error
    params = sum(parameter.numel() for parameter in model.parameters())
    return Exported(path.stem, path.name, path.stat().st_size, params, parity, size)


def _attempt(
    model: nn.Module,
    path: Path,
    batches: list[Inputs],
    opset: int,
    dynamic_batch: bool,
    forward: Forward | None,
    check: Check,
) -> Parity:
    """Export and compare.

    Raises:
        DeployError: torch cannot export it, or the file computes something else.
    """
    export_onnx(model, batches[0], path, opset, dynamic_batch, forward)
    parity = check(path, model, batches, forward)
    if not parity.ok:
        each = ', '.join(
            f'batch of {size}: {"the file fails, or its shapes differ" if relative == inf else f"{relative:.1e}"}'
            for size, relative in parity.batches
        )
        drawn = drawing_nodes(path)
        hint = f' It draws random numbers itself ({", ".join(drawn)}): turn them off in the config.' if drawn else ''
        raise DeployError(
            f'{path.stem}: the ONNX file is not what the model computes (relative difference: {each}).{hint}'
        )
    return parity


def _size(batch: Inputs) -> int:
    return len(batch if isinstance(batch, Tensor) else batch[0])


def _first(batch: Inputs, size: int) -> Inputs:
    """Return the first samples of a batch."""
    return batch[:size] if isinstance(batch, Tensor) else tuple(x[:size] for x in batch)


def _circumstances(facts: Mapping[str, Any], latency: tuple[Latency, ...]) -> str:
    shapes = ', '.join('x'.join(map(str, shape)) for shape in facts['shape'])
    opset = f'opset {facts["opset"]} by {facts["exporter"]}'
    text = f'ONNX Runtime {facts["onnxruntime"]} on {facts["cpu"]}, input {shapes}, {opset}'
    if latency:
        text += f', {latency[0].threads} threads, {latency[0].n} paired runs; ratio to {latency[0].name}'
    return f'{text}\nparity: largest difference from torch {facts["torch"]}, relative to the largest output'
