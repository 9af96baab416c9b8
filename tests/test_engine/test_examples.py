"""Inputs from a config: real ones as the model sees them, or noise on request."""

from __future__ import annotations

from pathlib import Path

import mmpretrain.models  # noqa: F401 - registers
import mmseg.models  # noqa: F401 - registers
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmpretrain.structures import DataSample
from torch import nn

from mmcpd.datasets.digits import DigitsDataset
from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_passes
from mmcpd.engine.examples import data_batches, example_data, example_inputs, picture_of, random_batches
from mmcpd.engine.passes import TRAINING, deployed_pass
from mmcpd.engine.samples import Samples
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep

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


def test_random_inputs_are_always_the_same(cfg, model):
    one, two = random_batches(cfg, model, (2, 3)), random_batches(cfg, model, (2, 3))
    assert [x.shape for x in one] == [(2, 3, 32, 32), (3, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert random_batches(cfg, model, (1,), (8, 16))[0].shape == (1, 3, 8, 16)


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
    model = build_dense(cfg)
    cfg = Config({'model': cfg.model, 'default_scope': 'mmpretrain', **entries})
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.in_channels = shape[1]  # whatever the mean says
    inputs = example_inputs(cfg, model)
    assert inputs.shape == shape
    assert torch.equal(inputs, example_inputs(cfg, model))


def test_a_config_without_any_size_says_how_to_give_one(cfg):
    with pytest.raises(ValueError, match=r'give PruneHook input_shape=\(C, H, W\)'):
        example_inputs(Config({'model': cfg.model}), build_dense(cfg))


class Noisy(torch.utils.data.Dataset):
    """Pictures of any size and as many bands, with a label."""

    def __init__(self, bands=3):
        self.bands = bands

    def __getitem__(self, index):
        height, width = torch.randint(8, 1000, (2,)).tolist()
        return {'inputs': torch.zeros(self.bands, height, width), 'data_samples': DataSample().set_gt_label(1)}


def test_the_first_sample_is_the_same_each_time_and_reading_it_draws_nothing(cfg):
    bare, model = Config({'model': cfg.model}), build_dense(cfg)

    def shape(config, given=None):
        data = example_data(model, config, Samples(Noisy()), given)
        assert data['data_samples'][0].gt_label == 1
        return tuple(picture_of(data).shape)

    before = torch.get_rng_state()
    first = shape(bare)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert shape(bare) == first
    assert shape(Config({'model': cfg.model, 'crop_size': 20})) == (1, 3, 20, 20)
    assert shape(bare, (1, 5, 6)) == (1, 1, 5, 6)


def test_a_sample_without_a_picture_is_refused(cfg):
    model = build_dense(cfg)
    model.data_preprocessor.forward = lambda batch, training: {'inputs': ['a.png'], 'data_samples': []}
    with pytest.raises(ValueError, match=r'returns no picture for a sample: give PruneHook input_shape'):
        example_data(model, Config({'model': cfg.model}), Samples(Noisy()))


@pytest.mark.parametrize('bands', [1, 4, 9])
def test_bands_come_from_the_data_or_from_the_first_layer_not_from_the_mean(cfg, bands):
    """The mean of one number, of three, or none at all is broadcast over any number of bands."""
    plain = Config({'model': cfg.model, 'crop_size': 20, 'default_scope': 'mmpretrain'})
    plain.model.backbone.in_channels = bands
    for preprocessor in (None, dict(mean=[0.5], std=[1.0]), dict(mean=[0.1] * bands, std=[1.0] * bands)):
        plain.model.data_preprocessor = preprocessor
        model = build_dense(plain)
        for samples in (Samples(Noisy(bands)), None):
            data = example_data(model, plain, samples)
            assert picture_of(data).shape == (1, bands, 20, 20)
            assert TRAINING(model, data)['loss'] > 0, 'with a label, if only a made-up one'


def test_a_real_config_is_sized(tmp_path):
    file = tmp_path / 'config.py'
    file.write_text("_base_ = 'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'\n")
    model = build_dense(file)
    assert example_inputs(str(file), model).shape == (1, 3, 512, 512)
    assert type(model).__name__ == 'EncoderDecoder'


class Views(BaseModel):
    """Trains on two views of a picture, as self-supervised methods do."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        if mode == 'loss':
            return {'loss': (self.two(self.one(inputs[0])) - self.two(self.one(inputs[1]))).square().mean()}
        if mode == 'predict':
            raise RuntimeError('Invalid mode "predict"')
        return self.two(self.one(inputs))


def test_a_model_that_trains_on_several_views_is_combed_on_one():
    data = {'inputs': [torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)], 'data_samples': None}
    model = Views()
    found = comb_passes(model, data)
    assert [group.units for group in found.groups] == [8]
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-6
    with pytest.raises(ValueError, match='runs on an example neither'):
        deployed_pass(model, {'inputs': [torch.rand(2, 4, 8, 8)], 'data_samples': None})
