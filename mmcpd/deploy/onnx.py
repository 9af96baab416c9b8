"""Export any module to one ONNX file, and compare the file with the module."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmcpd.deploy.drawn import Fixed
from mmcpd.errors import DeployError
from mmcpd.files import whole, why_unwritten
from mmcpd.modes import modes_kept
from mmcpd.random_state import seeded

Inputs = Tensor | tuple[Tensor, ...]
Forward = Callable[..., Any]

NEW_EXPORTER = 18  # the oldest opset that torch's exporter over torch.export writes; below, the TorchScript one does
HAS_NEW_EXPORTER = 'dynamic_shapes' in inspect.signature(torch.onnx.export).parameters  # from torch 2.5
LARGEST = 2 * 1024**3  # bytes; protobuf allows no more in one file
TOLERANCE = 1e-4  # of the largest output, float32
RANDOM = ('Random', 'Bernoulli', 'Multinomial', 'Dropout')  # how operators that draw begin
RUN_ERRORS = (ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.RuntimeException)


@dataclass(frozen=True)
class Parity:
    """Say how far an ONNX file is from its model.

    Attributes:
        max_abs: Largest absolute difference of any output element.
        max_rel: Largest difference of any batch, relative to that batch's largest torch output.
        ok: Whether `max_rel` is within the tolerance, and all shapes and counts agree.
        batches: Size and relative difference of each batch; inf where the file failed or a shape differs.
    """

    max_abs: float
    max_rel: float
    ok: bool
    batches: tuple[tuple[int, float], ...]


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: str | os.PathLike,
    opset: int = NEW_EXPORTER,
    dynamic_batch: bool = True,
    forward: Forward | None = None,
) -> Path:
    """Write a model in eval mode as one ONNX file, checked by onnx, or leave no file.

    An OpenMMLab model called as `model(x)` is in its tensor mode, so the file holds what that returns: a
    classifier's logits (N, classes), not softmax scores; a segmentor's logits at the resolution of its head,
    (N, classes, H/k, W/k), before they are resized to the image. Images come in preprocessed (normalised). Inputs are
    named `input` or `input_0`, ..., outputs `output` or `output_0`, ... The path is returned. Random numbers that
    the forward draws are constants in the file, those of seed 0.

    Args:
        model: Any module; its mode is restored.
        inputs: An example of what it is called with, batch first. A dynamic batch needs two samples or more,
            so a single one is doubled.
        path: Where the file goes; it appears there when it is complete.
        opset: From 18 by torch's current exporter; below, and in torch 2.4, by its TorchScript one.
        dynamic_batch: Leave the batch size open. Models that compute with it as a Python number are exported wrong
            by torch, without a warning: compare at another batch size by `check_parity`.
        forward: Called as `forward(model, *inputs)` instead of the model itself.

    Raises:
        DeployError: torch cannot export the model or not at this opset, or onnx refuses the result.
        ValueError: The model has 2 GB of weights or more.

    Example:
        >>> export_onnx(model, images, 'model.onnx').name
        'model.onnx'
    """
    path = Path(path)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size >= LARGEST:
        raise ValueError(f'{path}: one ONNX file holds less than 2 GB of weights, and these are {size} bytes')
    args = _tuple(inputs)
    if dynamic_batch:
        args = tuple(x if len(x) > 1 else torch.cat([x, x]) for x in args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        _export(model, args, unfinished, opset, dynamic_batch, forward)
        _check(unfinished, path, opset)
    return path


def over_torch_export(opset: int) -> bool:
    """Say whether torch's current exporter writes an opset, which goes over torch.export, or its TorchScript one.

    Example:
        >>> over_torch_export(17)
        False
    """
    return opset >= NEW_EXPORTER and HAS_NEW_EXPORTER


def check_parity(
    path: str | os.PathLike,
    model: nn.Module,
    inputs: Inputs | list[Inputs],
    forward: Forward | None = None,
    tolerance: float = TOLERANCE,
) -> Parity:
    """Compare an ONNX file in ONNX Runtime with its model on one batch or several, better of several sizes.

    Inputs are one (a tensor, or a tuple of tensors) or a list; `forward` is as given to `export_onnx`. The largest
    difference allowed is `tolerance` times the batch's largest torch output. The model runs from seed 0; its mode and
    the random numbers of the caller are restored.

    Raises:
        ValueError: There is nothing to compare.

    Example:
        >>> path = export_onnx(model, images, 'model.onnx')
        >>> check_parity(path, model, [images, images[:1]]).ok
        True
    """
    batches: list[Inputs] = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise ValueError(f'{path}: no inputs to compare the file with the model on')
    session = open_session(path, threads=1)
    found = []
    with _eval(model), torch.no_grad():
        for args in map(_tuple, batches):
            with seeded(0):
                outputs = model(*args) if forward is None else forward(model, *args)
            found.append((len(args[0]), *_differences(session, args, _outputs(outputs))))
    sizes, absolute, relative = zip(*found, strict=True)
    max_rel = max(relative)
    return Parity(max(absolute), max_rel, max_rel <= tolerance, tuple(zip(sizes, relative, strict=True)))


def drawing_nodes(path: str | os.PathLike) -> list[str]:
    """Return the operators of an ONNX file that draw random numbers, each once."""
    written = onnx.load(path)
    nodes = [*written.graph.node, *(node for function in written.functions for node in function.node)]
    return sorted({node.op_type for node in nodes if node.op_type.startswith(RANDOM)})


def open_session(path: str | os.PathLike, threads: int) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU with so many threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from the session that is measured beside this one.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return onnxruntime.InferenceSession(os.fspath(path), options, providers=['CPUExecutionProvider'])


def feed(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, np.ndarray]:
    """Return a session's inputs by name."""
    names = [entry.name for entry in session.get_inputs()]
    arrays = [np.ascontiguousarray(x.detach().cpu().numpy()) for x in _tuple(inputs)]
    return dict(zip(names, arrays, strict=True))


