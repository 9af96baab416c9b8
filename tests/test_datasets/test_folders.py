"""The base configs over folders: they read the layout that their first line names."""

from __future__ import annotations

from pathlib import Path

import cv2
import mmseg.datasets  # noqa: F401 - registers
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

BASE = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'datasets'
LOADERS = {'train': 'train_dataloader', 'val': 'val_dataloader', 'test': 'test_dataloader'}


def write(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image)


def load(cfg: Config, name: str, root: Path):
    loader = cfg[LOADERS[name]]
    loader.dataset.data_root = str(root)
    loader.num_workers, loader.persistent_workers = 0, False
    return Runner.build_dataloader(loader, seed=0)


def test_cifar10_folders_gives_the_class_of_the_folder(tmp_path):
    cfg = Config.fromfile(BASE / 'cifar10_folders.py')
    for part, copies in (('train', 2), ('test', 1)):
        for number, name in enumerate(cfg.classes):
            for copy in range(copies):
                write(tmp_path / part / name / f'{copy:05d}.png', np.full((32, 32, 3), 10 * number, np.uint8))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert len(load(cfg, 'train', tmp_path).dataset) == 20
        data = load(cfg, 'test', tmp_path).dataset
    assert data.metainfo['classes'] == cfg.classes
    for index in range(10):
        sample = data[index]
        assert int(sample['inputs'].float().mean()) == 10 * int(sample['data_samples'].gt_label)


def test_camvid_reads_pictures_and_labels_of_each_part(tmp_path):
    cfg = Config.fromfile(BASE / 'camvid.py')
    labels = np.zeros((360, 480), np.uint8)
    labels[:50], labels[50:60] = 10, 255
    for number, part in enumerate(LOADERS):
        for copy in range(number + 8):
            write(tmp_path / 'images' / part / f'{copy}.jpg', np.full((360, 480, 3), 99, np.uint8))
            write(tmp_path / 'annotations' / part / f'{copy}.png', labels)
    with DefaultScope.overwrite_default_scope('mmseg'):
        loaders = {part: load(cfg, part, tmp_path) for part in LOADERS}
    assert [len(loader.dataset) for loader in loaders.values()] == [8, 9, 10]
    sample = loaders['test'].dataset[0]
    assert sample['inputs'].shape == (3, 360, 480)
    assert np.array_equal(sample['data_samples'].gt_sem_seg.data[0].numpy(), labels)
    for picture in next(iter(loaders['train']))['inputs']:  # the model's preprocessor pads what is smaller
        assert picture.shape[1] <= cfg.crop_size[0]
        assert picture.shape[2] <= cfg.crop_size[1]
    assert len(cfg.metainfo.classes) == len(cfg.metainfo.palette) == 11


@pytest.mark.parametrize('path', sorted(BASE.glob('*.py')), ids=lambda path: path.stem)
def test_workers_are_few_and_persistent_only_where_there_are_any(path):
    cfg = Config.fromfile(path)
    for name in LOADERS.values():
        assert 0 <= cfg[name].num_workers <= 2
        assert cfg[name].persistent_workers == (cfg[name].num_workers > 0)
