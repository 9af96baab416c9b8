"""The tools on detectors of mmdet that have no data here."""

from __future__ import annotations

import json

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config

from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.slim_file import save_slim
from mmcpd.slim import slim, structure
from mmcpd.slim.trial import random_keep

pytest.importorskip('mmdet', reason='mmdet is not installed')

from tests.test_engine.test_detectors import DETECTORS

RESIZE = dict(type='Resize', scale=(96, 64), keep_ratio=True)


def write(tmp_path, name, *transforms):
    data = dict(type='CocoDataset', data_root='nowhere/', ann_file='none.json', pipeline=list(transforms))
    loader = dict(batch_size=1, num_workers=0, dataset=data, sampler=dict(type='DefaultSampler', shuffle=False))
    path = tmp_path / f'{name}.py'
    Config(dict(model=DETECTORS[name](), default_scope='mmdet', test_dataloader=loader)).dump(str(path))
    return path


@pytest.mark.parametrize('name', ['retinanet', 'faster_rcnn', 'detr'])
def test_detectors_are_combed_at_the_size_of_their_pipeline(tool, tmp_path, name):
    file = tmp_path / 'coupling.json'
    code, out, err = tool('comb', write(tmp_path, name, RESIZE), '--json', file)
    assert code == 0, err
    assert 'backbone.layer1.0.conv1' in out
    assert 'loading annotations' not in out
    assert json.loads(file.read_text())['groups'][0]['name'] == 'backbone.conv1'


@pytest.mark.filterwarnings('ignore:gauss_newton counts each batch as one sample')
@pytest.mark.parametrize('name', ['retinanet', 'faster_rcnn', 'detr'])
def test_detectors_are_pruned_at_once_and_taught_by_pictures_alone(tool, tmp_path, name):
    config = write(tmp_path, name, RESIZE, dict(type='PackDetInputs'))
    with config.open('a') as file:
        file.write("optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.001))\n")
    torch.manual_seed(0)
    torch.save({'state_dict': build_dense(Config.fromfile(config)).state_dict()}, tmp_path / 'dense.pth')
    (tmp_path / 'pictures').mkdir()
    for number in range(4):
        drawn = np.random.default_rng(number).integers(0, 255, (64, 96, 3), np.uint8)
        cv2.imwrite(str(tmp_path / 'pictures' / f'{number}.png'), drawn)
    options = ('--target', 'macs=0.7', '--images', tmp_path / 'pictures', '--distill', 2, '--no-validate')
    code, out, err = tool('prune', config, tmp_path / 'dense.pth', *options, '--out', tmp_path / 'out')
    assert code == 0, err
    found = json.loads((tmp_path / 'out' / 'prune.json').read_text())
    assert found['slim']['macs'] <= 0.7 * found['dense']['macs']
    assert 'layers refitted' in out and ('rotated 10 heads of 5 attentions' in out) == (name == 'detr')
    small = load_slim(config, tmp_path / 'out' / 'slim.pth')
    assert sum(parameter.numel() for parameter in small.parameters()) == found['slim']['params']


def test_a_detector_of_unknown_size_says_which_option_gives_it(tool, tmp_path):
    code, _, err = tool('comb', write(tmp_path, 'retinanet'))
    assert code == 1
    assert 'no transform fixes the size of the pictures' in err.splitlines()[-1]
    code, out, _ = tool('comb', write(tmp_path, 'retinanet'), '--shape', 3, 64, 64)
    assert code == 0
    assert 'bbox_head.cls_convs.0.conv' in out


@pytest.fixture
def slim_checkpoint(tmp_path):
    """Return `save(config file)`, which saves half of a detector and returns the path."""

    def save(file):
        cfg = Config.fromfile(file)
        torch.manual_seed(0)
        dense = build_dense(cfg)
        coupling = comb_by_config(dense, cfg)
        small = slim(dense, coupling, random_keep(coupling, 0.5, 0))
        save_slim(tmp_path / 'run' / 'slim.pth', small, structure(dense, small), {})
        return tmp_path / 'run' / 'slim.pth'

    return save


OPTIONS = ('--random-input', '--batch', 2, '--no-bench')


@pytest.mark.parametrize('name', ['retinanet', pytest.param('detr', marks=pytest.mark.slow)])
def test_a_detector_is_deployed_with_its_maps_or_its_boxes(tool, tmp_path, slim_checkpoint, name):
    file = write(tmp_path, name, RESIZE)
    checkpoint = slim_checkpoint(file)
    for options in ((), ('--boxes',)):
        code, _, err = tool('deploy', file, checkpoint, *OPTIONS, *options)
        assert code == 0, err
        models = json.loads((checkpoint.parent / 'latency.json').read_text())['models']
        assert models[1]['parity']['batches'][0][0] == 2
        outputs = [each.name for each in onnx.load(checkpoint.parent / 'slim.onnx').graph.output]
        assert (len(outputs) == 3) == bool(options) or name == 'detr'


@pytest.mark.parametrize(
    ('name', 'options', 'says'),
    [
        ('faster_rcnn', (), 'no boxes can be exported of a FasterRCNN: its boxes are not those of one dense head'),
        ('retinanet', ('--batch-dynamic',), '--boxes: the batch size of a file with boxes is fixed'),
    ],
)
def test_boxes_that_cannot_be_had_are_refused_in_one_line(tool, tmp_path, slim_checkpoint, name, options, says):
    file = write(tmp_path, name, RESIZE)
    code, _, err = tool('deploy', file, slim_checkpoint(file), *OPTIONS, '--boxes', *options)
    assert code == 1
    assert says in err.splitlines()[-1]
    assert not (tmp_path / 'run' / 'slim.onnx').exists()
