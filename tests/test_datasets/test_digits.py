"""The digits: a fixed split, pictures that show their label, and mmpretrain's and mmseg's registries finding them."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import cv2
import mmpretrain.datasets
import mmpretrain.evaluation
import mmpretrain.models
import mmpretrain.registry
import mmseg.registry
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import ClassBalancedDataset
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from sklearn.datasets import load_digits

from mmcpd.datasets import DigitsDataset
from mmcpd.datasets import digits as module
from mmcpd.datasets.digits import digits, enlarge

BASE = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'datasets'


@pytest.fixture
def scope():
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        yield


def test_the_split_is_disjoint_stratified_and_always_the_same():
    (train, train_labels), (test, test_labels) = digits('train'), digits('test')
    assert (len(train), len(test)) == (1352, 445)
    assert not {x.tobytes() for x in train} & {x.tobytes() for x in test}
    seen, fourth = Counter(), []
    for label in load_digits().target.tolist():
        seen[label] += 1
        if seen[label] % 4 == 0:
            fourth.append(label)
    assert test_labels.tolist() == fourth
    counts = np.bincount(test_labels), np.bincount(train_labels)
    assert ((counts[0] >= 43) & (counts[0] <= 45)).all()
    assert (np.abs(counts[1] / 3 - counts[0]) <= 1).all()


def test_pictures_are_rgb_bytes_made_of_the_grey_digits():
    data = DigitsDataset('test', interpolation='nearest')
    images, labels = digits('test')
    for index in (0, 17, 444):
        info = data[index]
        assert info['img'].dtype == np.uint8
        assert info['img'].shape == (32, 32, 3)
        blocks = np.kron(images[index] * 255, np.ones((4, 4)))[:, :, None]
        assert np.abs(info['img'] - blocks).max() <= 0.5
        assert info['gt_label'] == labels[index]
        assert info['img_shape'] == info['ori_shape'] == (32, 32)
        assert info['sample_idx'] == index
    assert data.metainfo['classes'] == tuple('0123456789')


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_enlarging_keeps_the_range_and_the_middle(interpolation):
    image = digits('train')[0][3]
    large = enlarge(image, (64, 48), interpolation)
    assert large.shape == (64, 48)
    assert large.min() >= 0
    assert large.max() <= 1
    assert np.abs(cv2.resize(large, (8, 8), interpolation=cv2.INTER_AREA) - image).mean() < 0.08


def test_pictures_show_their_label():
    """The nearest class mean tells nine digits in ten, which it cannot with labels moved by one."""
    train, test = DigitsDataset('train', size=16), DigitsDataset('test', size=16)
    x, y = (np.stack([d[i]['img'][:, :, 0].ravel() for i in range(len(d))]).astype(float) for d in (train, test))
    means = np.stack([x[[train.get_cat_ids(i) == [c] for i in range(len(train))]].mean(0) for c in range(10)])
    guessed = ((y[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    labels = np.array([test[i]['gt_label'] for i in range(len(test))])
    assert (guessed == labels).mean() > 0.85
    assert (guessed == np.roll(labels, 1)).mean() < 0.3


@pytest.mark.parametrize('registry', [DATASETS, mmpretrain.registry.DATASETS, mmseg.registry.DATASETS])
def test_every_scope_finds_it(registry):
    assert isinstance(registry.build(dict(type='mmcpd.DigitsDataset', split='test')), DigitsDataset)


def test_indices_and_wrappers_work():
    some = DigitsDataset('train', indices=40)
    assert len(some) == 40
    assert len(ClassBalancedDataset(some, 0.2)) >= 40


def test_the_base_config_feeds_mmpretrain(scope):
    cfg = Config.fromfile(BASE / 'digits.py')
    loader = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    preprocessor = mmpretrain.registry.MODELS.build(
        dict(cfg.data_preprocessor, type='ClsDataPreprocessor', _scope_='mmpretrain')
    )
    pixels, labels = [], []
    for batch in loader:
        data = preprocessor(batch, True)
        assert data['inputs'].shape[1:] == (3, 32, 32)
        labels += [int(sample.gt_label) for sample in data['data_samples']]
    test = Runner.build_dataloader(cfg.test_dataloader)
    for batch in test:
        pixels.append(preprocessor(batch, False)['inputs'])
    pixels = torch.cat(pixels)
    assert len(labels) == 1352
    assert len(pixels) == 445
    assert abs(float(pixels.mean())) < 0.05
    assert abs(float(pixels.std()) - 1) < 0.05


def test_the_base_config_counts_right_and_wrong_answers(scope):
    cfg = Config.fromfile(BASE / 'digits.py')
    data = Runner.build_dataloader(cfg.test_dataloader).dataset
    evaluator = Runner.build_evaluator(None, cfg.test_evaluator)
    for shift, accuracy in ((0, 100.0), (1, 0.0)):
        samples = [data[i]['data_samples'] for i in range(20)]
        for sample in samples:
            sample.set_pred_score(torch.eye(10)[(sample.gt_label[0] + shift) % 10])
        evaluator.process(samples)
        assert evaluator.evaluate(20)['accuracy/top1'] == accuracy


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'train' or 'test', not 'val'"):
        DigitsDataset('val')
    with pytest.raises(ValueError, match="bicubic, not 'lanczos'"):
        DigitsDataset('train', interpolation='lanczos')
    with pytest.raises(ValueError, match='above 0, not 0'):
        DigitsDataset('train', size=0)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    module._bundled.cache_clear()
    monkeypatch.setitem(sys.modules, 'sklearn.datasets', None)
    with pytest.raises(ImportError, match='pip install scikit-learn'):
        DigitsDataset('train')
