"""ONNX files that hold what comes before and after the model, and `mmcpd test` on them."""

from __future__ import annotations

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config
from mmpretrain.models import ImageClassifier
from mmpretrain.registry import MODELS

from mmcpd.cli.whole_file import WholeFile
from mmcpd.deploy import read_metadata
from mmcpd.deploy.metadata import write_metadata
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.passes import DEPLOYED
from mmcpd.engine.slim_file import save_slim
from mmcpd.slim import slim, structure

ROOT = Path(__file__).resolve().parents[2]
SCENES = f"""
_base_ = {str(ROOT)!r} + '/configs/_base_/datasets/digit_scenes.py'
default_scope = 'mmseg'
norm = dict(type='BN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', mean=[90, 110, 128], std=[60, 70, 80], bgr_to_rgb=True),
    backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8, norm_cfg=norm),
    decode_head=dict(
        type='FCNHead', in_channels=64, in_index=3, channels=16, num_convs=1, num_classes=11, norm_cfg=norm,
        init_cfg=dict(type='Normal', std=0.5, override=dict(name='conv_seg')),
    ),
    test_cfg=dict(mode='whole'),
)
train_dataloader = dict(batch_size=2, dataset=dict(length=8))
val_dataloader = dict(batch_size=2, dataset=dict(length=6))
test_dataloader = dict(batch_size=4, dataset=dict(length=6))
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
"""


