"""Users' configs: what is drawn is repeatable, what is adapted stays the config's own, and a row ends as it ended."""

from __future__ import annotations

import json
from argparse import Namespace

import pytest

pytest.importorskip('mmpretrain')
pytest.importorskip('mmseg')

from mmengine.config import Config
from mmengine.registry import DefaultScope

from benchmarks import user_configs, user_configs_own, user_configs_report, user_configs_shipped
from mmcpd.engine.compat import mend_scopes

RAN = {'status': 0, 'seconds': 1.0}
REFUSED = {'status': 1, 'seconds': 1.0, 'line': 'error: groups are trained by 2 of backbone, head: do this', 'end': []}
FOREIGN = {**REFUSED, 'line': 'error: head.fc (KeyError; --debug shows where)'}
BROKEN = {**REFUSED, 'line': "TypeError: 'NoneType' object is not callable"}


@pytest.fixture(autouse=True)
def scopes():
    yield
    DefaultScope._instance_dict.clear()


@pytest.mark.parametrize(
    ('ran', 'end'),
    [
        ({'train': RAN, 'test': RAN, 'deploy': RAN}, 'right'),
        ({'train': RAN, 'test': RAN}, 'fault'),
        ({'train': REFUSED}, 'refused'),
        ({'train': RAN, 'test': RAN, 'deploy': REFUSED}, 'refused'),
        ({'train': FOREIGN}, 'fault'),
        ({'train': BROKEN}, 'fault'),
        ({'train': {**REFUSED, 'status': 4}}, 'fault'),
        ({'train': {**BROKEN, 'status': -1, 'line': 'out of time'}}, 'fault'),
    ],
)
def test_only_a_line_of_our_own_is_a_refusal(ran, end):
    assert user_configs.verdict(ran) == end


def test_a_long_line_keeps_its_end(tmp_path):
    line = f'error: {tmp_path}/a.py: ' + 'many ' * 400 + FOREIGN['line'][-30:]
    cleaned = user_configs.clean(line, tmp_path)
    assert cleaned.startswith('error: ./a.py: ') and cleaned.endswith(user_configs.NOT_OURS) and len(cleaned) < 620
    assert user_configs.verdict({'train': {**REFUSED, 'line': cleaned}}) == 'fault'


def test_the_seed_decides_what_is_drawn():
    first = user_configs_shipped.shuffled('mmseg', 0)
    assert first == user_configs_shipped.shuffled('mmseg', 0) != user_configs_shipped.shuffled('mmseg', 1)
    assert len(first) == len(set(first)) > 500
    assert not any('_base_' in name for name in first)


def test_what_cannot_be_built_here_is_excluded_with_the_reason(monkeypatch):
    monkeypatch.setattr(user_configs_shipped, 'MOST', 20_000_000)
    order = [
        'lenet/lenet5_mnist.py', 'lenet/lenet5_mnist.py', 'resnet/resnet18_8xb32_in1k.py',
        'resnet/resnet50_8xb32_in1k.py', 'blip/blip-base_8xb32_vqa.py', 'nowhere/none.py',
        'resnest/resnest50_32xb64_in1k.py',
    ]  # fmt: skip
    monkeypatch.setattr(user_configs_shipped, 'shuffled', lambda package, seed: order[::-1])
    excluded = {}
    drawn = list(user_configs_shipped.draw('mmpretrain', 0, excluded))
    assert [found.name for found in drawn] == ['resnet/resnet18_8xb32_in1k.py', 'lenet/lenet5_mnist.py']
    assert drawn[0].params == 11_689_512
    assert excluded['mmpretrain/resnet/resnet50_8xb32_in1k.py'] == 'size: above 20 M parameters'
    assert excluded['mmpretrain/nowhere/none.py'].startswith('reading: FileNotFoundError')
    assert 'without val_cfg' in excluded['mmpretrain/resnest/resnest50_32xb64_in1k.py']
    assert excluded.keys() - {'mmpretrain/blip/blip-base_8xb32_vqa.py'} == {
        'mmpretrain/resnet/resnet50_8xb32_in1k.py',
        'mmpretrain/nowhere/none.py',
        'mmpretrain/resnest/resnest50_32xb64_in1k.py',
    }


