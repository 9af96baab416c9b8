"""Export a model as it is deployed: checked, with a fixed batch size where need be, and in 8 bits on request."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmcpd.deploy.int8 import quantize
from mmcpd.deploy.onnx import NEW_EXPORTER, Exporter, Forward, Inputs, as_tuple, drawing_nodes, evaluated, export_onnx
from mmcpd.deploy.parity import RUN_ERRORS, Parity, check_parity
from mmcpd.errors import DeployError, OpsetError, first_line

Check = Callable[[Path, nn.Module, list[Any], Forward | None], Parity]
Waiting = Callable[[str], AbstractContextManager[object]]
OTHER = (64, 128)  # pixels by which a second size of pictures is higher and wider: multiples of the usual strides


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
class Export:
    """Say how models are exported and compared; the fields are as in `deploy`."""

    opset: int = NEW_EXPORTER
    dynamic_batch: bool = True
    forward: Forward | None = None
    check: Check = check_parity
    dynamic_size: bool = False
    exporter: Exporter | None = None
    metadata: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    calibration: Sequence[Inputs] = ()
    waiting: Waiting = nullcontext

    def all_files(self, models: Mapping[str, nn.Module], folder: Path, batches: list[Inputs]) -> list[Exported]:
        """Export models by their names, as `files`."""
        return [each for name, model in models.items() for each in self.files(name, model, folder, batches)]

    def files(self, name: str, model: nn.Module, folder: Path, batches: list[Inputs]) -> list[Exported]:
        """Export one model, with the size of the first batch where torch cannot leave it open, and quantise the file.

        Raises:
            DeployError: it cannot be exported so either; the message says what both gave.
        """
        path, how, size = folder / f'{name}.onnx', self, None if self.dynamic_batch else _size(batches[0])
        if self.dynamic_size:
            batches = [*batches, self._other_pictures(model, batches[0])]
        try:
            parity = self._attempt(model, path, batches)
        except DeployError as error:
            if not self.dynamic_batch or isinstance(error, OpsetError):
                raise
            size = _size(batches[0])
            batches, how = [_rows(batch, 0, size) for batch in batches], replace(self, dynamic_batch=False)
            try:
                parity = how._attempt(model, path, batches)
            except DeployError as fixed:
                raise DeployError(f'{error} With the batch size fixed to {size}: {fixed}') from error
        params = sum(parameter.numel() for parameter in model.parameters())
        made = [Exported(path.stem, path.name, path.stat().st_size, params, parity, size)]
        if self.calibration:
            small = path.with_name(f'{name}-int8.onnx')
            with self.waiting(f'quantising {name}'):
                quantize(path, small, self._calibration(name, size))
                parity = self.check(small, model, batches, self.forward)
            made.append(Exported(small.stem, small.name, small.stat().st_size, params, parity, size))
        return made

    def _calibration(self, name: str, size: int | None) -> list[Inputs]:
        """Return the batches to calibrate on, of the size that a file is fixed to.

        Raises:
            DeployError: there are fewer pictures than that.
        """
        pieces = _pieces(self.calibration, size)
        if not pieces:
            number = sum(map(_size, self.calibration))
            raise DeployError(
                f'{name}: {number} pictures to calibrate on are less than a batch of {size}, to which the file is '
                'fixed: give more (--calibrate), or a smaller batch'
            )
        return pieces

    def _other_pictures(self, model: nn.Module, batch: Inputs) -> Inputs:
        """Return larger pictures than those of a batch.

        Raises:
            DeployError: the model does not run on them.
        """
        other = _of_another_size(batch)
        args = as_tuple(other)
        try:
            with evaluated(model), torch.no_grad():
                model(*args) if self.forward is None else self.forward(model, *args)
        except Exception as error:  # models raise errors of any kind
            height, width = args[0].shape[2:]
            raise DeployError(
                f'{type(model).__name__} does not run on pictures of another size, {height}x{width} '
                f'({first_line(error)}): leave the size fixed'
            ) from error
        return other

    def _attempt(self, model: nn.Module, path: Path, batches: list[Inputs]) -> Parity:
        """Export and compare.

        Raises:
            DeployError: torch cannot export it, or the file computes something else.
        """
        with self.waiting(f'exporting {path.stem}'):
            export_onnx(
                model,
                batches[0],
                path,
                self.opset,
                self.dynamic_batch,
                self.forward,
                dynamic_size=self.dynamic_size,
                exporter=self.exporter,
                metadata=self.metadata.get(path.stem),
            )
            try:
                parity = self.check(path, model, batches, self.forward)
            except RUN_ERRORS as error:
                raise DeployError(f'{path.name}: ONNX Runtime does not load it: {first_line(error)}') from error
        if not parity.ok:
            raise DeployError(
                f'{path.stem}: the ONNX file is not what the model computes {self._why(path, parity, batches)}'
            )
        return parity

    def _why(self, path: Path, parity: Parity, batches: list[Inputs]) -> str:
        """Return the differences by batch, and what may help."""
        each = ', '.join(
            f'{_named(batch)}: {"the file fails, or its shapes differ" if relative == inf else f"{relative:.1e}"}'
            for batch, (_, relative) in zip(batches, parity.batches, strict=True)
        )
        drawn = drawing_nodes(path)
        hint = f' It draws random numbers itself ({", ".join(drawn)}): turn them off in the config.' if drawn else ''
        if self.dynamic_size and all(relative < inf for _, relative in parity.batches[:-1]):
            hint += ' Leave the size of pictures fixed, where it is the last batch that fails.'
        return f'(relative difference: {each}).{hint}'


def _named(batch: Inputs) -> str:
    return f'batch of {_size(batch)}'


def _size(batch: Inputs) -> int:
    return len(as_tuple(batch)[0])


def _rows(batch: Inputs, start: int, end: int) -> Inputs:
    """Return some samples of a batch."""
    return batch[start:end] if isinstance(batch, Tensor) else tuple(x[start:end] for x in batch)


def _pieces(batches: Sequence[Inputs], size: int | None) -> list[Inputs]:
    """Return batches in pieces of the size that a file is fixed to, across their ends, without the last rest."""
    if size is None:
        return list(batches)
    pieces: list[Inputs] = []
    rest: Inputs = ()
    for batch in batches:
        rest = _joined(rest, batch) if len(as_tuple(rest)) and _size(rest) else batch
        end = _size(rest) // size * size
        pieces += [_rows(rest, start, start + size) for start in range(0, end, size)]
        rest = _rows(rest, end, _size(rest))
    return pieces


def _joined(one: Inputs, other: Inputs) -> Inputs:
    parts = tuple(torch.cat(pair) for pair in zip(as_tuple(one), as_tuple(other), strict=True))
    return parts[0] if isinstance(other, Tensor) else parts


def _of_another_size(batch: Inputs) -> Inputs:
    """Return a batch whose pictures (N, C, H, W) go on with themselves below and to the right."""
    if not isinstance(batch, Tensor):
        return tuple(_of_another_size(x) if x.dim() == 4 else x for x in batch)  # type: ignore[misc]
    rows, columns = (torch.arange(size + more) % size for size, more in zip(batch.shape[2:], OTHER, strict=True))
    return batch[:, :, rows][..., columns]
