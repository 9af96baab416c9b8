"""Other runtimes compute what the slim model computes: the code of docs/runtimes.md on files of both exporters."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.registry import MODELS, DefaultScope

from mmcpd.comb import comb
from mmcpd.deploy import Exporter, export_onnx, read_metadata
from mmcpd.deploy.onnx import outputs_of
from mmcpd.slim import slim
from mmcpd.slim.trial import random_keep, randomised

PAGE = Path(__file__).parents[2] / 'docs' / 'runtimes.md'
EXACT, CONTROL = 1e-5, 1e-2  # relative to the largest output, float32
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
BACKBONE = dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, style='pytorch')
CLASSIFIER = dict(
    type='ImageClassifier', backbone=BACKBONE, neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
)  # fmt: skip
SEGMENTOR = dict(
    type='EncoderDecoder',
    backbone=dict(type='MixVisionTransformer', embed_dims=16, num_layers=[1] * 4, num_heads=[1, 2, 2, 4],
                  sr_ratios=[8, 4, 2, 1], mlp_ratio=2),
    decode_head=dict(type='SegformerHead', in_channels=[16, 32, 32, 64], in_index=[0, 1, 2, 3], channels=32,
                     num_classes=5, norm_cfg=dict(type='BN'),
                     loss_decode=dict(type='CrossEntropyLoss', avg_non_ignore=True)),
    test_cfg=dict(mode='whole'),
)  # fmt: skip
DETECTOR = dict(
    type='RetinaNet', backbone={**BACKBONE, 'out_indices': (1, 2, 3)},
    neck=dict(type='FPN', in_channels=[16, 32, 64], out_channels=16, num_outs=3),
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=2,
        anchor_generator=dict(type='AnchorGenerator', scales=[4], ratios=[0.5, 1.0], strides=[8, 16, 32]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
    ),
)  # fmt: skip
MODELS_BY_SCOPE = {'mmpretrain': CLASSIFIER, 'mmseg': SEGMENTOR, 'mmdet': DETECTOR}
ONE_OF_EACH = pytest.mark.parametrize('scope', MODELS_BY_SCOPE)
BOTH = pytest.mark.parametrize(
    'exporter', [Exporter.TORCHSCRIPT, pytest.param(Exporter.TORCH_EXPORT, marks=pytest.mark.slow)]
)


class Exported:
    """Hold a slim model's file, and what the slim model and the dense one return for `IMAGES`."""

    def __init__(self, scope: str, exporter: Exporter, folder: Path) -> None:
        if scope == 'mmdet':
            pytest.importorskip('mmdet.models', reason='mmdet is not installed: pip install .[detection]')
        torch.manual_seed(0)
        with DefaultScope.overwrite_default_scope(scope):
            dense = randomised(MODELS.build(ConfigDict(MODELS_BY_SCOPE[scope]))).float().eval()
        coupling = comb(dense, IMAGES)
        small = slim(dense, coupling, random_keep(coupling, 0.6, 0)).eval()
        self.path = export_onnx(small, IMAGES, folder / 'slim.onnx', exporter=exporter, metadata={'classes': ['a']})
        with torch.no_grad():
            self.small, self.dense = ([x.numpy() for x in outputs_of(net(IMAGES))] for net in (small, dense))


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    made: dict[tuple[str, Exporter], Exported] = {}

    def get(scope: str, exporter: Exporter) -> Exported:
        if (scope, exporter) not in made:
            made[scope, exporter] = Exported(scope, exporter, tmp_path_factory.mktemp(f'{scope}-{exporter.name}'))
        return made[scope, exporter]

    return get


@pytest.fixture
def run_page(monkeypatch) -> Callable[..., list[np.ndarray]]:
    """Return what runs the code below a heading of the page beside a file, and returns its outputs."""

    def run(runtime: str, path: Path, changed: tuple[str, str] = ('', '')) -> list[np.ndarray]:
        section = PAGE.read_text().split(f'\n## {runtime}\n')[1].split('\n## ')[0]
        (code,) = re.findall(r'```python\n(.*?)```', section, re.DOTALL)
        assert changed[0] in code
        names: dict[str, Any] = {'pictures': IMAGES.numpy()}
        monkeypatch.chdir(path.parent)
        exec(compile(code.replace(*changed), f'{PAGE}: {runtime}', 'exec'), names)
        return names['outputs']

    return run


def gap(left: list[np.ndarray], right: list[np.ndarray]) -> float:
    assert [x.shape for x in left] == [x.shape for x in right]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(left, right, strict=True))


def check(outputs: list[np.ndarray], found: Exported) -> None:
    assert gap(outputs, found.small) <= EXACT
    assert gap(outputs, found.dense) > CONTROL, 'the dense model would pass as well'


@ONE_OF_EACH
@BOTH
def test_onnxslim(scope, exporter, exported, run_page):
    pytest.importorskip('onnxslim', reason='onnxslim is not installed: pip install onnxslim')
    found = exported(scope, exporter)
    check(run_page('onnxslim', found.path), found)
    less = found.path.with_name('slimmer.onnx')
    before, after = (onnx.load(path).graph.node for path in (found.path, less))
    assert len(after) <= len(before)
    assert any(node.metadata_props for node in before) == (exporter is Exporter.TORCH_EXPORT)
    assert not any(node.metadata_props for node in after)
    assert exporter is Exporter.TORCHSCRIPT or less.stat().st_size < 0.8 * found.path.stat().st_size
    assert read_metadata(less) == read_metadata(found.path)
    assert read_metadata(less)['classes'] == ['a']


@ONE_OF_EACH
@BOTH
def test_openvino(scope, exporter, exported, run_page):
    pytest.importorskip('openvino', reason='openvino is not installed: pip install openvino')
    found = exported(scope, exporter)
    check(run_page('OpenVINO', found.path), found)


@ONE_OF_EACH
@BOTH
def test_ncnn(scope, exporter, exported, run_page):
    for package in ('ncnn', 'pnnx'):
        pytest.importorskip(package, reason=f'{package} is not installed: pip install {package}')
    found = exported(scope, exporter)
    check(run_page('ncnn', found.path), found)
    weights = found.path.with_name('slim.ncnn.bin')
    size = weights.stat().st_size
    assert EXACT < gap(run_page('ncnn', found.path, ("'fp16=0'", "'fp16=1'")), found.small) < CONTROL
    assert weights.stat().st_size < 0.6 * size
