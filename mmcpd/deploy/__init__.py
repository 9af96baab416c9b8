"""ONNX: export a model, compare the file with torch, measure files side by side, report."""

from __future__ import annotations

from mmcpd.compat import require

require('deploy')

from mmcpd.deploy.detections import check_detections  # noqa: E402
from mmcpd.deploy.graph import ClassMap, Normalization, Scores, WholeForward  # noqa: E402
from mmcpd.deploy.latency import Latency, measure_latency  # noqa: E402
from mmcpd.deploy.metadata import read_metadata  # noqa: E402
from mmcpd.deploy.onnx import Exporter, export_onnx  # noqa: E402
from mmcpd.deploy.parity import Parity, check_parity  # noqa: E402
from mmcpd.deploy.report import Report, deploy  # noqa: E402
from mmcpd.deploy.timed import Promise, promise_of, times_of, with_latency, with_times  # noqa: E402
from mmcpd.deploy.times import Times  # noqa: E402
from mmcpd.errors import DeployError  # noqa: E402

__all__ = [
    'ClassMap',
    'DeployError',
    'Exporter',
    'Latency',
    'Normalization',
    'Parity',
    'Promise',
    'Report',
    'Scores',
    'Times',
    'WholeForward',
    'check_detections',
    'check_parity',
    'deploy',
    'export_onnx',
    'measure_latency',
    'promise_of',
    'read_metadata',
    'times_of',
    'with_latency',
    'with_times',
]
