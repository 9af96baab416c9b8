"""Export any module to one ONNX file, and open it."""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mmcpd.compat import StrEnum
from mmcpd.deploy.drawn import Fixed
from mmcpd.deploy.metadata import write_metadata
from mmcpd.errors import DeployError, OpsetError
from mmcpd.files import whole, why_unwritten
from mmcpd.modes import modes_kept

Inputs = Tensor | tuple[Tensor, ...]
Forward = Callable[..., Any]

NEW_EXPORTER = 18  # the oldest opset that torch's exporter over torch.export writes; below, the TorchScript one does
OLDEST = 7  # that torch writes at all
HAS_NEW_EXPORTER = 'dynamic_shapes' in inspect.signature(torch.onnx.export).parameters  # from torch 2.5
TOLERANCE = 1e-4  # of the largest output, float32
LARGEST = 2 * 1024**3  # bytes; protobuf allows no more in one file
RANDOM = ('Random', 'Bernoulli', 'Multinomial', 'Dropout')  # how operators that draw begin
SIZES = {0: 'batch', 2: 'height', 3: 'width'}  # names of the dimensions of pictures that a file leaves open


class Exporter(StrEnum):
    """Name the exporters of torch: the one over torch.export, and the one that traces TorchScript."""

    TORCH_EXPORT = 'torch.export'
    TORCHSCRIPT = 'TorchScript'


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: str | os.PathLike,
    opset: int = NEW_EXPORTER,
    dynamic_batch: bool = True,
    forward: Forward | None = None,
    *,
    dynamic_size: bool = False,
    exporter: Exporter | None = None,
    metadata: Mapping[str, object] | None = None,
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
        opset: ONNX's set of operators.
        dynamic_batch: Leave the batch size open. Models that compute with it as a Python number are exported wrong
            by torch, without a warning: compare at another batch size by `check_parity`.
        forward: Called as `forward(model, *inputs)` instead of the model itself.
        dynamic_size: Leave height and width of pictures (N, C, H, W) open as well; compare at another size, too.
        exporter: By default the one over torch.export from opset 18, below and in torch 2.4 TorchScript's.
        metadata: Values of JSON, by key, that go into the file beside mmcpd's version.

    Raises:
        DeployError: torch cannot export the model or not at this opset, or onnx refuses the result.
        OpsetError: an operator of the model is not in this opset.
        ValueError: The model has 2 GB of weights or more.

    Example:
        >>> export_onnx(model, images, 'model.onnx').name
        'model.onnx'
    """
    path = Path(path)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size >= LARGEST:
        raise ValueError(f'{path}: one ONNX file holds less than 2 GB of weights, and these are {size} bytes')
    newest = onnx.defs.onnx_opset_version()
    if not OLDEST <= opset <= newest:
        raise DeployError(f'opset {opset}: torch and the installed onnx {onnx.__version__} know {OLDEST} to {newest}')
    args = as_tuple(inputs)
    exporter = exporter or default_exporter(opset)
    dims = (0,) * dynamic_batch + (2, 3) * dynamic_size
    if dynamic_batch:
        args = tuple(x if len(x) > 1 else torch.cat([x, x]) for x in args)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as unfinished:
        _export(model, args, unfinished, opset, dims, forward, exporter)
        _without_traces(unfinished)
        _check(unfinished, path, opset)
        write_metadata(unfinished, metadata or {})
    return path


def default_exporter(opset: int) -> Exporter:
    """Return the exporter that writes an opset where none is asked for.

    Example:
        >>> default_exporter(17).value
        'TorchScript'
    """
    return Exporter.TORCH_EXPORT if opset >= NEW_EXPORTER and HAS_NEW_EXPORTER else Exporter.TORCHSCRIPT


def drawing_nodes(path: str | os.PathLike) -> list[str]:
    """Return the operators of an ONNX file that draw random numbers, each once."""
    nodes = [node for part in _parts(onnx.load(path)) for node in part.node]
    return sorted({node.op_type for node in nodes if node.op_type.startswith(RANDOM)})


def open_session(path: str | os.PathLike, threads: int) -> onnxruntime.InferenceSession:
    """Open an ONNX file on the CPU with so many threads."""
    return onnxruntime.InferenceSession(os.fspath(path), session_options(threads), providers=['CPUExecutionProvider'])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Return the options of all sessions that are measured."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from the session that is measured beside this one.
    options.add_session_config_entry('session.intra_op.allow_spinning', '0')
    return options


def feed(session: onnxruntime.InferenceSession, inputs: Inputs) -> dict[str, np.ndarray]:
    """Return a session's inputs by name."""
    names = [entry.name for entry in session.get_inputs()]
    arrays = [np.ascontiguousarray(x.detach().cpu().numpy()) for x in as_tuple(inputs)]
    return dict(zip(names, arrays, strict=True))


