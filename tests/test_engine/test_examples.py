"""Inputs from a config: real ones as the model sees them, or noise on request."""

from __future__ import annotations

from pathlib import Path

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import pytest
import torch
from mmengine.config import Config

from mmcpd.datasets.digits import DigitsDataset
from mmcpd.engine.build import build_dense
from mmcpd.engine.examples import data_batches, example_inputs, input_shape, random_batches

BASE = Path(__file__).resolve().parents[2] / 'configs' / '_base_' / 'datasets' / 'digits.py'


@pytest.fixture(scope='module')
def cfg():
    cfg = Config.fromfile(BASE)
    cfg.default_scope = 'mmpretrain'
    cfg.model = dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet', depth=18, base_channels=8, stem_channels=8),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=10, in_channels=64),
    )
    return cfg


@pytest.fixture(scope='module')
def model(cfg):
    return build_dense(cfg)


def test_real_inputs_are_normalised_pictures_from_the_whole_test_set(cfg, model):
    one, three = data_batches(cfg, model, (1, 3))
    assert one.shape == (1, 3, 32, 32)
    assert three.shape == (3, 3, 32, 32)
    data = DigitsDataset('test')
    for picture, index in ((one[0], 0), (three[0], 148), (three[2], 444)):
        expected = (torch.from_numpy(data[index]['img']).permute(2, 0, 1) - 79.5) / 90.7
        torch.testing.assert_close(picture, expected)


def test_real_inputs_are_scaled_to_another_shape(cfg, model):
    (same,), (large,) = data_batches(cfg, model, (2,)), data_batches(cfg, model, (2,), shape=(64, 48))
    assert large.shape == (2, 3, 64, 48)
    torch.testing.assert_close(large.mean(), same.mean(), atol=0.05, rtol=0)


def test_more_inputs_than_pictures_repeat_some(cfg, model):
    few = Config(dict(cfg))
    few.test_dataloader.dataset.indices = 2
    (batch,) = data_batches(few, model, (5,))
    assert len(batch.unique(dim=0)) == 2


def test_random_inputs_are_always_the_same(cfg):
    one, two = random_batches(cfg, (2, 3)), random_batches(cfg, (2, 3))
    assert [x.shape for x in one] == [(2, 3, 32, 32), (3, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert random_batches(cfg, (1,), (8, 16))[0].shape == (1, 3, 8, 16)


def test_without_test_data_it_says_so(cfg, model):
    bare = Config({key: value for key, value in cfg.items() if key != 'test_dataloader'})
    with pytest.raises(ValueError, match='no test_dataloader'):
        data_batches(bare, model, (1,))


def loader(*transforms) -> dict:
    return dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(type='X', pipeline=list(transforms))))


@pytest.mark.parametrize(
    ('entries', 'shape'),
    [
        (dict(default_hooks=dict(a=None, b=dict(type='mmcpd.PruneHook', input_shape=(1, 20, 30)))), (1, 1, 20, 30)),
        (dict(custom_hooks=[dict(type='CombHook', input_shape=[1, 9, 8])], crop_size=7), (1, 1, 9, 8)),
        (dict(crop_size=(48, 64)), (1, 3, 48, 64)),
        (dict(test_dataloader=loader(dict(type='Resize', scale=(64, 48)), dict(type='Pack'))), (1, 3, 48, 64)),
        (
            dict(
                test_dataloader=loader(dict(type='Resize', scale=(64, 48), keep_ratio=True)),
                train_dataloader=loader(dict(type='RandomCrop', crop_size=40)),
            ),
            (1, 3, 40, 40),
        ),
        (
            dict(test_dataloader=loader(dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224))),
            (1, 3, 224, 224),
        ),
        (dict(data_preprocessor=dict(mean=[0.5], std=[1.0], size=(50, 60))), (1, 1, 50, 60)),
    ],
)
def test_example_inputs_have_the_size_of_the_test(cfg, entries, shape):
    cfg = Config({'model': cfg.model, 'default_scope': 'mmpretrain', **entries})
    inputs = example_inputs(cfg)
    assert inputs.shape == shape
    assert torch.equal(inputs, example_inputs(cfg))


def test_a_config_without_any_size_says_how_to_give_one(cfg):
    with pytest.raises(ValueError, match=r'give PruneHook input_shape=\(3, H, W\)'):
        example_inputs(Config({'model': cfg.model}))


def test_the_first_picture_decides_last_and_reading_it_draws_nothing(cfg):
    class Noisy(torch.utils.data.Dataset):
        def __getitem__(self, index):
            height, width = torch.randint(8, 1000, (2,)).tolist()
            return {'inputs': torch.zeros(3, height, width)}

    bare = Config({'model': cfg.model})
    before = torch.get_rng_state()
    shape = input_shape(bare, None, Noisy())
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert input_shape(bare, None, Noisy()) == shape, 'the same picture each time'
    assert input_shape(Config({'model': cfg.model, 'crop_size': 20}), None, Noisy()) == (3, 20, 20)
    assert input_shape(bare, (1, 5, 6), Noisy()) == (1, 5, 6)
    with pytest.raises(ValueError, match=r"no 'inputs' \(C, H, W\): give PruneHook input_shape"):
        input_shape(bare, None, [{'inputs': [1, 2]}])


def test_a_real_config_is_sized(tmp_path):
    file = tmp_path / 'config.py'
    file.write_text("_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'\n")
    assert example_inputs(str(file)).shape == (1, 3, 512, 512)
    assert type(build_dense(file)).__name__ == 'EncoderDecoder'
