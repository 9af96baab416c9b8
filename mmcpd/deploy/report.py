"""Export models, check and measure them, and report that as a table and as JSON."""

from __future__ import annotations

import datetime
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

from mmcpd.deploy.exported import Check, Export, Exported, Waiting
from mmcpd.deploy.latency import Latency, Progress, cpu_name, measure_latency, usable_cores
from mmcpd.deploy.onnx import NEW_EXPORTER, Exporter, Forward, Inputs, default_exporter
from mmcpd.deploy.parity import SAME, check_parity
from mmcpd.errors import DeployError, OpsetError
from mmcpd.files import write_json
from mmcpd.version import __version__

DIFFERS = 'differs'  # where there is no number for it


@dataclass(frozen=True)
class Report:
    """Hold what was exported and measured, and in which circumstances; `print` shows a table."""

    models: tuple[Exported, ...]
    latency: tuple[Latency, ...]  # empty where nothing was measured
    facts: dict[str, Any]

    def __str__(self) -> str:
        width = max(12, *(len(model.name) + 2 for model in self.models))
        head = f'{"model":<{width}}{"params":>12}{"file MB":>9}{"parity":>10}'
        if self.latency:
            head += f'{"median ms":>11}{"mean ms":>10}{"p90 ms":>10}{"ratio":>8}{"p10..p90":>14}'
        times = {entry.name: entry for entry in self.latency}
        lines = [_circumstances(self.facts, self.latency), '', head, '-' * len(head)]
        for model in self.models:
            parity = f'{model.parity.max_rel:.1e}' if math.isfinite(model.parity.max_rel) else DIFFERS
            line = f'{model.name:<{width}}{model.params:>12,}{model.bytes / 1e6:>9.2f}{parity:>10}'
            if model.name in times:
                t = times[model.name]
                spread = f'{t.ratio_p10:.3f}..{t.ratio_p90:.3f}'
                line += f'{t.median:>11.3f}{t.mean:>10.3f}{t.p90:>10.3f}{t.ratio:>8.3f}{spread:>14}'
            lines.append(line)
        lines += [
            f'{model.name}: {DIFFERS}: other objects are found, or outputs are not finite; measure it by mmcpd test'
            for model in self.models
            if not math.isfinite(model.parity.max_rel)
        ]
        lines += [f'{model.name}: parity means nothing, {SAME}' for model in self.models if model.parity.constant]
        lines += [
            f'{model.name}: the batch size is fixed to {model.batch}, since the model computes with it as a number'
            for model in self.models
            if model.batch is not None and self.facts['dynamic_batch']
        ]
        if (wished := self.facts['exporter_wished']) != (used := self.facts['exporter']):
            lines.append(f'{wished} cannot write these models, {used} can')
        return '\n'.join(lines)

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything as JSON, whole or not at all."""
        write_json(Path(path), asdict(self))


def deploy(
    models: Mapping[str, nn.Module],
    batches: list[Inputs],
    out: str | os.PathLike,
    opset: int | None = None,
    dynamic_batch: bool = True,
    forward: Forward | None = None,
    runs: int = 1000,
    time_limit: float | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
    check: Check = check_parity,
    *,
    dynamic_size: bool = False,
    exporter: Exporter | None = None,
    metadata: Mapping[str, Mapping[str, object]] | None = None,
    calibration: Sequence[Inputs] = (),
    waiting: Waiting = nullcontext,
) -> Report:
    """Export models as `out/<name>.onnx`, check each against torch, measure them in pairs, write `latency.json`.

    The first model is what the others are compared with. The first batch of real inputs is what the latency is measured
    on and what a static batch is fixed to; batches are all of one size for a static batch, of several sizes for a
    dynamic one. A model that fixes its batch size is exported with that of the first batch, and the report says so.
    Files appear in the folder `out`, which is made if it is not there, when all of them have passed.

    `opset`, `dynamic_batch`, `forward`, `dynamic_size` and `exporter` are as in `export_onnx`, `metadata` that of each
    model by its name. Where no opset is asked for it is 18, or the first one that has a model's operators. Where no
    exporter is asked for and the one over torch.export refuses a model, TorchScript's writes all of them, and the
    report says so. With a dynamic size files are compared on larger pictures too. With `calibration`, batches like the
    others, `out/<name>-int8.onnx` lies beside each file, quantised; its parity is shown and refuses nothing. What takes
    long runs in `waiting(what)`, a context. `time_limit`, `threads` and `progress` are as in `measure_latency`, with
    `runs` rounds (0: nothing is measured). `facts` is what else should stand in the report, e.g. the config and where
    the inputs come from. `check(path, model, batches, forward)` compares a file with a model.

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
    first = NEW_EXPORTER if opset is None else opset
    how = Export(first, dynamic_batch, forward, check, dynamic_size, exporter, metadata or {}, calibration, waiting)
    wished = exporter or default_exporter(first)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as folder:
        used, made = wished, list[Exported]()
        try:
            how, made = _by_an_opset(how, models, Path(folder), batches, chosen=opset is not None)
        except DeployError as error:
            if exporter is not None or wished is Exporter.TORCHSCRIPT or isinstance(error, OpsetError):
                raise
            used = Exporter.TORCHSCRIPT  # for all models, or their times could not be compared
            try:
                made = replace(how, exporter=used).all_files(models, Path(folder), batches)
            except DeployError as other:
                raise DeployError(f'{error} By {used}: {other}') from error
        times: list[Latency] = []
        if runs:
            paths = {entry.name: Path(folder) / entry.file for entry in made}
            times = measure_latency(paths, batches[0], runs, time_limit, threads=threads, progress=progress)
        circumstances = {
            **environment(),
            'opset': how.opset,
            'exporter': used.value,
            'exporter_wished': wished.value,
            'dynamic_batch': dynamic_batch,
            'dynamic_size': dynamic_size,
            'shape': [list(x.shape) for x in ([batches[0]] if isinstance(batches[0], Tensor) else batches[0])],
            **(facts or {}),
        }
        report = Report(tuple(made), tuple(times), circumstances)
        for entry in made:
            os.replace(Path(folder) / entry.file, out / entry.file)
    report.to_json(out / 'latency.json')
    return report


def _by_an_opset(
    how: Export, models: Mapping[str, nn.Module], folder: Path, batches: list[Inputs], *, chosen: bool
) -> tuple[Export, list[Exported]]:
    """Export all models; where nobody chose the opset, by the first one that has their operators."""
    try:
        return how, how.all_files(models, folder, batches)
    except OpsetError as error:
        if chosen:
            raise
        how = replace(how, opset=error.needed)
        return how, how.all_files(models, folder, batches)


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


def _circumstances(facts: Mapping[str, Any], latency: tuple[Latency, ...]) -> str:
    shapes = ', '.join('x'.join(map(str, shape)) for shape in facts['shape'])
    opset = f'opset {facts["opset"]} by {facts["exporter"]}'
    text = f'ONNX Runtime {facts["onnxruntime"]} on {facts["cpu"]}, input {shapes}, {opset}'
    if latency:
        text += f', {latency[0].threads} threads, {latency[0].n} paired runs; ratio to {latency[0].name}'
    return f'{text}\nparity: largest difference from torch {facts["torch"]}, relative to the largest output'