def save_half(config):
    """Write run/slim.pth beside a config, with half of each group's units, weights at random."""
    torch.manual_seed(1)
    cfg = Config.fromfile(config)
    dense = build_dense(cfg)
    dense.init_weights()
    coupling = comb_by_config(dense, cfg)
    keep = coupling.keep()
    for units in keep.values():
        units[len(units) // 2 :] = False
    small = slim(dense, coupling, keep)
    path = config.parent / 'run' / 'slim.pth'
    costs = {'dense': {'macs': 200, 'metrics': {'top1': 1.0}}, 'slim': {'macs': 50, 'metrics': {'top1': 0.5}}}
    save_slim(path, small, structure(dense, small), costs)
    return path


@pytest.fixture
def scenes(tmp_path):
    file = tmp_path / 'scenes.py'
    file.write_text(SCENES)
    return file


def export(tool, config, checkpoint, *options):
    code, out, err = tool('deploy', config, checkpoint, '--no-bench', '--opset', 17, *options)
    assert code == 0, err
    return out


def predictions(tool, config, file, key):
    """Return what testing predicts for each picture, (N, ...), and its metrics."""
    code, out, err = tool('test', config, file, '--out', 'found.pkl')
    assert code == 0, err
    with open('found.pkl', 'rb') as content:
        samples = pickle.load(content)
    rows = [sample[key] for sample in samples]
    rows = [row['data'] if isinstance(row, dict) else row for row in rows]
    return np.stack([np.asarray(row) for row in rows]), re.findall(r'^(\S+): ([\d.]+)$', out, re.M)


@pytest.mark.parametrize('options', [(), ('--preprocess', '--postprocess', '--batch-static', '--batch', 5)])
def test_a_classifiers_file_is_tested_as_its_model(tool, tiny, options):
    checkpoint = save_half(tiny)
    export(tool, tiny, checkpoint, *options)
    expected, metrics = predictions(tool, tiny, checkpoint, 'pred_score')
    assert expected.shape == (32, 10) and len(metrics) > 0
    found, same = predictions(tool, tiny, checkpoint.with_name('slim.onnx'), 'pred_score')
    assert np.abs(found - expected).max() < 1e-4
    assert same == metrics
    other, _ = predictions(tool, tiny, checkpoint.with_name('dense.onnx'), 'pred_score')
    assert np.abs(other - expected).max() > 1e-3


@pytest.mark.parametrize('options', [(), ('--preprocess', '--postprocess')])
def test_a_segmentors_file_is_tested_as_its_model(tool, scenes, options):
    checkpoint = save_half(scenes)
    export(tool, scenes, checkpoint, '--size-dynamic', *options)
    expected, metrics = predictions(tool, scenes, checkpoint, 'pred_sem_seg')
    assert len(np.unique(expected)) > 1 and len(metrics) > 0
    found, same = predictions(tool, scenes, checkpoint.with_name('slim.onnx'), 'pred_sem_seg')
    assert (found != expected).mean() < 1e-3
    assert [name for name, _ in same] == [name for name, _ in metrics]
    other, _ = predictions(tool, scenes, checkpoint.with_name('dense.onnx'), 'pred_sem_seg')
    assert (other != expected).mean() > 0.05


def test_a_file_is_tested_where_hooks_copy_the_model(tool, tiny):
    path = save_half(tiny)
    export(tool, tiny, path)
    expected, plain = predictions(tool, tiny, path.with_name('slim.onnx'), 'pred_score')
    tiny.write_text(tiny.read_text() + "\ncustom_hooks = [dict(type='EMAHook', momentum=0.1)]\n")
    found, averaged = predictions(tool, tiny, path.with_name('slim.onnx'), 'pred_score')
    assert plain and averaged == plain and np.array_equal(found, expected)


def test_an_application_needs_the_file_alone(tool, scenes):
    """The file on raw pictures is what the package's own preprocessor and predictions make of them."""
    checkpoint = save_half(scenes)
    export(tool, scenes, checkpoint, '--preprocess', '--postprocess', '--size-dynamic')
    file = checkpoint.with_name('slim.onnx')
    facts = read_metadata(file)
    assert facts['classes'] == ['background', *'0123456789']
    assert facts['input'] == {'layout': 'NCHW', 'dtype': 'uint8', 'channels': 'RGB', 'size': None}
    assert facts['output'] == 'labels'
    assert facts['normalization'] == {'mean': [90, 110, 128], 'std': [60, 70, 80], 'flip': False, 'inside': True}
    assert facts['kept'].keys() == {'macs', 'params'} and facts['kept']['macs'] == 0.25
    assert 0.1 < facts['kept']['params'] < 0.5
    cfg = Config.fromfile(scenes)
    model = load_slim(cfg, checkpoint).eval()
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for size in ((96, 96), (128, 64)):
        bgr = torch.randint(256, (1, 3, *size), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        with torch.no_grad():
            inputs = model.data_preprocessor({'inputs': [*bgr]}, False)['inputs']
            expected = model(inputs, mode='predict')[0].pred_sem_seg.data.numpy()
        (found,) = session.run(None, {'input': bgr.flip(1).numpy()})
        assert (found != expected).mean() < 1e-3
        (swapped,) = session.run(None, {'input': bgr.numpy()})
        assert (swapped != expected).mean() > 0.01


def test_a_file_that_does_not_normalise_says_what_it_takes(tool, tiny):
    checkpoint = save_half(tiny)
    export(tool, tiny, checkpoint)
    facts = read_metadata(checkpoint.with_name('slim.onnx'))
    assert facts['input']['dtype'] == 'float32' and facts['input']['size'] == [32, 32]
    assert facts['input']['channels'] == 'as in the data set'  # the digits' preprocessor turns nothing
    assert facts['normalization']['inside'] is False and facts['normalization']['std'] == [90.7] * 3
    assert read_metadata(checkpoint.with_name('dense.onnx'))['kept'] == {'params': 1.0}


@pytest.mark.parametrize(
    ('turning', 'first', 'channels', 'plain'),
    [
        ({'to_rgb': True}, [], 'RGB', 'RGB'),
        ({'to_rgb': False}, [{'type': 'LoadImageFromFile'}], 'RGB', 'BGR'),
        ({'to_rgb': False}, [], 'as in the data set', 'as in the data set'),
    ],
)
def test_the_order_of_channels_follows_from_the_config(tiny, turning, first, channels, plain):
    cfg = Config.fromfile(tiny)
    cfg.data_preprocessor.update(turning)
    cfg.model.data_preprocessor = dict(type='ClsDataPreprocessor', mean=[10, 20, 30], std=[1, 2, 4], **turning)
    cfg.test_dataloader.dataset.pipeline = [*first, *cfg.test_dataloader.dataset.pipeline]
    model = build_dense(cfg).eval()
    loaded = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    seen = model.data_preprocessor({'inputs': [*loaded]}, False)['inputs']
    for preprocess, expected in ((True, channels), (False, plain)):
        args = argparse.Namespace(
            preprocess=preprocess, postprocess=False, boxes=False, size_dynamic=False, checkpoint='none'
        )
        whole = WholeFile.of(cfg, model, seen, DEPLOYED, args)
        assert whole.facts['input']['channels'] == expected
        taken = whole.taken([seen])[0]
        if preprocess:
            is_bgr = turning['to_rgb'] or bool(first)  # as it is loaded; the file takes RGB
            assert torch.equal(taken, loaded.flip(1) if is_bgr else loaded)
            assert torch.allclose(whole.before(taken), seen)
        else:
            assert torch.equal(taken, seen)


def test_scores_of_several_labels_are_sigmoids(tool, tiny):
    tiny.write_text(tiny.read_text().replace("'LinearClsHead'", "'MultiLabelLinearClsHead'") + MULTI)
    checkpoint = save_half(tiny)
    export(tool, tiny, checkpoint, '--postprocess')
    assert read_metadata(checkpoint.with_name('slim.onnx'))['output'] == 'sigmoid'


MULTI = """
model['head'].pop('loss')
"""


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--preprocess', '--cfg-options', 'data_preprocessor.pad_size_divisor=48'], 'does more than normalise'),
        (['--int8', '--random-input'], 'calibrated on pictures'),
        (['--boxes', '--postprocess'], 'not for files with boxes'),
        (['--int8', '--calibrate', '0'], '--calibrate must be 1 or more, not 0'),
    ],
)
def test_what_no_file_can_hold_is_refused_in_one_line(tool, tiny, options, message):
    checkpoint = save_half(tiny)
    code, _, err = tool('deploy', tiny, checkpoint, *options)
    assert code == 1 and message in err and len(err.strip().splitlines()) == 1, err
    assert [path.name for path in checkpoint.parent.iterdir()] == ['slim.pth']


