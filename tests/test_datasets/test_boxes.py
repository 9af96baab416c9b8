"""Scenes with boxes: reproducible, boxed where the ink is, usable by mmdet's pipelines and metric."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

import mmcpd.engine  # noqa: F401 - operators that mmdet imports
from mmcpd.datasets import DigitBoxesDataset
from mmcpd.datasets.boxes import MAX_OVERLAP, compose_boxes, overlap

pytest.importorskip('mmdet', reason='mmdet is not installed: pip install .[detection]')
BASE = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'datasets'


@pytest.fixture
def scope():
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def boxes_of(results: dict) -> np.ndarray:
    return results['gt_bboxes'].numpy()


def test_a_scene_depends_on_seed_split_and_index_alone():
    one, two = DigitBoxesDataset('train', length=5), DigitBoxesDataset('train', length=9)
    for index in (4, 0, 2):
        assert np.array_equal(one[index]['img'], two[index]['img'])
        assert np.array_equal(boxes_of(one[index]), boxes_of(two[index]))
    others = (two[1], DigitBoxesDataset('train', length=5, seed=1)[0], DigitBoxesDataset('val', length=5)[0])
    for other in others:
        assert not np.array_equal(one[0]['img'], other['img'])
    assert np.array_equal(DigitBoxesDataset('train', length=9, indices=[7])[0]['img'], two[7]['img'])


def test_all_classes_and_many_sizes_appear_beside_each_other():
    data = DigitBoxesDataset('train', length=150, size=(96, 128))
    scenes = [data[index] for index in range(150)]
    assert data[0]['img'].shape == (96, 128, 3) and data.metainfo['synthetic'] is True
    labels = np.concatenate([each['gt_bboxes_labels'] for each in scenes])
    assert np.bincount(labels, minlength=10).min() > 15 and len(data.metainfo['classes']) == 10
    boxes = np.concatenate([boxes_of(each) for each in scenes])
    heights = boxes[:, 3] - boxes[:, 1]
    assert (boxes >= 0).all() and (boxes[:, 2] <= 128).all() and (boxes[:, 3] <= 96).all()
    assert heights.min() < 20 and heights.max() > 40 and (boxes[:, 2] > boxes[:, 0]).all()
    pairs = [(a, b) for each in scenes for i, a in enumerate(boxes_of(each)) for b in boxes_of(each)[:i]]
    assert len(pairs) > 200 and max(overlap(a, b) for a, b in pairs) <= MAX_OVERLAP
    assert data.get_cat_ids(3) == scenes[3]['gt_bboxes_labels'].tolist()


def test_boxes_are_those_of_the_ink():
    """A full square differs from the paper in brightness exactly where it is boxed."""
    for seed in range(5):
        square = np.ones((1, 8, 8), dtype=np.float32), np.array([6])
        scene = compose_boxes(*square, np.random.default_rng(seed), (64, 64), count=(1, 1), scale=(0.4, 0.4))
        assert scene.labels.tolist() == [6]
        grey = scene.image.astype(float).mean(-1)
        dark = grey < 127
        ink = dark if dark.mean() < 0.5 else ~dark
        rows, columns = np.nonzero(ink)
        found = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(scene.boxes[0] - found).max() <= 2
        assert np.abs(scene.boxes[0] - found[::-1]).max() > 2, 'the check can fail'


def test_digits_too_small_to_be_seen_are_left_out():
    scene = compose_boxes(np.ones((1, 8, 8)), np.array([1]), np.random.default_rng(0), (64, 64), (2, 2), (1e-3, 1e-3))
    assert scene.boxes.shape == (0, 4) and scene.labels.shape == (0,)


def test_mmdet_s_transforms_move_picture_and_boxes_alike(scope):
    plain = DigitBoxesDataset('train', length=3)
    pipeline = [dict(type='RandomFlip', prob=1.0), dict(type='Resize', scale=(256, 256)), dict(type='PackDetInputs')]
    for index in range(3):
        packed = DigitBoxesDataset('train', length=3, pipeline=pipeline)[index]
        assert packed['inputs'].shape == (3, 256, 256)
        left, top, right, bottom = 2 * boxes_of(plain[index]).T
        moved = packed['data_samples'].gt_instances.bboxes.numpy()
        assert np.allclose(moved, np.stack([256 - right, top, 256 - left, bottom], 1))
        assert packed['data_samples'].gt_instances.labels.tolist() == plain[index]['gt_bboxes_labels'].tolist()


def test_the_base_config_feeds_mmdet_and_the_coco_metric_marks_its_figures(scope):
    cfg = Config.fromfile(BASE / 'digit_boxes.py')
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    assert len(batch['inputs']) == 8 and batch['inputs'][0].shape == (3, 128, 128)
    found = {moved: coco(cfg, moved) for moved in (0, 4, 100)}
    assert found[0]['synthetic/bbox_mAP'] == 1.0
    assert 0 < found[4]['synthetic/bbox_mAP'] < 0.8 and found[100]['synthetic/bbox_mAP'] < 0.05


def coco(cfg: Config, moved: int) -> dict[str, float]:
    """Evaluate predictions that are the true boxes, moved by some pixels."""
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Runner.build_evaluator(None, cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    samples = next(iter(loader))['data_samples']
    for sample in samples:
        true = sample.gt_instances
        boxes = true.bboxes.tensor + moved
        sample.pred_instances = InstanceData(bboxes=boxes, labels=true.labels, scores=torch.ones(len(boxes)))
    evaluator.process(samples)
    return evaluator.evaluate(len(samples))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'train' or 'val', not 'test'"):
        DigitBoxesDataset('test')


def test_without_mmdet_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'mmdet.structures.bbox', None)
    with pytest.raises(ImportError, match=r"pip install 'mmcpd\[detection\]'"):
        DigitBoxesDataset('val')
