"""`mmcpd export-code`: a plain file builds the slim model in a process where mmcpd cannot be imported."""

from __future__ import annotations

import importlib
import json
import runpy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS as MMENGINE
from mmpretrain.models import GlobalAveragePooling

from mmcpd.cli import export_code as command
from mmcpd.cli.common import run
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.export_code import export_code
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.tensor_file import write_tensors
from mmcpd.errors import SlimError
from mmcpd.models.cifar_resnet import CIFARResNet
from mmcpd.slim.mask import named_tensors
from tests.helpers import not_beside_lite, randomise_
from tests.test_engine.test_checkpoints import SIZE, config, vit
from tests.test_engine.test_slim_model import cut, swin, whole

ALONE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'mmcpd':
            raise ImportError('mmcpd is not there')
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, sys.argv[1])
import torch
from slim_model import build
model, images = build(), torch.load(sys.argv[2])
torch.set_num_threads(1)
with torch.no_grad():
    torch.save(model(images, mode='tensor'), sys.argv[3])
model.train()(images, mode='tensor')
try:
    import mmcpd
except ImportError:
    print('without mmcpd', sum(p.numel() for p in model.parameters()))
"""


def resnet50():
    backbone = dict(type='ResNet', depth=50, base_channels=16, stem_channels=16, out_indices=(3,))
    head = dict(type='LinearClsHead', num_classes=5, in_channels=512)
    return config(
        model=dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )


def segmentor():
    pytest.importorskip('mmseg')
    backbone = dict(type='ResNetV1c', depth=18, base_channels=8, stem_channels=8, norm_cfg=dict(type='SyncBN'))
    head = dict(
        type='FCNHead',
        in_channels=64,
        in_index=3,
        channels=16,
        num_convs=1,
        num_classes=4,
        norm_cfg=dict(type='SyncBN'),
    )
    model = dict(type='EncoderDecoder', backbone=backbone, decode_head=head, test_cfg=dict(mode='whole'))
    hook = dict(prune=dict(type='mmcpd.PruneHook', input_shape=(3, SIZE, SIZE)))
    return Config(dict(model=model, default_scope='mmseg', default_hooks=hook))


def segformer():
    """Its attention is a wrapper around nn.MultiheadAttention, which is replaced."""
    pytest.importorskip('mmseg')
    backbone = dict(type='MixVisionTransformer', embed_dims=16, num_stages=2, num_layers=[1, 1], num_heads=[1, 2],
                    patch_sizes=[7, 3], strides=[4, 2], sr_ratios=[2, 1], out_indices=(0, 1))  # fmt: skip
    head = dict(
        type='SegformerHead', in_channels=[16, 32], in_index=[0, 1], channels=16, num_classes=4,
        norm_cfg=dict(type='BN'),
    )  # fmt: skip
    model = dict(type='EncoderDecoder', backbone=backbone, decode_head=head, test_cfg=dict(mode='whole'))
    hook = dict(prune=dict(type='mmcpd.PruneHook', input_shape=(3, SIZE, SIZE)))
    return Config(dict(model=model, default_scope='mmseg', default_hooks=hook))


def beit():
    """Its attention divides the width of its input by the heads: another size is written into its forward."""
    arch = dict(embed_dims=24, num_layers=2, num_heads=3, feedforward_channels=48)
    backbone = dict(type='BEiTViT', arch=arch, img_size=SIZE, patch_size=8, out_type='featmap')
    head = dict(type='LinearClsHead', num_classes=5, in_channels=24)
    return config(
        model=dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )


STRANGE = """
import functools
from functools import wraps

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn

FACTOR = 1.5


def noted(function):
    @wraps(function)
    def around(self, *args):
        self.calls = getattr(self, 'calls', 0) + 1
        return function(self, *args)
    return around


def merge(x, B, N, C):
    return x.transpose(1, 2).reshape(B, N, C)


