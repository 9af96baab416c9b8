"""Pictures to prune by: of training data and of folders, without labels, normalised, the same for the same seed."""

from __future__ import annotations

import random
from pathlib import Path

import cv2
import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import numpy as np
import pytest
import torch
from mmengine.config import Config

from mmcpd.engine.build import build_dense
from mmcpd.engine.pictures import SUFFIXES, pictures
from mmcpd.random_state import seeded

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'cpd'
MEAN, STD = 79.5, 90.7  # of the digits


@pytest.fixture(scope='module')
def digits():
    cfg = Config.fromfile(CONFIGS / 'resnet50_prune.py')
    cfg.model.student.backbone.update(depth=18)
    cfg.model.student.head.in_channels = 512
    return cfg, build_dense(cfg)


def flat(batches):
    return {tuple(picture.flatten().tolist()) for batch in batches for picture in batch}


def raw(cfg, split='train'):
    from mmcpd.datasets import DigitsDataset

    return {tuple(((torch.tensor(s['img']).permute(2, 0, 1).float() - MEAN) / STD).flatten().tolist())
            for s in DigitsDataset(split, indices=cfg.train_dataloader.dataset.get('indices'))}  # fmt: skip


def test_training_pictures_through_the_test_pipeline(digits):
    cfg, model = digits
    seen = []
    found = pictures(cfg, model, 100, progress=lambda *at: seen.append(at))
    assert [batch.shape for batch in found] == [(64, 3, 32, 32), (36, 3, 32, 32)] and seen == [(1, 2), (2, 2)]
    assert len(flat(found)) == 100, 'each at most once'
    whole = raw(cfg)
    rounded = {tuple(round(x, 3) for x in each) for each in whole}
    assert {tuple(round(x, 3) for x in each) for each in flat(found)} <= rounded, 'not augmented, of the training set'
    augmented = pictures(cfg, model, 100, pipeline='train')
    assert not {tuple(round(x, 3) for x in each) for each in flat(augmented)} <= rounded


@pytest.mark.parametrize('pipeline', ['test', 'train'])
def test_the_seed_decides_and_the_callers_numbers_stay(digits, pipeline):
    cfg, model = digits

    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = state()
    first, again = (pictures(cfg, model, 8, pipeline=pipeline, seed=3)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, pictures(cfg, model, 8, pipeline=pipeline, seed=4)[0])
    assert state() == before


def test_fewer_than_asked_for_is_said(digits, monkeypatch):
    said = []
    monkeypatch.setattr('mmcpd.engine.pictures.print_log', lambda text, *_: said.append(text))
    cfg, model = digits
    cfg = Config(cfg.to_dict())
    cfg.train_dataloader.dataset.indices = 5
    assert len(pictures(cfg, model, 5)[0]) == 5
    assert not said
    (batch,) = pictures(cfg, model, 9)
    assert len(batch) == 5
    assert said == ['9 pictures were asked for, and there are 5']


def test_wrappers_and_concatenations(digits):
    cfg, model = digits
    cfg = Config(cfg.to_dict())
    part = cfg.train_dataloader.dataset.to_dict()
    parts = [{**part, 'indices': 3}, {**part, 'split': 'test', 'indices': 2}]
    both = {'type': 'ConcatDataset', 'datasets': parts}
    cfg.train_dataloader.dataset = {'type': 'RepeatDataset', 'times': 9, 'dataset': both}
    assert len(flat(pictures(cfg, model, 99))) == 5
    assert len(pictures(cfg, model, 40, pipeline='train')[0]) == 40, 'augmented, so that a repetition is another one'


