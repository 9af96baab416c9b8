"""Scenes: reproducible, labelled pixel by pixel, usable by mmseg's pipelines and metric."""

from __future__ import annotations

from pathlib import Path

import mmseg.datasets
import mmseg.evaluation
import mmseg.models  # noqa: F401 - registers
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import PixelData

from mmcpd.datasets import DigitScenesDataset, scenes
from mmcpd.datasets.scenes import compose

BASE = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'datasets'


@pytest.fixture
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


def test_a_scene_depends_on_seed_split_and_index_alone():
    one, two = DigitScenesDataset('train', length=5), DigitScenesDataset('train', length=9)
    for index in (4, 0, 2):
        assert np.array_equal(one[index]['img'], two[index]['img'])
        assert np.array_equal(one[index]['gt_seg_map'], two[index]['gt_seg_map'])
    others = (two[1], DigitScenesDataset('train', length=5, seed=1)[0], DigitScenesDataset('val', length=5)[0])
    for other in others:
        assert not np.array_equal(one[0]['gt_seg_map'], other['gt_seg_map'])
    assert np.array_equal(two[-1]['img'], two[8]['img'])
    assert np.array_equal(DigitScenesDataset('train', length=9, indices=[7])[0]['img'], two[7]['img'])


def test_training_and_validation_use_different_digits():
    train, val = DigitScenesDataset('train', length=1), DigitScenesDataset('val', length=1)
    assert not {x.tobytes() for x in train.digits[0]} & {x.tobytes() for x in val.digits[0]}


def test_all_classes_appear_and_the_background_does_not_drown_them():
    data = DigitScenesDataset('train', length=60, size=(64, 80))
    assert data[0]['img'].shape == (64, 80, 3)
    share = np.bincount(np.stack([data[i]['gt_seg_map'] for i in range(60)]).ravel(), minlength=11) / (60 * 64 * 80)
    assert len(share) == len(data.metainfo['classes']) == len(data.metainfo['palette']) == 11
    assert 0.5 < share[0] < 0.85
    assert share[1:].min() > 0.005
    assert data.metainfo['synthetic'] is True


def square(label: int) -> tuple[np.ndarray, np.ndarray]:
    return np.ones((1, 8, 8), dtype=np.float32), np.array([label])


def test_labels_lie_where_the_ink_is():
    """A full square differs from the paper in brightness exactly where it is labelled."""
    for seed in range(5):
        scene = compose(*square(6), np.random.default_rng(seed), size=(64, 64), count=(1, 1), scale=(0.4, 0.4))
        inside = scene.labels == 7
        assert set(np.unique(scene.labels)) == {0, 7}
        assert 0.1 * 64**2 < inside.sum() < 0.2 * 64**2
        grey = scene.image.mean(-1)
        guessed = (grey > 127) if grey[inside].mean() > 127 else (grey < 127)
        assert (guessed == inside).mean() > 0.97
        assert (guessed == np.roll(inside, 12, 0)).mean() < 0.95


def test_later_digits_cover_earlier_ones(monkeypatch):
    left, right = np.zeros((2, 12, 12), dtype=np.float32)
    left[:, :8], right[:, 4:] = 1, 1
    pictures = iter([left, right])
    monkeypatch.setattr(scenes, 'placed', lambda *_: next(pictures))
    scene = compose(np.ones((2, 8, 8)), np.array([3, 3]), np.random.default_rng(0), (12, 12), count=(2, 2))
    assert (scene.labels == 4).all()
    columns = scene.image.astype(float).mean((0, 2))
    assert np.ptp(columns[:4]) < 20
    assert np.ptp(columns[4:]) < 20
    assert abs(columns[:4].mean() - columns[4:].mean()) > 5


def test_mmseg_transforms_move_picture_and_labels_alike(scope):
    plain = DigitScenesDataset('train', length=3)
    flip = dict(type='RandomFlip', prob=1.0)
    for index in range(3):
        flipped = DigitScenesDataset('train', length=3, pipeline=[flip])[index]
        assert np.array_equal(flipped['img'], plain[index]['img'][:, ::-1])
        assert np.array_equal(flipped['gt_seg_map'], plain[index]['gt_seg_map'][:, ::-1])
    pipeline = [dict(type='RandomCrop', crop_size=(48, 32), cat_max_ratio=0.9), dict(type='PackSegInputs')]
    packed = DigitScenesDataset('train', length=3, pipeline=pipeline)[0]
    assert packed['inputs'].shape == (3, 48, 32)
    assert packed['data_samples'].gt_sem_seg.data.shape == (1, 48, 32)


def test_the_base_config_feeds_mmseg_and_marks_its_figures(scope):
    cfg = Config.fromfile(BASE / 'digit_scenes.py')
    batch = next(iter(Runner.build_dataloader(cfg.train_dataloader, seed=0)))
    assert len(batch['inputs']) == 16
    assert batch['inputs'][0].shape == (3, 96, 96)
    loader = Runner.build_dataloader(cfg.test_dataloader)
    evaluator = Runner.build_evaluator(None, cfg.test_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    samples = next(iter(loader))['data_samples']
    for wrong, check in ((0, lambda x: x == 100), (1, lambda x: x < 60)):
        for sample in samples:
            sample.pred_sem_seg = PixelData(data=torch.roll(sample.gt_sem_seg.data, 8 * wrong, dims=-1))
        evaluator.process(samples)
        assert check(evaluator.evaluate(len(samples))['synthetic/mIoU'])


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(split='test'), "'train' or 'val', not 'test'"),
        (dict(length=0), 'length is at least 1'),
        (dict(size=4), 'size at least 8'),
        (dict(count=(3, 2)), 'count and scale'),
        (dict(scale=(0.0, 0.5)), 'count and scale'),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DigitScenesDataset(**arguments)