def test_pictures_that_nothing_normalises_are_taken_as_they_are(tool, tiny):
    plain = '\ndata_preprocessor = dict(_delete_=True, num_classes=10)\n'
    tiny.write_text(tiny.read_text() + plain)
    checkpoint = save_half(tiny)
    export(tool, tiny, checkpoint, '--preprocess')
    facts = read_metadata(checkpoint.with_name('slim.onnx'))
    assert facts['input']['dtype'] == 'uint8'
    assert (facts['normalization']['mean'], facts['normalization']['std']) == ([0.0] * 3, [1.0] * 3)
    expected, metrics = predictions(tool, tiny, checkpoint, 'pred_score')
    found, same = predictions(tool, tiny, checkpoint.with_name('slim.onnx'), 'pred_score')
    assert np.abs(found - expected).max() < 1e-4 and same == metrics


def test_windows_that_slide_are_no_part_of_a_file(tool, scenes):
    checkpoint = save_half(scenes)
    sliding = [f'model.test_cfg.{each}' for each in ('mode=slide', 'crop_size=(16,16)', 'stride=(8,8)')]
    code, _, err = tool('deploy', scenes, checkpoint, '--postprocess', '--no-bench', '--cfg-options', *sliding)
    assert code == 1 and 'by windows that slide over a picture' in err and 'model.test_cfg.mode=whole' in err, err


class Headless(ImageClassifier):
    """A classifier whose features are the predictions."""

    def __init__(self, head, **options):
        super().__init__(**options)


class Strange(ImageClassifier):
    """A classifier that predicts past its head."""

    def predict(self, inputs, data_samples=None, **_):
        return [sample.set_pred_score(torch.ones(10) / 10).set_pred_label(0) for sample in data_samples]


def test_files_that_cannot_be_tested_are_refused_in_one_line(tool, tiny):
    checkpoint = save_half(tiny)
    export(tool, tiny, checkpoint)
    file = checkpoint.with_name('slim.onnx')
    for kind in (Headless, Strange):
        MODELS.register_module(name=kind.__name__, module=kind, force=True)
        code, _, err = tool('test', tiny, file, '--cfg-options', f'model.type={kind.__name__}')
        assert code == 1 and f'{kind.__name__} is none; test its slim.pth' in err, err
    code, _, err = tool('test', tiny, file, '--cfg-options', 'test_dataloader.dataset.size=40')
    assert code == 1 and 'export it with --shape or --size-dynamic' in err, err
    bare = onnx.load(file)
    del bare.metadata_props[:]
    onnx.save(bare, file)
    code, _, err = tool('test', tiny, file)
    assert code == 1 and 'mmcpd did not write it' in err, err
    for given in ({'inside': True}, 'damaged', {'inside': True, 'mean': [0.0], 'std': [1.0], 'flip': False}):
        write_metadata(file, {'output': 'logits', 'normalization': given})
        code, _, err = tool('test', tiny, file)
        assert code == 1 and 'what it says of its normalisation is damaged' in err, err


def test_int8_files_lie_beside_the_others_and_are_tested(tool, tiny):
    checkpoint = save_half(tiny)
    out = export(tool, tiny, checkpoint, '--int8', '--calibrate', 16, '--preprocess')
    assert 'slim-int8' in out
    names = sorted(path.name for path in checkpoint.parent.iterdir())
    assert names == ['dense-int8.onnx', 'dense.onnx', 'latency.json', 'slim-int8.onnx', 'slim.onnx', 'slim.pth']
    expected, _ = predictions(tool, tiny, checkpoint, 'pred_score')
    found, _ = predictions(tool, tiny, checkpoint.with_name('slim-int8.onnx'), 'pred_score')
    assert 1e-6 < np.abs(found - expected).max() < 0.1
