"""The tools on detectors of mmdet that have no data here."""

from __future__ import annotations

import json

import pytest
from mmengine.config import Config

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


def test_a_detector_of_unknown_size_says_which_option_gives_it(tool, tmp_path):
    code, _, err = tool('comb', write(tmp_path, 'retinanet'))
    assert code == 1
    assert 'no transform fixes the size of the pictures' in err.splitlines()[-1]
    code, out, _ = tool('comb', write(tmp_path, 'retinanet'), '--shape', 3, 64, 64)
    assert code == 0
    assert 'bbox_head.cls_convs.0.conv' in out