def _export(
    model: nn.Module,
    args: tuple[Tensor, ...],
    path: Path,
    opset: int,
    dims: tuple[int, ...],
    forward: Forward | None,
    exporter: Exporter,
) -> None:
    with evaluated(model), torch.no_grad():
        fixed = Fixed(model, forward, args)
        module = fixed if forward is not None or fixed.count else model
        expected = outputs_of(module(*args))
    ins, outs = _names('input', len(args)), _names('output', len(expected))
    options: dict[str, Any]
    if exporter is Exporter.TORCH_EXPORT:
        if not HAS_NEW_EXPORTER:
            raise DeployError('torch 2.4 has no usable exporter over torch.export: take TorchScript, or torch 2.5')
        shapes: Any = tuple({dim: _open(dim) for dim in dims if dim == 0 or x.dim() == 4} for x in args)
        if module is fixed:
            shapes = (shapes,)  # one variadic parameter
        options = {'dynamo': True, 'external_data': False, 'dynamic_shapes': shapes if dims else None}
    else:
        axes = {
            label: {dim: SIZES[dim] for dim in dims if dim == 0 or x.dim() == 4}
            for label, x in zip(ins, args, strict=True)
        }
        axes |= {label: {0: SIZES[0]} for label in outs if 0 in dims}
        options = {'dynamo': False, 'dynamic_axes': axes if dims else None}
    try:
        with evaluated(module), warnings.catch_warnings(), quiet('onnxscript', 'torch.onnx', 'onnx_ir'):
            warnings.simplefilter('ignore')  # tracer warnings; check_parity tells whether they matter
            torch.onnx.export(
                module, args, path, opset_version=opset, input_names=ins, output_names=outs, verbose=False, **options
            )
    except Exception as error:  # exporters raise errors of many unrelated kinds
        if isinstance(error, OSError | RuntimeError) and why_unwritten(error) is not None:
            raise  # which is about the disk
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        newer = f'a higher opset ({NEW_EXPORTER})' if HAS_NEW_EXPORTER else 'torch 2.5 or newer'
        other = 'a lower opset (17)' if exporter is Exporter.TORCH_EXPORT else newer
        hint = f'{other}, or a static {"size" if 2 in dims else "batch"}' if dims else other
        raise DeployError(
            f'torch cannot export {type(model).__name__} to ONNX at opset {opset}: {reason} Try {hint}.'
        ) from error


def _without_traces(path: Path) -> None:
    """Take out what torch's exporter notes on nodes and values: source files of this machine, some 2 kB a node."""
    written = onnx.load(path)
    for part in _parts(written):
        for each in (*part.node, *part.value_info):
            del each.metadata_props[:]
    onnx.save(written, path)


def _parts(written: Any) -> Iterator[Any]:
    """Yield the graph and the functions of a file, and the graphs inside of their nodes."""
    for part in (written.graph, *written.functions):
        yield from _graphs(part)


def _graphs(part: Any) -> Iterator[Any]:
    """Yield a graph or function, and the graphs inside its nodes, as the branches of an If."""
    yield part
    for attribute in (attribute for node in part.node for attribute in node.attribute):
        for inner in (*([attribute.g] if attribute.HasField('g') else ()), *attribute.graphs):
            yield from _graphs(inner)


def _check(unfinished: Path, path: Path, opset: int) -> None:
    written = onnx.load(unfinished)
    version = next(entry.version for entry in written.opset_import if entry.domain in ('', 'ai.onnx'))
    if version != opset:
        raise DeployError(f'{path}: torch wrote opset {version} where {opset} was asked for; ask for {version}')
    names = {node.op_type for part in _parts(written) for node in part.node if node.domain in ('', 'ai.onnx')}
    needed, name = max(((_opsets_of_operators().get(name, 0), name) for name in names), default=(0, ''))
    if needed > opset:
        raise OpsetError(f'{path.name}: {name} is in ONNX from opset {needed} on: ask for {needed}', needed)
    try:
        onnx.checker.check_model(written, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise DeployError(f'{path}: onnx refuses what torch exported: {str(error).splitlines()[0]}') from error


@cache
def _opsets_of_operators() -> dict[str, int]:
    """Return the first opset that has an operator, by its name."""
    first: dict[str, int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == '':
            first[schema.name] = min(schema.since_version, first.get(schema.name, schema.since_version))
    return first


def as_tuple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)


def outputs_of(result: Any) -> list[Tensor]:
    """Return the tensors of a model's result in the order in which the exporters write them."""
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _open(dim: int) -> Any:
    """Return what lets torch.export leave a dimension open; sizes may have to be multiples of a model's strides."""
    free = getattr(torch.export.Dim, 'DYNAMIC', None)  # from torch 2.6
    return torch.export.Dim(SIZES[dim]) if dim == 0 or free is None else free


def _names(label: str, count: int) -> list[str]:
    return [label] if count == 1 else [f'{label}_{number}' for number in range(count)]


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode, and each back into its own."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Let these loggers speak of errors only, and TorchScript's exporter not print the graph that it gave up on."""
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with patch.object(torch._C, '_jit_onnx_log', lambda *_: None):
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
