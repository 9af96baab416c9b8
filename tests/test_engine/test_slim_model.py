"""Models built from a slim.pth: what would load other weights does not, and they are pruned further."""

from __future__ import annotations

import copy

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel, BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmcpd.engine import checkpoints, saving
from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.slim_file import save_slim
from mmcpd.engine.slim_model import build_trained
from mmcpd.errors import SlimError
from mmcpd.slim import mask_, slim, structure
from mmcpd.slim.trial import random_keep
from tests.test_engine.test_checkpoints import SIZE, config, vit

IMAGES = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@MODELS.register_module()
class Trunk(BaseModule):
    """Reads a file, or draws its weights anew, in an `init_weights` of its own; makes a table in its first forward."""

    def __init__(self, table=False, init_cfg=None):
        super().__init__(init_cfg)
        self.a, self.b, self.table = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), None
        self.wants = table

    def init_weights(self):
        if self.init_cfg is None:
            nn.init.ones_(self.a.weight)
        else:
            self.load_state_dict(torch.load(self.init_cfg['checkpoint'], weights_only=True))

    def forward(self, x):
        x = self.a(x).relu()
        if self.wants and 'gains' not in self._buffers:
            self.register_buffer('gains', torch.rand(x.shape[1], 1, 1))
        return self.b(x * self.gains if self.wants else x).relu()


@MODELS.register_module()
class Whole(BaseModel):
    def __init__(self, trunk, dropping=False, data_preprocessor=None, init_cfg=None):
        super().__init__(data_preprocessor, init_cfg)
        self.trunk, self.fc = MODELS.build(trunk), nn.Linear(6, 3)
        if dropping:
            self._register_state_dict_hook(self.written)
            self.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())

    @staticmethod
    def written(module, state, prefix, _):
        for name in [name for name in state if 'trunk' in name]:
            del state[name]

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return self.fc(self.trunk(inputs).mean((2, 3)))


def whole(dropping=False, **trunk):
    hook = dict(prune=dict(type='mmcpd.PruneHook', input_shape=(3, SIZE, SIZE)))
    model = dict(type='Whole', dropping=dropping, trunk=dict(type='Trunk', **trunk))
    return Config(dict(model=model, default_scope='mmengine', default_hooks=hook))


def pretrained(path):
    return dict(type='Pretrained', checkpoint=str(path))


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES, mode='tensor')


def cut(cfg, model, path, ratio=0.6, seed=0):
    """Slim a model and save it as training does; return the slim one."""
    found = comb_by_config(model.eval(), cfg)
    small = slim(model, found, random_keep(found, ratio, seed))
    save_slim(path, small, structure(build_dense(cfg), small), {'input_shape': [3, SIZE, SIZE]})
    return small


def slim_config(cfg, path):
    return Config({**cfg.to_dict(), 'model': dict(type='mmcpd.slimmed', model=cfg.model, structure=str(path))})


def lora(**options):
    backbone = vit().model.backbone.to_dict()
    targets = [dict(type='qkv'), dict(type='.*ffn.layers.1')]
    adapted = dict(type='LoRAModel', module={**backbone, **options}, rank=2, alpha=2, targets=targets)
    return config(model={**vit().model.to_dict(), 'backbone': adapted})


# -- nothing replaces the weights --------------------------------------------------------------------------------------
def test_no_init_weights_reads_another_file_into_a_slim_model(tmp_path):
    torch.save(Trunk().state_dict(), tmp_path / 'trunk.pth')
    cfg = whole(init_cfg=pretrained(tmp_path / 'trunk.pth'))
    small = cut(cfg, build_dense(cfg), tmp_path / 'slim.pth')
    (tmp_path / 'trunk.pth').unlink()
    model = build_trained(slim_config(cfg, tmp_path / 'slim.pth'))
    for part in (model, model.trunk, copy.deepcopy(model).trunk):
        part.init_weights()
    assert torch.equal(outputs(model), outputs(small))
    with pytest.raises(FileNotFoundError):  # the dense model would read it
        build_dense(cfg).init_weights()


def swin():
    arch = dict(embed_dims=8, depths=[1, 1], num_heads=[1, 2])
    backbone = dict(type='SwinTransformer', arch=arch, img_size=SIZE, window_size=4, out_indices=(1,))
    head = dict(type='LinearClsHead', num_classes=5, in_channels=16)
    return config(
        model=dict(type='ImageClassifier', backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    )


@pytest.mark.parametrize('cfg', [swin(), vit()], ids=['swin', 'vit'])
def test_shipped_backbones_with_an_init_weights_of_their_own_keep_the_slim_ones(cfg, tmp_path):
    cfg.model.backbone.init_cfg = pretrained(tmp_path / 'nowhere.pth')
    small = cut(cfg, build_dense(cfg), tmp_path / 'slim.pth')
    model = build_trained(slim_config(cfg, tmp_path / 'slim.pth'))
    model.init_weights()
    assert torch.equal(outputs(model), outputs(small))


# -- what checkpoints leave out ----------------------------------------------------------------------------------------
def test_a_slim_file_of_a_lora_model_holds_its_trunk_too(tmp_path):
    cfg = lora()
    torch.manual_seed(1)
    dense = build_dense(cfg)
    for parameter in dense.parameters():
        nn.init.normal_(parameter, std=0.3)
    small = cut(cfg, dense, tmp_path / 'slim.pth')
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in dense.parameters())
    assert len(small.state_dict()) < len(torch.load(tmp_path / 'slim.pth', weights_only=True)['state_dict'])
    twin = checkpoints.load_slim(cfg, tmp_path / 'slim.pth')
    assert torch.equal(outputs(twin), outputs(small))
    assert not torch.equal(outputs(twin), outputs(dense))