class Base(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.__gain = FACTOR
        self.qkv, self.proj = nn.Linear(dim, dim * 3), nn.Linear(dim, dim)
        self.heads = 3

    def bend(self, x):
        return x * self.__gain

    @noted
    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = merge((F.softmax(q @ k.transpose(-2, -1) * 0.3, -1) @ v), B, N, C)
        return self.proj(x) * self.__gain * FACTOR


class Attention(Base):
    def bend(self, x, scale=FACTOR):
        B, N, C = x.shape
        y = super().bend(self.qkv(x).reshape(B, N, 3, C).mean(2))
        return self.proj(y) * scale + x[..., :1]

    def forward(self, x):
        return super().forward(x).tanh()


class Waves(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, x):
        places, rates = torch.arange(x.shape[1]), torch.arange(1, self.dim + 1)
        return (places[:, None] * rates).sin()[None]


@MODELS.register_module()
class Strange(BaseModel):
    def __init__(self, dim=12, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.stem, self.attn, self.fc = nn.Conv2d(3, dim, 8, 8), Attention(dim), nn.Linear(dim, 5)
        self.tied = nn.Linear(dim, dim)
        self.also, self.waves = self.tied, Waves(20)
        self.wide, self.table, self.narrow = nn.Linear(dim, 20), torch.linspace(-1, 1, 20), nn.Linear(20, dim)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        x = self.stem(F.pad(inputs, (0, 0, 0, 0))).flatten(2).mT
        x = x + self.narrow(self.wide(x) + self.table + self.waves(x))
        x = self.also(self.tied(x + self.attn(x)))
        return self.fc((self.attn.bend(x) + x).mean(1))
"""


@pytest.fixture
def strange(tmp_path, monkeypatch):
    """A model of a file of the user's own: super(), private names, decorators, a tied layer, a plain tensor."""
    (tmp_path / 'strange_net.py').write_text(STRANGE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module('strange_net')
    hook = dict(prune=dict(type='mmcpd.PruneHook', input_shape=(3, SIZE, SIZE)))
    yield Config(dict(model=dict(type='Strange'), default_scope='mmengine', default_hooks=hook,
                      custom_imports=dict(imports=['strange_net', 'mmcpd'])))  # fmt: skip
    del sys.modules['strange_net']
    MMENGINE.module_dict.pop('Strange')


MODELS = {'beit': beit, 'resnet50': resnet50, 'vit': vit, 'swin': swin, 'segmentor': segmentor, 'segformer': segformer}
REWRITTEN, REPLACED = ('beit', 'strange'), ('segformer',)  # sizes in methods; modules in place of others


def slimmed(cfg, folder: Path):
    """Write a slim.pth of random units, with statistics and gains that differ."""
    torch.manual_seed(0)
    cut(cfg, randomise_(build_dense(cfg)).float(), folder / 'slim.pth')
    return load_slim(cfg, folder / 'slim.pth')


@pytest.mark.filterwarnings('ignore:slimming cannot tell')  # mmseg's aug_test
@pytest.mark.parametrize('name', [pytest.param(n, marks=not_beside_lite) if n.startswith('seg') else n for n in MODELS])
def test_it_computes_the_same_without_mmcpd(name, tmp_path):
    exported(name, MODELS[name](), tmp_path)


def test_methods_of_a_user_s_own_file_are_written_as_they_mean(strange, tmp_path):
    text = exported('strange', strange, tmp_path)
    assert 'import strange_net' in text and 'super(OfAttention, self).bend' in text and '@noted' in text
    assert 'self._Base__gain' in text and 'def merge(' in text
    assert "register_buffer('table', values['table'], False)" in text
    assert 'out.index_select(2, module.kept_channels)' in text


def exported(name, cfg, tmp_path) -> str:
    """Export a slim model, run the file where mmcpd is not, compare, and return its text."""
    small = slimmed(cfg, tmp_path)
    plan = read_slim(tmp_path / 'slim.pth')['structure']
    assert bool(plan['rewritten']) >= (name in REWRITTEN) and bool(plan['replaced']) >= (name in REPLACED)
    assert export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'plain' / 'slim_model.py') <= 1e-6
    assert sorted(path.name for path in (tmp_path / 'plain').iterdir()) == ['slim_model.py', 'slim_model.safetensors']
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    torch.save(images, tmp_path / 'images.pt')
    paths = (tmp_path / 'plain', tmp_path / 'images.pt', tmp_path / 'outputs.pt')
    done = subprocess.run([sys.executable, '-c', ALONE, *map(str, paths)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == f'without mmcpd {sum(p.numel() for p in small.parameters())}'
    with torch.no_grad():
        expected = small(images, mode='tensor')
    found = torch.load(tmp_path / 'outputs.pt', weights_only=True)
    for ours, theirs in zip(*map(flat, (expected, found)), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)
        assert ours.abs().max() > 1e-3 and not torch.allclose(ours[0], ours[1])
    text = (tmp_path / 'plain' / 'slim_model.py').read_text()
    assert 'import mmcpd' not in text and 'from mmcpd' not in text
    return text


def flat(outputs):
    return outputs if isinstance(outputs, list | tuple) else [outputs]


def test_the_weights_are_a_safetensors_file(tmp_path):
    tensors = {'a.weight': torch.randn(3, 2), 'a.n': torch.tensor(7), 'none': torch.empty(0, 4),
               'half': torch.ones(3).half(), 'b': torch.tensor([True, False]),
               'd': torch.randn(4).double(), 't': torch.randn(2, 5).t()}  # fmt: skip
    write_tensors(tmp_path / 'x.safetensors', tensors, {'model': 'Toy'})
    raw = (tmp_path / 'x.safetensors').read_bytes()
    size = int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8 : 8 + size])
    assert header.pop('__metadata__') == {'model': 'Toy'} and size % 8 == 0
    ends = sorted(tuple(entry['data_offsets']) for entry in header.values())
    assert ends[0][0] == 0 and ends[-1][1] == len(raw) - 8 - size
    assert all(a[1] == b[0] for a, b in pairwise(ends))  # no holes
    library = pytest.importorskip('safetensors.torch')
    read = library.load_file(tmp_path / 'x.safetensors')
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_what_the_format_does_not_hold_is_one_line(tmp_path):
    with pytest.raises(SlimError, match=r'^x is torch\.complex128'):
        write_tensors(tmp_path / 'x.safetensors', {'x': torch.ones(1, dtype=torch.complex128)}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['mmcpd.CIFARResNet', CIFARResNet])
def test_a_model_of_mmcpd_s_own_is_refused_by_name(tmp_path, kind):
    cfg = resnet50()
    cfg.model.backbone = dict(type=kind, depth=20)
    cfg.model.head.in_channels = 64
    slimmed(cfg, tmp_path)
    with pytest.raises(SlimError, match=r"^backbone is a CIFARResNet, which is mmcpd's own: it needs mmcpd"):
        export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'x.py')
    assert not (tmp_path / 'x.py').exists()


def test_a_config_names_classes_or_has_what_no_text_says(tmp_path):
    cfg = resnet50()
    slimmed(cfg, tmp_path)
    cfg.model.neck.type = GlobalAveragePooling
    export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'x.py')
    assert f"'{GlobalAveragePooling.__module__}.GlobalAveragePooling'" in (tmp_path / 'x.py').read_text()
    cfg.data_preprocessor.mean = np.array([1.0, 2.0, 3.0])
    with pytest.raises(SlimError, match=r'^model\.data_preprocessor\.mean is a ndarray, which cannot be written'):
        export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'y.py')
    assert not (tmp_path / 'y.py').exists()


