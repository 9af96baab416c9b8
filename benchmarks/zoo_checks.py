"""What is done to one family of the zoo: comb, mask, slim, count, rotate and export, each with its control."""

from __future__ import annotations

import copy
import gc
import io
import json
import os
import statistics
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo_family import Deployed
from mmcpd.comb import comb
from mmcpd.coupling import Coupling, Keep, LayerKind
from mmcpd.errors import SlimError
from mmcpd.example import Example
from mmcpd.nested import tensors_in
from mmcpd.slim import slim
from mmcpd.slim.compare import compare, difference
from mmcpd.slim.trial import in_double, random_keep

ROOT = Path(__file__).resolve().parents[1]
KEEP = 0.7
ONNX_TOLERANCE = 1e-3
MARK = '@@zoo '
Row = dict[str, Any]


@dataclass(frozen=True)
class Slimmed:
    """Hold a model in float64 (or float32, where its forward allows no other), combed and slimmed by a random keep."""

    model: nn.Module
    coupling: Coupling  # its example is of the model's type
    keep: Keep
    small: nn.Module
    turned: nn.Module  # slimmed by the keep shifted by one unit: what must not agree

    def gaps(self) -> Row:
        """Compare the masked model with the slimmed one, and with the one that must differ."""
        return {name: self.gap(other) for name, other in (('gap', self.small), ('control', self.turned))}

    def gap(self, other: nn.Module) -> float:
        """Return how far another model is from the masked one; infinitely where its outputs have other shapes."""
        try:
            return compare(self.model, self.coupling, self.keep, copy.deepcopy(other))
        except SlimError:
            return float('inf')
        finally:
            gc.collect()

    def on(self, example: Example) -> Slimmed:
        """Return the same models with another example."""
        return replace(self, coupling=replace(self.coupling, example=example))


def slimmed(model: nn.Module, found: Coupling, keep: Keep) -> Slimmed:
    turned = {name: kept.roll(1) for name, kept in keep.items()}
    return Slimmed(model, found, keep, slim(model, found, keep), slim(model, found, turned))


def called(model: nn.Module, *inputs: Any) -> Any:
    """Call a model: the forward of an example."""
    return model(*inputs)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> object:
    """Run a model; random numbers that it draws are the same each time."""
    return Example(inputs, called).run(model)


def gap(left: object, right: object) -> float:
    """Return the largest difference, relative to the largest value of `left`; infinite where shapes differ."""
    try:
        return difference(left, right)
    except SlimError:
        return float('inf')


def timed(call: Callable[[], Any], most: int = 5, budget: float = 10.0) -> float:
    """Return the median of up to `most` calls in seconds; fewer once `budget` seconds are gone."""
    times: list[float] = []
    while len(times) < most and sum(times) < budget:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _without_paths(text: str) -> str:
    """Take the folders of this machine out of a text."""
    for folder in (sysconfig.get_path('purelib'), str(ROOT)):
        text = text.replace(f'{folder}{os.sep}', '')
    return text


@contextmanager
def stage(row: Row, name: str) -> Iterator[None]:
    """Time a stage, and turn an exception into a result: its last frames say where."""
    print(MARK + json.dumps({'stage': name}), flush=True)
    start = time.perf_counter()
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a sweep reports whatever a model raises, and goes on
        row['error'] = f'{name}: {type(error).__name__}: {_without_paths(str(error))[:600]}'
        row['traceback'] = _without_paths(traceback.format_exc()).splitlines()[-14:]
    gc.collect()  # copies of models hold each other
    row['seconds'] = round(row.get('seconds', 0) + time.perf_counter() - start, 2)


def sweep_ours(model: Deployed, inputs: tuple[Any, ...], seed: int) -> tuple[Row, Slimmed | None]:
    """Comb, mask, slim, compare and count; return the row and the slimmed model."""
    row: Row = {}
    with stage(row, 'comb'), torch.no_grad():
        outputs(model, inputs)
        row['forward_s'] = timed(lambda: outputs(model, inputs))
        found = comb(model, inputs)
        row['comb_s'] = timed(lambda: comb(model, inputs), most=3)
        row |= described(found)
    if 'error' in row:
        return row, None
    with stage(row, 'slim'), torch.no_grad():
        double, example = in_double(model, found.example)
        row['dtype'] = str(tensors_in(example.inputs)[0].dtype).removeprefix('torch.')
        done = slimmed(double, replace(found, example=example), random_keep(found, KEEP, seed))
        gaps = done.gaps()
        row |= {'error_masked_slim': gaps['gap'], 'error_control': gaps['control']}
        row['params_slim'] = sum(p.numel() for p in done.small.parameters())
    if 'error' in row:
        return row, None
    with stage(row, 'cost'), torch.no_grad():
        cost = found.cost(done.keep)
        row |= {'macs_slim': count_macs(done), 'macs_cost': cost.macs, 'params_cost': cost.params}
        row['macs_dense'] = found.cost(found.keep()).macs
    return row, done


