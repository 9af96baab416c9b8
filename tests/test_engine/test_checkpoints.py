"""slim.pth: written whole or not at all, read without running code, and only into its own model."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

from mmcpd.engine import checkpoints, slim_file
from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import student_config
from mmcpd.errors import SlimError
from mmcpd.slim import slim, structure

SIZE = 32


def config(depth: int = 18, classes: int = 10, **entries) -> Config:
    model = dict(
        type='ImageClassifier',
        backbone=dict(type='ResNet', depth=depth, base_channels=8, stem_channels=8, num_stages=4),
        neck=dict(type='GlobalAveragePooling'),
        head=dict(type='LinearClsHead', num_classes=classes, in_channels=64, loss=dict(type='CrossEntropyLoss')),
    )
    preprocessor = dict(mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0])
    return Config(
        dict(
            model=model,
            default_scope='mmpretrain',
            data_preprocessor=preprocessor,
            default_hooks=dict(prune=dict(type='mmcpd.PruneHook', input_shape=(3, SIZE, SIZE))),
        )
        | entries
    )


def vit() -> Config:
    backbone = dict(
        type='VisionTransformer',
        arch=dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48),
        img_size=SIZE,
        patch_size=8,
    )
    head = dict(type='VisionTransformerClsHead', num_classes=5, in_channels=24)
    return config(model=dict(type='ImageClassifier', backbone=backbone, neck=None, head=head))


def cut(cfg: Config, seed: int = 0):
    """Return the dense model, a slim one at a random keep, and the structure."""
    torch.manual_seed(seed)
    dense = build_dense(cfg).eval()
    coupling = comb_by_config(dense, cfg)
    generator = torch.Generator().manual_seed(seed)
    keep = {name: torch.rand(len(units), generator=generator) < 0.6 for name, units in coupling.keep().items()}
    for units in keep.values():
        units[0] = True
    small = slim(dense, coupling, keep)
    return dense, small, structure(dense, small)


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.fixture
def written(tmp_path):
    cfg = config()
    dense, small, plan = cut(cfg)
    path = tmp_path / 'deep' / 'slim.pth'
    slim_file.save_slim(path, small, plan, {'dataset_meta': {'classes': ('a', 'b')}, 'slim': {'macs': 12}})
    return cfg, dense, small, path


@pytest.mark.parametrize('make', [config, vit])
def test_a_round_trip_gives_the_same_function_and_the_same_class(tmp_path, make):
    cfg = make()
    dense, small, plan = cut(cfg)
    path = tmp_path / 'slim.pth'
    slim_file.save_slim(path, small, plan, {})
    again = checkpoints.load_slim(cfg, path)
    x = torch.randn(2, 3, SIZE, SIZE)
    assert type(again) is type(dense)
    assert not again.training
    assert count(again) == count(small) < count(dense)
    torch.testing.assert_close(again(x, mode='tensor'), small(x, mode='tensor'), rtol=0, atol=0)


def test_the_file_holds_plain_values_only(written):
    *_, path = written
    content = torch.load(path, weights_only=True)
    assert set(content) == {'state_dict', 'buffers', 'structure', 'meta', 'version', 'checksum'}
    assert json.loads(content['structure'])['tensors']
    assert content['meta']['dataset_meta'] == {'classes': ['a', 'b']}
    assert content['meta']['mmcpd_version']
    assert os.listdir(path.parent) == ['slim.pth']


def test_a_failed_write_leaves_the_old_file(written, monkeypatch):
    _, _, small, path = written
    before = path.read_bytes()

    def fail(content, file):
        file.write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', fail)
    with pytest.raises(OSError, match='disk full'):
        slim_file.save_slim(path, small, {}, {})
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ['slim.pth']


def test_meta_that_is_not_plain_is_refused(written):
    _, _, small, path = written
    with pytest.raises(ValueError, match=r'meta\.a\[1\] of a slim checkpoint must be plain values, not object'):
        slim_file.save_slim(path, small, {}, {'a': [1, object()]})


def test_scalars_of_torch_become_numbers(written, tmp_path):
    _, _, small, _ = written
    path = tmp_path / 'scalar.pth'
    slim_file.save_slim(path, small, {}, {'loss': torch.tensor(0.5), 'flag': True})
    assert read_slim(path)['meta'] | {'mmcpd_version': ''} == {
        'loss': 0.5,
        'flag': True,
        'mmcpd_version': '',
    }


def test_a_stranger_s_checkpoint_runs_no_code(tmp_path):
    path = tmp_path / 'evil.pth'
    ran = tmp_path / 'ran'

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(ran),)

    torch.save({'state_dict': {}, 'structure': '{}', 'meta': Evil()}, path)
    with pytest.raises(SlimError, match='holds more than weights'):
        read_slim(path)
    assert not ran.exists()


def test_a_missing_file(tmp_path):
    with pytest.raises(SlimError, match='there is no such checkpoint'):
        read_slim(tmp_path / 'none.pth')


@pytest.mark.parametrize('share', [0.0, 0.01, 0.5, 0.99])
def test_a_truncated_checkpoint(written, share):
    cfg, _, _, path = written
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(SlimError, match='truncated or not a checkpoint'):
        checkpoints.load_slim(cfg, path)
    with pytest.raises(SlimError, match='truncated or not a checkpoint'):
        checkpoints.read_checkpoint(path)
    assert not slim_file.is_slim(path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / 'readme.txt'
    path.write_text('hello')
    with pytest.raises(SlimError, match='truncated or not a checkpoint'):
        read_slim(path)


def test_an_ordinary_checkpoint_is_not_a_slim_one(tmp_path):
    path = tmp_path / 'epoch_1.pth'
    torch.save({'state_dict': build_dense(config()).state_dict()}, path)
    with pytest.raises(SlimError, match=r'not a slim checkpoint: it has no structure.*`mmcpd slim`'):
        checkpoints.load_slim(config(), path)
    assert not slim_file.is_slim(path)
    assert 'head.fc.weight' in checkpoints.read_checkpoint(path)['state_dict']


def test_a_file_of_another_version_gets_one_line(written):
    cfg, *_, path = written
    content = torch.load(path, weights_only=True)
    assert content['version'] == 4
    for version in (3, None):
        torch.save({**content, 'version': version}, path)
        with pytest.raises(
            SlimError, match=rf'slim\.pth is a slim checkpoint of version {version}, .* cut it again'
        ) as error:
            checkpoints.load_slim(cfg, path)
        assert '\n' not in str(error.value)
        assert slim_file.is_slim(path)  # so that no tool takes it for a training checkpoint


def test_a_bare_state_dict_is_read_as_a_checkpoint(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'head.fc.bias': torch.ones(3)}, path)
    assert checkpoints.read_checkpoint(path)['state_dict']['head.fc.bias'].tolist() == [1, 1, 1]


@pytest.mark.parametrize('name', ['model', 'model_state_dict'])
def test_the_checkpoint_of_another_training_script_is_read_by_all(tmp_path, name):
    path = tmp_path / 'last.pth'
    torch.save({'epoch': 3, name: build_dense(config()).state_dict(), 'optimizer': {'state': {}}}, path)
    content = checkpoints.read_checkpoint(path)
    assert 'head.fc.weight' in content['state_dict'] and content['epoch'] == 3 and name not in content
    assert torch.equal(checkpoints.load_dense(config(), path).head.fc.weight, content['state_dict']['head.fc.weight'])
    model = build_dense(config())
    load_checkpoint(model, str(path))  # MMEngine's own, which took no weight from it and said nothing
    assert torch.equal(model.head.fc.weight, content['state_dict']['head.fc.weight'])


def test_a_model_that_was_saved_inside_its_wrapper_is_read(tmp_path):
    path = tmp_path / 'last.pth'
    values = build_dense(config()).state_dict()
    torch.save({'model': {f'module.{name}': value for name, value in values.items()}}, path)
    assert torch.equal(checkpoints.load_dense(config(), path).head.fc.weight, values['head.fc.weight'])


def test_what_is_called_model_and_holds_no_weights_is_none(tmp_path):
    path = tmp_path / 'settings.pth'
    torch.save({'model': {'depth': 50}, 'head.fc.bias': torch.ones(3)}, path)
    assert checkpoints.read_checkpoint(path)['state_dict'].keys() == {'model', 'head.fc.bias'}


def test_a_text_and_weights_that_are_not_finite_are_said(tmp_path):
    path = tmp_path / 'weights.pth'
    path.write_text('hello')
    with pytest.raises(SlimError, match=r'weights\.pth is truncated or not a checkpoint$'):
        checkpoints.load_dense(config(), path)
    values = build_dense(config()).state_dict()
    values['head.fc.weight'][0, 0] = float('nan')
    torch.save(values, path)
    with pytest.raises(SlimError, match=r'weights\.pth: head\.fc\.weight holds a number that is not finite'):
        checkpoints.load_dense(config(), path)


def test_a_pickle_of_something_else(tmp_path):
    path = tmp_path / 'list.pth'
    with path.open('wb') as file:
        pickle.dump([1, 2], file)
    with pytest.raises(SlimError):
        read_slim(path)


def test_a_checkpoint_of_another_model_names_the_first_mismatch(written):
    *_, path = written
    with pytest.raises(SlimError, match=r'slim\.pth.*another model'):
        checkpoints.load_slim(vit(), path)
    with pytest.raises(SlimError, match=r'slim\.pth does not fit ImageClassifier: head\.fc\.weight is \(7, 64\)'):
        checkpoints.load_slim(config(classes=7), path)
    with pytest.raises(SlimError, match=r'it lacks backbone\.layer1\.\d\.conv\d\.weight, which ImageClassifier has'):
        checkpoints.load_slim(config(depth=34), path)


def test_the_builder_gives_the_trained_model_to_stock_tools(written):
    cfg, _, small, path = written
    wrapped = dict(type='mmcpd.slimmed', model=cfg.model, structure=str(path), data_preprocessor=cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(wrapped).eval()
    x = torch.randn(1, 3, SIZE, SIZE)
    torch.testing.assert_close(model(x, mode='tensor'), small(x, mode='tensor'), rtol=0, atol=0)
    assert model.data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    model.init_weights()  # the Runner calls it when training starts
    torch.testing.assert_close(model(x, mode='tensor'), small(x, mode='tensor'), rtol=0, atol=0)


def test_load_from_wins_over_the_weights_in_the_structure(written, tmp_path):
    cfg, _, small, path = written
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(dict(type='mmcpd.slimmed', model=cfg.model, structure=str(path)))
    torch.save({name: value + 1 for name, value in small.state_dict().items()}, tmp_path / 'tuned.pth')
    load_checkpoint(model, str(tmp_path / 'tuned.pth'), strict=True)
    torch.testing.assert_close(model.head.fc.weight, small.head.fc.weight + 1)


@pytest.mark.parametrize(('text', 'message'), [('{', 'is not JSON'), ('{}', 'holds no structure')])
def test_a_structure_that_is_none(written, text, message):
    cfg, *_, path = written
    content = {**torch.load(path, weights_only=True), 'structure': text}
    torch.save({**content, 'checksum': slim_file.checksum(content)}, path)
    with pytest.raises(SlimError, match=rf'slim\.pth.*{message}'):
        checkpoints.load_slim(cfg, path)


def test_the_student_of_a_distiller_is_found_with_its_preprocessor():
    bare = config()
    inside = config(model=dict(type='mmcpd.Distiller', student=bare.model, teacher='self'))
    twice = config(model=dict(type='mmcpd.slimmed', model=bare.model, structure='slim.pth'))
    for cfg in (bare, inside, twice):
        student = student_config(cfg)
        assert student.type == 'ImageClassifier'
        assert student.data_preprocessor == bare.data_preprocessor
    assert 'data_preprocessor' not in bare.model  # a copy was changed, not the config
    own = config(model={**bare.model, 'data_preprocessor': dict(mean=[0.0], std=[1.0])})
    assert student_config(own).data_preprocessor.mean == [0]


def test_weights_without_batch_norm_s_counters_fit():
    model = build_dense(config())
    weights = {name: torch.rand(value.shape) for name, value in model.state_dict().items() if 'tracked' not in name}
    checkpoints.fill(model, weights, 'old.pth')
    assert torch.equal(model.head.fc.weight, weights['head.fc.weight'])
    with pytest.raises(SlimError, match=r'old\.pth is of another model: it lacks head\.fc\.bias'):
        checkpoints.fill(model, {name: value for name, value in weights.items() if name != 'head.fc.bias'}, 'old.pth')