def test_what_the_first_forward_makes_is_there(tmp_path):
    cfg = whole(table=True)
    model = build_dense(cfg)
    model(torch.rand(1, 3, SIZE, SIZE))
    small = cut(cfg, model, tmp_path / 'slim.pth')
    assert read_slim(tmp_path / 'slim.pth')['structure']['added']
    export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'x.py')
    twin = runpy.run_path(str(tmp_path / 'x.py'))['build']()
    assert torch.equal(twin.trunk.gains, small.trunk.gains)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda values: values.pop('head.fc.bias'), r'has no head\.fc\.bias'),
        (lambda values: values.update({'x.y': torch.ones(1)}), r'another model: it has x\.y'),
        (lambda values: values.update({'head.fc.bias': torch.ones(9)}), r'head\.fc\.bias is \(9,\) in it'),
        (lambda values: values.update({'head.fc.bias': torch.ones(5)}), None),
    ],
    ids=['lacks one', 'one more', 'other shape', 'fits'],
)
def test_weights_of_another_model_are_refused_by_the_file(tmp_path, change, message):
    cfg = resnet50()
    small = slimmed(cfg, tmp_path)
    export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'x.py')
    values = dict(named_tensors(small))
    change(values)
    write_tensors(tmp_path / 'other.safetensors', values, {})
    build = runpy.run_path(str(tmp_path / 'x.py'))['build']
    if message is None:
        assert build(tmp_path / 'other.safetensors').head.fc.bias.tolist() == [1] * 5
    else:
        with pytest.raises(ValueError, match=message):
            build(tmp_path / 'other.safetensors')


def test_what_computes_something_else_is_not_written(tmp_path, monkeypatch):
    cfg = resnet50()
    slimmed(cfg, tmp_path)
    written = 'mmcpd.engine.export_code.write_tensors'
    monkeypatch.setattr(
        written, lambda path, values, meta: write_tensors(path, {n: v * 2 for n, v in values.items()}, meta)
    )
    with pytest.raises(SlimError, match='is off the slim model by'):
        export_code(cfg, tmp_path / 'slim.pth', tmp_path / 'x.py')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['slim.pth']


def test_the_command(tmp_path, capfd):
    cfg = resnet50()
    slimmed(cfg, tmp_path)
    cfg.dump(tmp_path / 'my.py')
    words = (str(tmp_path / 'my.py'), str(tmp_path / 'slim.pth'))
    with pytest.raises(SystemExit) as stop:
        run(command, words)
    out = capfd.readouterr().out
    assert stop.value.code == 0 and f'wrote {tmp_path}/slim_model.py and {tmp_path}/slim_model.safetensors' in out
    for name, message in (('x.txt', 'must be a .py file'), ('3-x.py', 'must be a .py file')):
        with pytest.raises(SystemExit) as stop:
            run(command, (*words, '--out', str(tmp_path / name)))
        assert stop.value.code == 1 and message in capfd.readouterr().err
