"""A detector's ONNX file with boxes, and `mmcpd test` on it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from mmcpd.deploy import read_metadata
from tests.test_tools.test_onnx_file import save_half

pytest.importorskip('mmdet', reason='mmdet is not installed')

ROOT = Path(__file__).resolve().parents[2]
CONFIG = f"""
_base_ = [{str(ROOT)!r} + '/configs/_base_/models/fcos_boxes.py', {str(ROOT)!r} + '/configs/_base_/datasets/digit_boxes.py']
model = dict(
    backbone=dict(base_channels=8, stem_channels=8), neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(
        in_channels=16, feat_channels=16,
        init_cfg=dict(type='Normal', layer='Conv2d', std=0.12, override=dict(type='Normal', name='conv_cls', std=0.6)),
    ),
    test_cfg=dict(score_thr=0.3, max_per_img=20),
)
train_dataloader = dict(batch_size=2, dataset=dict(length=8))
test_dataloader = dict(batch_size=2, dataset=dict(length=5))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
"""  # noqa: E501
WIDER = """
wider = [dict(type='mmdet.Resize', scale=(160, 120), keep_ratio=False)]
test_dataloader['dataset']['pipeline'] = wider + _base_.test_pipeline
"""


@pytest.fixture
def config(tmp_path):
    file = tmp_path / 'detector.py'
    file.write_text(CONFIG)
    return file


def found(tool, config, file):
    """Return the boxes, scores and labels that testing finds in each picture."""
    code, _, err = tool('test', config, file, '--out', 'found.pkl')
    assert code == 0, err
    with open('found.pkl', 'rb') as content:
        samples = pickle.load(content)
    each = [sample['pred_instances'] for sample in samples]
    return [(one['bboxes'].numpy(), one['scores'].numpy(), one['labels'].numpy()) for one in each]


def agree(one, other):
    """Return the share of one's boxes that the other has as well, with the same label."""
    hits = [
        bool(((np.abs(other[0] - box).max(1, initial=0.0) < 1e-2) & (other[2] == label)).any())
        for box, label in zip(one[0], one[2], strict=True)
    ]
    return sum(hits) / max(1, len(hits))


def near(one, other):
    """Return the share of one's boxes that are within three pixels of one of the other's, where padding shows."""
    gaps = np.abs(one[0][:, None] - other[0]).max(2, initial=0.0)
    return float((gaps.min(1, initial=np.inf) < 3).mean()) if len(gaps) else 1.0


def test_a_detectors_file_is_tested_as_its_model(tool, config):
    checkpoint = save_half(config)
    code, _, err = tool('deploy', config, checkpoint, '--no-bench', '--boxes', '--preprocess', '--batch', 2)
    assert code == 0, err
    facts = read_metadata(checkpoint.with_name('slim.onnx'))
    assert facts['output'] == 'boxes, scores, labels' and facts['input']['dtype'] == 'uint8'
    expected = found(tool, config, checkpoint)
    assert len(expected) == 5 and all(len(scores) for _, scores, _ in expected)
    theirs = found(tool, config, checkpoint.with_name('slim.onnx'))
    assert np.mean([agree(*pair) for pair in zip(expected, theirs, strict=True)]) > 0.95
    others = found(tool, config, checkpoint.with_name('dense.onnx'))
    assert np.mean([agree(*pair) for pair in zip(expected, others, strict=True)]) < 0.5


@pytest.mark.slow
def test_a_quantised_file_finds_boxes_too_and_its_parity_is_no_number(tool, config):
    checkpoint = save_half(config)
    code, out, err = tool('deploy', config, checkpoint, '--no-bench', '--boxes', '--int8', '--calibrate', 4)
    assert code == 0, err
    assert 'slim-int8: differs: other objects are found' in out
    text = (checkpoint.parent / 'latency.json').read_text()
    models = json.loads(text, parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))['models']
    assert models[2]['parity']['max_rel'] < 1e-4 and models[3]['parity']['max_rel'] is None
    assert all(len(scores) for _, scores, _ in found(tool, config, checkpoint.with_name('slim-int8.onnx')))


@pytest.mark.slow
def test_smaller_pictures_are_padded_and_boxes_go_back_to_the_pictures_pixels(tool, config):
    checkpoint = save_half(config)
    code, _, err = tool('deploy', config, checkpoint, '--no-bench', '--boxes', '--shape', 160, 192)
    assert code == 0, err
    config.write_text(CONFIG + WIDER)
    expected, theirs = (found(tool, config, checkpoint.with_name(name)) for name in ('slim.pth', 'slim.onnx'))
    for boxes, *_ in theirs:
        assert boxes.min() >= 0 and boxes.max() <= 128 + 1e-3
    assert np.mean([near(*pair) for pair in zip(expected, theirs, strict=True)]) > 0.5


def test_files_that_tell_nothing_of_a_detectors_boxes_are_refused(tool, config, tiny):
    checkpoint = save_half(config)
    assert tool('deploy', config, checkpoint, '--no-bench', '--random-input')[0] == 0
    code, _, err = tool('test', config, checkpoint.with_name('slim.onnx'))
    assert code == 1 and 'export it with --boxes' in err.splitlines()[-1]
    assert tool('deploy', config, checkpoint, '--no-bench', '--boxes', '--shape', 64, 64)[0] == 0
    code, _, err = tool('test', config, checkpoint.with_name('slim.onnx'))
    assert code == 1 and 'export it with --shape' in err.splitlines()[-1]
    code, _, err = tool('test', tiny, checkpoint.with_name('slim.onnx'))
    assert code == 1 and 'is no detector' in err.splitlines()[-1]
    assert torch.is_grad_enabled()
