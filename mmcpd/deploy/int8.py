"""Quantise an ONNX file to 8-bit integers, calibrated on pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from mmcpd.deploy.metadata import read_metadata, write_metadata
from mmcpd.deploy.onnx import Inputs, as_tuple, feed, open_session, quiet
from mmcpd.errors import DeployError, first_line
from mmcpd.files import whole, why_unwritten

# Softmax, norms and what chooses the class stay in float32: eight bits cost them accuracy and save no time.
QUANTIZED = (
    'Conv ConvTranspose Gemm MatMul Add Mul Relu Clip Concat MaxPool AveragePool GlobalAveragePool Reshape Transpose '
    'Squeeze Unsqueeze Flatten Slice Split Pad Resize'
).split()


class _Batches(CalibrationDataReader):
    """Give out batches one by one."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self.feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


def quantize(path: str | os.PathLike, out: str | os.PathLike, batches: Sequence[Inputs]) -> Path:
    """Write an ONNX file's layers with weights and activations of 8 bits, by ONNX Runtime, and return the new path.

    Weights are signed, with a scale for each output channel; activations unsigned, in the range that they take on
    these batches of what the file takes. The format is QDQ, from opset 13. Processors without VNNI instructions may
    overflow on it. Outputs differ by more than rounding: measure the accuracy.

    Raises:
        ValueError: There are no batches.
        DeployError: ONNX Runtime cannot quantise the file.

    Example:
        >>> from mmcpd.deploy import export_onnx
        >>> path = export_onnx(model, images, 'model.onnx')
        >>> quantize(path, 'model-int8.onnx', [images]).name
        'model-int8.onnx'
    """
    path, out = Path(path), Path(out)
    if not batches:
        raise ValueError(f'{path}: no pictures to calibrate on')
    session = open_session(path, threads=1)
    with whole(out) as unfinished, tempfile.TemporaryDirectory(dir=out.parent) as folder, quiet(''):
        prepared = Path(folder, 'prepared.onnx')
        try:
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                unfinished,
                _Batches(feed(session, batch) for batch in batches),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=QUANTIZED,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        except Exception as error:  # it raises errors of many unrelated kinds
            if isinstance(error, OSError | RuntimeError) and why_unwritten(error) is not None:
                raise  # which is about the disk
            raise DeployError(f'{path}: ONNX Runtime cannot quantise it: {first_line(error)}') from error
        write_metadata(
            unfinished, {**read_metadata(path), 'int8': {'pictures': sum(len(as_tuple(batch)[0]) for batch in batches)}}
        )
    return out