def test_segmentation_needs_no_annotation(tmp_path):
    (tmp_path / 'images/train').mkdir(parents=True)
    for i, size in enumerate([(48, 64), (40, 40), (64, 48)]):
        picture = np.random.default_rng(i).integers(0, 255, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / f'images/train/{i}.jpg'), picture)
    cfg = Config.fromfile(CONFIGS / 'camvid_mobilenetv2_prune.py')
    cfg.model.student.backbone.update(init_cfg=None, widen_factor=0.25)
    cfg.model.student.decode_head.in_channels = [8, 24, 320]
    cfg.train_dataloader.dataset.data_root = str(tmp_path)
    model = build_dense(cfg)
    (batch,) = pictures(cfg, model, 3, shape=(3, 48, 64))
    assert batch.shape == (3, 3, 48, 64)
    with pytest.raises(FileNotFoundError, match='annotations'):
        pictures(cfg, model, 3, pipeline='train', shape=(3, 48, 64))
    (same,) = pictures(cfg, model, 3, folder=tmp_path / 'images', shape=(3, 48, 64))
    assert torch.equal(batch, same), 'a folder of the same pictures'


@pytest.fixture
def folder(tmp_path):
    (tmp_path / 'a/b').mkdir(parents=True)
    for name, colour in (('a/b/red.PNG', (0, 0, 255)), ('a/green.jpg', (0, 255, 0)), ('blue.bmp', (255, 0, 0))):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), colour, np.uint8))
    (tmp_path / 'notes.txt').write_text('no picture')
    return tmp_path


def test_a_folder_of_pictures(folder):
    cfg = Config.fromfile(CONFIGS / 'resnet20_prune_cifar10.py')
    model = build_dense(cfg)
    (batch,) = pictures(cfg, model, 3, folder=folder, shape=(3, 16, 16))
    assert batch.shape == (3, 3, 16, 16)
    mean, std = (getattr(model.data_preprocessor, name).flatten() for name in ('mean', 'std'))
    rgb = (batch.mean((2, 3)) * std + mean).round()  # (N, 3)
    assert sorted(rgb.argmax(1).tolist()) == [0, 1, 2] and bool((rgb.max(1).values > 245).all())
    order = [file.name for file in sorted(folder.rglob('*')) if file.suffix.lower() in SUFFIXES]
    with seeded(0):
        drawn = [order[index] for index in torch.randperm(3)]
    assert [drawn[rgb.argmax(0)[channel]] for channel in range(3)] == ['red.PNG', 'green.jpg', 'blue.bmp']


def test_a_folder_for_a_config_whose_own_data_lie_in_memory(folder, digits):
    (batch,) = pictures(*digits, 2, folder=folder)
    assert batch.shape == (2, 3, 32, 32)


def test_what_is_refused(folder, digits, tmp_path):
    cfg, model = digits
    for number in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match='is an integer, 1 or more'):
            pictures(cfg, model, number)
    with pytest.raises(ValueError, match=r'no folder .*nowhere'):
        pictures(cfg, model, 1, folder=tmp_path / 'nowhere')
    with pytest.raises(ValueError, match='no folder'):
        pictures(cfg, model, 1, folder=folder / 'notes.txt')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='empty holds no picture'):
        pictures(cfg, model, 1, folder=tmp_path / 'empty')
    for content in (b'', b'no picture'):
        (tmp_path / 'empty/broken.png').write_bytes(content)
        with pytest.raises(ValueError, match=r'broken\.png cannot be read as a picture'):
            pictures(cfg, model, 1, folder=tmp_path / 'empty')
    with pytest.raises(ValueError, match="pipeline='train'"):
        pictures(cfg, model, 1, folder=folder, pipeline='train')
    with pytest.raises(ValueError, match='did you mean train'):
        pictures(cfg, model, 1, pipeline='trian')
    bare = Config(cfg.to_dict())
    bare.train_dataloader = None
    with pytest.raises(ValueError, match=r'no train_dataloader .* give a folder'):
        pictures(bare, model, 1)
    bare.test_dataloader = bare.val_dataloader = None
    with pytest.raises(ValueError, match='no test_dataloader'):
        pictures(bare, model, 1, folder=folder, shape=(3, 32, 32))