def described(found: Coupling) -> Row:
    """Say how much of a model can be pruned, in parameters and in channels, and what freezes the rest."""
    prunable, total = found.prunable()
    channels, width = found.prunable_channels()
    attention = next((w for w in found.widths if w.kind is LayerKind.ATTENTION), None)
    return {
        'groups': len(found.groups),
        'units': found.units,
        'params': total,
        'prunable': prunable / max(total, 1),
        'channels': channels / max(width, 1),
        'attention': attention and attention.prunable / attention.total,
        'frozen': [f'{reason} ({rows} rows)' for reason, rows in found.merged_reasons()[:4]],
        'unsupported': sorted({op for op, _ in found.unsupported}),
        'untried': found.untried,
    }


@torch.no_grad()
def sweep_rotate(model: Deployed, inputs: tuple[Any, ...]) -> Row:
    """Rotate a copy, and compare its outputs; a control changes one weight that was written."""
    from mmcpd.rotate import rotate_

    row: Row = {}
    with stage(row, 'rotate'):
        double, example = in_double(model, Example(inputs, called))
        row['dtype'] = str(tensors_in(example.inputs)[0].dtype).removeprefix('torch.')
        before = example.run(copy.deepcopy(double))
        done = rotate_(double, example.inputs, forward=example.forward)
        row |= {'heads': done.heads, 'found': done.found, 'gap': gap(before, example.run(copy.deepcopy(double)))}
        row['left_alone'] = str(done).splitlines()[1:]
        if done.rotated:
            double.get_parameter(done.rotated[-1].layers[-1]).mul_(1.1)
            row['gap_control'] = gap(before, example.run(double))
    return row


def count_macs(done: Slimmed) -> int:
    """Count a slimmed model's multiply-accumulates with torch's own counter; attention as the matrix products it is."""
    import torchvision  # noqa: F401  (it registers its operators)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    small = copy.deepcopy(done.small).requires_grad_(False)  # the counter hooks on to gradients of parameters
    rules = {torch.ops.torchvision.deform_conv2d: deformable_flops}
    with FlopCounterMode(display=False, custom_mapping=rules) as counter, sdpa_kernel(SDPBackend.MATH):
        done.coupling.example.run(small)
    return counter.get_total_flops() // 2


def deformable_flops(_x: Any, weight: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
    """Return the operations of a deformable convolution, those of the plain one."""
    batch, _channels, height, width = out_shape
    return 2 * batch * height * width * weight.numel()


def sweep_onnx(dense: Deployed, small: nn.Module, inputs: tuple[Any, ...]) -> Row:
    """Export the slimmed model and compare it in ONNX Runtime; if that fails, or differs, do so with the dense one."""
    row: Row = {}
    with stage(row, 'export'), torch.no_grad():
        small = small.float().eval()  # some compute constants anew in eval mode
        row |= parity(small, inputs)
    row.pop('traceback', None)
    if 'error' in row or row['error_parity'] > ONNX_TOLERANCE:
        other: Row = {}
        with stage(other, 'export of the dense model'), torch.no_grad():
            other |= parity(dense, inputs)
        row |= {'dense_error': other.get('error'), 'dense_parity': other.get('error_parity')}
    return row


def parity(model: nn.Module, inputs: tuple[Any, ...]) -> Row:
    """Export with the TorchScript exporter, or else with torch.export's, and compare; return error and exporter."""
    import onnxruntime

    from mmcpd.deploy.drawn import Fixed

    expected = outputs(copy.deepcopy(model), inputs)  # some keep a queue, which a forward fills
    fixed = Fixed(model, None, inputs)
    model = fixed if fixed.count else model
    tensors = tensors_in(inputs)
    failures = []
    for dynamo in (False, True):
        file = io.BytesIO()
        try:
            if dynamo:
                torch.onnx.export(model, inputs, dynamo=True).save(file)
            else:
                torch.onnx.export(model, inputs, file, dynamo=False, opset_version=18)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            session = onnxruntime.InferenceSession(file.getvalue(), options, providers=['CPUExecutionProvider'])
            got = session.run(None, {s.name: t.numpy() for s, t in zip(session.get_inputs(), tensors, strict=True)})
        except Exception as error:  # noqa: BLE001 - the exporters raise anything; both failures are reported
            failures.append(f'{"dynamo" if dynamo else "torchscript"}: {type(error).__name__}: {str(error)[:300]}')
            continue
        error = gap(expected, [torch.from_numpy(t) for t in got])
        return {'error_parity': error, 'exporter': 'dynamo' if dynamo else 'torchscript', 'bytes': len(file.getvalue())}
    raise RuntimeError('; '.join(failures))