def _export(
    model: nn.Module, args: tuple[Tensor, ...], path: Path, opset: int, dynamic: bool, forward: Forward | None
) -> None:
    with _eval(model), torch.no_grad():
        fixed = Fixed(model, forward, args)
        module = fixed if forward is not None or fixed.count else model
        expected = _outputs(module(*args))
    ins, outs = _names('input', len(args)), _names('output', len(expected))
    options: dict[str, Any]
    if over_torch_export(opset):
        shapes: Any = tuple({0: torch.export.Dim('batch')} for _ in args)
        if module is fixed:
            shapes = (shapes,)  # one variadic parameter
        options = {'dynamo': True, 'external_data': False, 'dynamic_shapes': shapes if dynamic else None}
    else:
        axes = {label: {0: 'batch'} for label in (*ins, *outs)}
        options = {'dynamo': False, 'dynamic_axes': axes if dynamic else None}
    try:
        with _eval(module), warnings.catch_warnings(), _quiet('onnxscript', 'torch.onnx', 'onnx_ir'):
            warnings.simplefilter('ignore')  # tracer warnings; check_parity tells whether they matter
            torch.onnx.export(
                module, args, path, opset_version=opset, input_names=ins, output_names=outs, verbose=False, **options
            )
    except Exception as error:  # exporters raise errors of many unrelated kinds
        if isinstance(error, OSError | RuntimeError) and why_unwritten(error) is not None:
            raise  # which is about the disk
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        newer = f'a higher opset ({NEW_EXPORTER})' if HAS_NEW_EXPORTER else 'torch 2.5 or newer'
        other = 'a lower opset (17)' if over_torch_export(opset) else newer
        hint = f'{other}, or a static batch' if dynamic else other
        raise DeployError(
            f'torch cannot export {type(model).__name__} to ONNX at opset {opset}: {reason} Try {hint}.'
        ) from error


def _check(unfinished: Path, path: Path, opset: int) -> None:
    written = onnx.load(unfinished)
    version = next(entry.version for entry in written.opset_import if entry.domain in ('', 'ai.onnx'))
    if version != opset:
        raise DeployError(f'{path}: torch wrote opset {version} where {opset} was asked for; ask for {version}')
    try:
        onnx.checker.check_model(written, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DeployError(f'{path}: onnx refuses what torch exported: {str(error).splitlines()[0]}') from error


def _differences(
    session: onnxruntime.InferenceSession, args: tuple[Tensor, ...], expected: list[Tensor]
) -> tuple[float, float]:
    """Return the largest absolute difference, and the same relative to the largest expected value."""
    try:
        got = session.run(None, feed(session, args))
    except RUN_ERRORS:
        return float('inf'), float('inf')  # e.g. a reshape that holds for one batch size only
    if [x.shape for x in got] != [tuple(x.shape) for x in expected]:
        return float('inf'), float('inf')
    absolute = relative = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        reference = theirs.detach().cpu().double().numpy()
        difference = np.abs(ours.astype(np.float64) - reference).max(initial=0.0)
        if not np.isfinite(difference):
            return float('inf'), float('inf')
        absolute = max(absolute, float(difference))
        relative = max(relative, float(difference / max(np.abs(reference).max(initial=0.0), 1e-12)))
    return absolute, relative


def _tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def _outputs(result: Any) -> list[Tensor]:
    """Return the tensors of a model's result in the order in which the exporters write them."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _names(label: str, count: int) -> list[str]:
    return [label] if count == 1 else [f'{label}_{number}' for number in range(count)]


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Let these loggers speak of errors only."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