@pytest.mark.parametrize('adapted', [False, True])
def test_a_training_checkpoint_without_the_trunk_takes_what_the_config_loads(adapted, tmp_path):
    trunk = build_dense(vit() if adapted else whole())
    torch.save((trunk.backbone if adapted else trunk.trunk).state_dict(), tmp_path / 'trunk.pth')
    options = dict(init_cfg=pretrained(tmp_path / 'trunk.pth'))
    with_file, without = (lora(**o) if adapted else whole(dropping=True, **o) for o in (options, {}))
    trained = build_dense(with_file)
    trained.init_weights()
    torch.save({'state_dict': trained.state_dict()}, tmp_path / 'epoch_1.pth')
    assert torch.equal(outputs(checkpoints.load_dense(with_file, tmp_path / 'epoch_1.pth')), outputs(trained))
    if adapted:  # drawn at random otherwise
        with pytest.raises(SlimError, match=r'epoch_1\.pth leaves out backbone\..*, as ImageClassifier writes'):
            checkpoints.load_dense(without, tmp_path / 'epoch_1.pth')


def test_a_training_checkpoint_with_what_the_first_forward_made(tmp_path):
    cfg = whole(table=True)
    dense = build_dense(cfg)
    expected = outputs(dense)
    torch.save({'state_dict': dense.state_dict()}, tmp_path / 'epoch_1.pth')
    assert torch.equal(outputs(checkpoints.load_dense(cfg, tmp_path / 'epoch_1.pth')), expected)
    small = cut(cfg, dense, tmp_path / 'slim.pth')
    assert torch.equal(outputs(checkpoints.load_slim(cfg, tmp_path / 'slim.pth')), outputs(small))
    torch.save({'state_dict': {**dense.state_dict(), 'trunk.other': torch.ones(1)}}, tmp_path / 'odd.pth')
    with pytest.raises(SlimError, match=r'odd\.pth is of another model: it has trunk\.other'):
        checkpoints.load_dense(cfg, tmp_path / 'odd.pth')


# -- pruned further ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('cfg', [config(), vit()], ids=['resnet', 'vit'])
def test_a_slim_model_that_was_pruned_again_loads_with_every_config(cfg, tmp_path):
    first, second = tmp_path / 'first.pth', tmp_path / 'second.pth'
    one = cut(cfg, build_dense(cfg), first)
    again = slim_config(cfg, first)
    model = build_trained(again)
    assert torch.equal(outputs(model), outputs(one))
    small = cut(again, model, second, seed=1)
    counts = [sum(p.numel() for p in m.parameters()) for m in (small, one, build_dense(again))]
    assert counts == sorted(set(counts))
    for each in (cfg, again, slim_config(again, second)):
        assert torch.equal(outputs(checkpoints.load_slim(each, second)), outputs(small))
    assert torch.equal(outputs(build_trained(slim_config(again, second))), outputs(small))
    first.unlink()  # the second one says it all
    assert torch.equal(outputs(build_trained(slim_config(again, second))), outputs(small))


def test_training_checkpoints_of_a_slim_model_are_those_of_the_slim_model(tmp_path):
    cfg = config()
    one = cut(cfg, build_dense(cfg), tmp_path / 'first.pth')
    again = slim_config(cfg, tmp_path / 'first.pth')
    torch.save({'state_dict': {n: v + 1 for n, v in one.state_dict().items()}}, tmp_path / 'epoch_1.pth')
    loaded = checkpoints.load_dense(again, tmp_path / 'epoch_1.pth')
    assert torch.equal(loaded.head.fc.weight, one.head.fc.weight + 1)
    with pytest.raises(SlimError, match='another model'):
        checkpoints.load_dense(cfg, tmp_path / 'epoch_1.pth')
    used = copy.deepcopy(again)
    saving.use_checkpoint(used, tmp_path / 'epoch_1.pth', tmp_path)
    assert used.model.type == 'mmcpd.slimmed' and used.load_from == str(tmp_path / 'epoch_1.pth')

    found = comb_by_config(loaded, again)
    keep = random_keep(found, 0.5, 2)
    mask_(loaded, found, keep)
    pruner = {'keep': keep, 'importance': {}, 'iteration': 1, 'last': 1, 'waiting': False, 'frozen': []}
    state = {'pruner': pruner, 'begun': True, 'dense_metrics': {}, 'dense_digest': '', 'best_before': []}
    state |= {'left': {'macs': 0.5}, 'target': {'macs': 0.5}, 'input_shape': [3, SIZE, SIZE]}
    torch.save({'state_dict': loaded.state_dict(), 'mmcpd': state}, tmp_path / 'epoch_2.pth')
    assert checkpoints.removed_units(checkpoints.read_checkpoint(tmp_path / 'epoch_2.pth')) > 0
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert torch.equal(outputs(checkpoints.load_dense(again, tmp_path / 'epoch_2.pth')), outputs(loaded))