def test_an_adapted_config_keeps_its_own_but_for_data_and_length(tmp_path):
    name = 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    cfg = user_configs_shipped.adapt('mmseg', name, tmp_path)
    before = user_configs_shipped.read('mmseg', name)
    assert cfg.optim_wrapper == before.optim_wrapper
    assert cfg.param_scheduler == before.param_scheduler[:1] != before.param_scheduler  # the second begins too late
    assert cfg.model.decode_head == before.model.decode_head
    kinds = [[step.type for step in each.train_dataloader.dataset.pipeline] for each in (cfg, before)]
    assert kinds[0] == kinds[1]
    assert cfg.model.data_preprocessor.size == (128, 128) and cfg.train_cfg.max_iters == 20
    assert 'init_cfg' in before.model.backbone or 'Pretrained' not in json.dumps(cfg.model.to_dict())
    assert (tmp_path / 'ann' / 'train' / '019.png').is_file()


def test_a_classifier_gets_fewer_pixels_where_it_takes_them(tmp_path):
    sides = {'resnet/resnet18_8xb32_in1k.py': 112, 'efficientformer/efficientformer-l1_8xb128_in1k.py': 224}
    for name, side in sides.items():
        cfg = user_configs_shipped.adapt('mmpretrain', name, tmp_path)
        _, pipeline = user_configs_shipped.innermost(cfg)
        assert user_configs_shipped.crop_of(cfg, pipeline) == side
        assert cfg.train_cfg.max_epochs == 2


@pytest.mark.parametrize('own', user_configs_own.OWN, ids=lambda own: own.name)
def test_configs_of_our_own_can_be_read_with_the_recipe(tmp_path, own):
    mend_scopes()
    user_configs_own.write_own(own, tmp_path)
    cfg = Config.fromfile(tmp_path / 'prune.py')
    assert cfg.default_hooks.prune.target == {'macs': 0.5}
    assert (own.name == 'tutorial') == ('student' not in cfg.model)
    assert len(list((tmp_path / 'data' / 'npy' / 'train').iterdir())) == (20 if own.bands != 3 else 0)


def test_the_table_says_how_rows_ended(tmp_path):
    row = {'date': '2026-01-01', 'versions': {'torch': '2'}, 'what': '9 bands', 'seed': 0}
    left = {'coupling': '7 groups, 9 units', 'left': {'macs': 0.493}}
    rows = {
        'good': {**row, **left, 'train': RAN, 'test': RAN, 'deploy': RAN, 'verdict': 'right'},
        'mmseg/a.py': {**row, 'train': REFUSED, 'verdict': 'refused'},
    }
    store = {
        'drawn': {'mmseg': {'seed': 5, 'names': ['a.py'], 'passed_over': {'mmseg/b.py': 'size: above'}}},
        'survey': {'mmseg': {'configs': 9, 'excluded': {'size: above': 3, 'building: this': 1}}},
        'rows': rows,
    }
    user_configs_report.write_report(store, tmp_path / 'docs' / 'configs.md')
    text = (tmp_path / 'docs' / 'configs.md').read_text()
    assert '| `good` | 9 bands | 7 | 49.3% | yes | yes | yes | 3 | right |' in text
    assert '| `mmseg/a.py` | 9 bands | - | - | no (1) | - | - | 1 | refused |' in text
    assert '`mmseg/a.py`, refused: `mmcpd train`: groups are trained by 2 of backbone, head: do this' in text
    assert '2 rows: 1 right, 1 refused' in text and 'drawn with seed 5' in text
    assert 'Of its 9 configs 4 are excluded, tried one by one: 3 by size, 1 by building' in text


@pytest.mark.slow
def test_a_row_runs_by_the_command_line_and_is_kept(tmp_path):
    args = Namespace(seed=0, seconds=600, keep=tmp_path)
    row = user_configs.run_row('tutorial', args)
    assert row['verdict'] == 'refused' and row['train']['status'] == row['test']['status'] == 0
    assert 0.3 < row['left']['macs'] <= 0.5 and "mode 'tensor'" in row['deploy']['line']
    assert str(tmp_path) not in json.dumps(row)
