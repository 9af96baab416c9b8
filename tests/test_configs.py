"""Hold every config in configs/cpd to what it promises, and run the embedded ones, in miniature, as users do."""

from __future__ import annotations

import ast
import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS, DefaultScope
from torch import nn

from mmcpd.engine.build import build_dense
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.slim_file import read_slim
from mmcpd.prune import check_reachable, reachable, select, shares
from mmcpd.slim import slim
from tests.helpers import config_params, count
from tests.test_tools.conftest import tool  # noqa: F401

FOLDER = Path(__file__).resolve().parents[1] / 'configs' / 'cpd'
NAMES = sorted(path.stem for path in FOLDER.glob('*.py'))
FULL_SCALE = [name for name in NAMES if name.endswith(('_in1k', '_ade20k', '_coco'))]
# Where combing at the size of the config would take long; what can be reached hardly depends on it.
SHAPES = {
    'vit_prune_ade20k': (3, 128, 128),
    'seaformer_prune_ade20k': (3, 256, 256),
    **{name: (3, 256, 256) for name in NAMES if name.endswith('_coco')},
}


def read(name: str) -> Config:
    return Config.fromfile(FOLDER / f'{name}.py')


def code_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith('#')]


def combed(name: str):
    """Return the PruneHook of a config, its dense model with random weights, and the coupling."""
    cfg = read(name)
    torch.manual_seed(0)
    model = build_dense(cfg).eval()
    return HOOKS.build(cfg.default_hooks.prune), model, comb_by_config(model, cfg, input_shape=SHAPES.get(name))


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """Neither data nor network."""

    def refuse(*_):
        raise AssertionError('a config must not need the network before it trains')

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('socket.socket.connect', refuse)


@pytest.mark.parametrize('name', config_params(name for name in NAMES if name not in FULL_SCALE))
def test_it_builds_and_combs_and_its_target_is_within_reach(nowhere, name):
    builds_combs_and_reaches(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', config_params(FULL_SCALE))
def test_a_full_scale_one_does_so_too(nowhere, name):
    builds_combs_and_reaches(name)


def builds_combs_and_reaches(name: str) -> None:
    hook, model, coupling = combed(name)
    cfg = read(name)
    teacher = cfg.model.get('teacher', 'self')
    given = {'data_preprocessor': cfg.get('data_preprocessor'), 'teacher': 'self'}  # another's weights are not here
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        distiller = MODELS.build({**cfg.model, **given})
    assert teacher == 'self' or teacher.keys() == {'config', 'checkpoint'}
    assert distiller.loss_configs
    assert [key for key in distiller.state_dict() if not key.startswith('distill.')] == list(model.state_dict())
    prunable, total = coupling.prunable()
    # DETR adds positions, which no layer computes, to its queries and keys: their width stays.
    assert prunable / total > (0.7 if name.startswith('detr_') else 0.95), coupling.reasons().most_common(3)
    assert not coupling.unsupported
    check_reachable(coupling, hook.schedule.resolve(100_000), **hook.floors)


@pytest.mark.parametrize('name', config_params(NAMES))
def test_it_inherits_what_it_does_not_say(name, tmp_path):
    text = (FOLDER / f'{name}.py').read_text()
    if re.search(r"^_base_ = '\./\w+_prune\.py'$", text, re.MULTILINE):  # it differs from its base by a few lines
        assert len(code_lines(text)) <= 6
        return
    bases = next(
        ast.literal_eval(node.value) for node in ast.parse(text).body if ast.unparse(node.targets[0]) == '_base_'
    )
    bases = [bases] if isinstance(bases, str) else bases
    paths = [str(FOLDER / base) if base.startswith('.') else base for base in bases]
    (tmp_path / 'bases.py').write_text(f'_base_ = {paths!r}\n')
    cfg, inherited = read(name), Config.fromfile(tmp_path / 'bases.py')
    kinds = {key: hook.type for key, hook in inherited.get('default_hooks', {}).items() if 'type' in hook}
    assert {key: hook.type for key, hook in cfg.default_hooks.items() if 'type' in hook} == {
        **kinds,
        'prune': 'mmcpd.PruneHook',
    }
    assert cfg.get('custom_hooks') == inherited.get('custom_hooks')
    assert not {'prune', 'comb'} & cfg.keys()
    assert len(code_lines(text)) <= (32 if name in FULL_SCALE else 20)


def test_a_user_s_own_config_is_eight_lines():
    assert len(code_lines((FOLDER / 'mobilevit_prune.py').read_text())) == 8


@pytest.mark.parametrize('name', config_params(FULL_SCALE))
def test_full_scale_starts_from_the_checkpoint_that_openmmlab_lists_for_its_base(name):
    cfg, text = read(name), (FOLDER / f'{name}.py').read_text()
    if name.startswith('seaformer'):
        assert '://' not in cfg.load_from  # OpenMMLab has none
        assert 'OpenMMLab publishes no SeaFormer' in text
        return
    package, base = re.search(r"_base_ = '(\w+)::(.+?\.py)'", text).groups()
    configs = Path(find_spec(package).origin).parent / '.mim' / 'configs'
    (metafile,) = (configs / base).parent.glob('metafile.y*ml')
    (listed,) = [m for m in yaml.safe_load(metafile.read_text())['Models'] if m['Config'] == f'configs/{base}']
    # Forks mirror the files at hosts of their own.
    host, _, path = cfg.load_from.removeprefix('https://').partition('/')
    assert host == 'download.openmmlab.com'
    assert listed['Weights'].removeprefix('https://').partition('/')[2] == path


def test_without_a_checkpoint_seaformer_says_so_before_it_trains(tool, tmp_path):  # noqa: F811
    for split in ('training', 'validation'):
        for kind in ('images', 'annotations'):
            (tmp_path / 'data/ade/ADEChallengeData2016' / kind / split).mkdir(parents=True)
    code, _, err = tool('train', FOLDER / 'seaformer_prune_ade20k.py')
    assert code == 1
    (line,) = err.strip().splitlines()
    assert 'load_from' in line
    assert 'data/seaformer_l_ade20k.pth' in line


@pytest.mark.parametrize(('name', 'fewer'), [('resnext50_prune_in1k', 4.31), ('mobilenetv2_prune_in1k', 2)])
@torch.no_grad()
def test_structure_alone_reaches_the_target_with_every_layer_alive(name, fewer):
    hook, model, coupling = combed(name)
    target, floors = hook.schedule.target, hook.floors
    assert target == {'macs': pytest.approx(1 / fewer)}
    assert reachable(coupling, **floors)['macs'] < 0.2 / fewer
    generator = torch.Generator().manual_seed(0)
    scores = {name: torch.rand(len(keep), generator=generator) for name, keep in coupling.keep().items()}
    keep = select(scores, coupling, coupling.keep(), target, **floors)
    assert 0.95 / fewer < shares(coupling, keep)['macs'] <= 1 / fewer
    small = slim(model, coupling, keep)
    layers = {n: m for n, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert layers.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert min(min(layer.weight.shape[:2]) for layer in layers.values()) >= 1
    assert all(len(layer.weight) % getattr(layer, 'groups', 1) == 0 for layer in layers.values())
    assert count(coupling, model)[0] > fewer * count(coupling, small)[0]  # counted while they run


# The embedded configs in miniature: a few batches of few pictures, narrower where weights would fill the disk.

DIGITS = [
    'train_cfg.max_epochs=5',
    'train_cfg.val_interval=5',
    'train_dataloader.batch_size=8',
    'train_dataloader.dataset.indices=32',
    'val_dataloader.dataset.indices=16',
    'test_dataloader.dataset.indices=16',
    'default_hooks.prune.interval=2',
    'default_hooks.prune.round_to=2',
]
ITERATIONS = [
    'train_cfg.max_iters=20',
    'train_cfg.val_interval=20',
    'default_hooks.checkpoint.interval=20',
    'default_hooks.logger.interval=1',
    'param_scheduler.0.end=2',
    'param_scheduler.1.begin=2',
    'param_scheduler.1.periods=[8,10]',
    'train_dataloader.batch_size=4',
    'default_hooks.prune.interval=2',
]
SCENES = [*ITERATIONS, 'val_dataloader.dataset.length=4', 'test_dataloader.dataset.length=4']
BOXES = [
    *(option for option in SCENES if 'batch_size' not in option),
    'train_dataloader.batch_size=2',
    'default_hooks.prune.round_to=2',
]
RESNET = ['model.student.backbone.stem_channels=16', 'model.student.backbone.base_channels=16']
MINIATURES = {
    'mobilevit_prune': DIGITS,
    'vit_prune': SCENES,
    'retinanet_prune': BOXES,
    'fcos_prune': BOXES,
    'rtmdet_prune': BOXES,
    'detr_prune': BOXES,
    'seaformer_prune': SCENES,
    'mobilenetv2_prune': [*DIGITS, 'model.student.backbone.widen_factor=0.5'],
    'resnext50_prune': [
        *DIGITS,
        *RESNET,
        'model.student.backbone.groups=8',
        'model.student.head.in_channels=512',
    ],
    'resnet50_prune': [
        *DIGITS,
        *RESNET,
        'model.student.backbone.expansion=4',
        'model.student.head.in_channels=512',
    ],
    'camvid_mobilenetv2_prune': [
        *ITERATIONS,
        'model.student.backbone.init_cfg=None',
        'train_dataloader.num_workers=0',
        'val_dataloader.num_workers=0',
        'test_dataloader.num_workers=0',
        'train_dataloader.persistent_workers=False',
        'val_dataloader.persistent_workers=False',
        'test_dataloader.persistent_workers=False',
    ],
}
FAST = ('mobilevit_prune', 'vit_prune', 'mobilenetv2_prune', 'retinanet_prune')


def test_every_embedded_config_has_a_miniature():
    texts = {name: (FOLDER / f'{name}.py').read_text() for name in NAMES if name not in FULL_SCALE}
    own = [name for name, text in texts.items() if "_base_ = './" not in text]
    cifar = [name for name in own if name.endswith('_cifar10')]  # data that are not here; see the tests below
    assert sorted([*MINIATURES, *cifar]) == own


@pytest.fixture
def cifar(tmp_path):
    """Two noisy pictures of each class and split, in the folders of CIFAR-10."""
    rng = np.random.default_rng(0)
    for split in ('train', 'test'):
        for name in read('resnet20_prune_cifar10').classes:
            (tmp_path / 'data/cifar10' / split / name).mkdir(parents=True)
            for index in range(2):
                picture = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
                cv2.imwrite(str(tmp_path / f'data/cifar10/{split}/{name}/{index}.png'), picture)


@pytest.mark.parametrize(
    ('name', 'params', 'macs'),
    [('resnet20', 272_474, 40.8), ('resnet56', 855_770, 125.7), ('vit', 1_834_186, 125.0)],
)
def test_the_models_for_cifar_are_those_that_published_weights_fit(name, params, macs):
    _, model, coupling = combed(f'{name}_prune_cifar10')
    cost = coupling.cost(coupling.keep())
    assert (cost.params, round(cost.macs / 1e6, 1)) == (params, macs)
    preprocessor = model.data_preprocessor
    assert preprocessor.to_rgb and preprocessor.mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


@pytest.mark.parametrize('name', ['resnet20_prune_cifar10', 'vit_prune_cifar10'])
def test_a_trained_model_is_pruned_at_once_and_distilled_without_labels(tool, cifar, tmp_path, name):  # noqa: F811
    torch.manual_seed(0)
    torch.save({'state_dict': build_dense(read(name)).state_dict()}, tmp_path / 'dense.pth')
    options = ['load_from=dense.pth', 'train_cfg.max_epochs=1', 'train_dataloader.batch_size=8']
    for loader in ('train', 'val', 'test'):
        options += [f'{loader}_dataloader.{option}' for option in ('num_workers=0', 'persistent_workers=False')]
    code, _, err = tool('train', FOLDER / f'{name}.py', '--work-dir', 'w', '--cfg-options', *options)
    assert code == 0, err[-3000:]
    meta = read_slim(tmp_path / 'w/slim.pth')['meta']
    assert (tmp_path / 'w/report.html').is_file() and (tmp_path / 'w/card.md').is_file()
    assert 0.4 < meta['slim']['macs'] / meta['dense']['macs'] <= 0.5
    (log,) = (tmp_path / 'w').glob('*/*.log')
    text = log.read_text()
    assert 'chosen at once' in text and 'loss_distill_kd' in text and 'loss_task' not in text
    assert ('rotated 18 heads' in text) == name.startswith('vit')


@pytest.fixture
def camvid(tmp_path):
    """Four noisy pictures for each split, in CamVid's folders and of its size."""
    rng = np.random.default_rng(0)
    for split in ('train', 'val', 'test'):
        for kind in ('images', 'annotations'):
            (tmp_path / 'data/camvid' / kind / split).mkdir(parents=True)
        for index in range(4):
            labels = np.kron(rng.integers(0, 12, (6, 8)), np.ones((60, 60))).astype(np.uint8)
            picture = np.clip(labels[..., None] * 20 + rng.integers(0, 30, (360, 480, 3)), 0, 255).astype(np.uint8)
            cv2.imwrite(str(tmp_path / f'data/camvid/images/{split}/{index}.jpg'), picture)
            labels[labels == 11] = 255
            cv2.imwrite(str(tmp_path / f'data/camvid/annotations/{split}/{index}.png'), labels)


@pytest.mark.parametrize('name', config_params(FAST))
def test_it_trains_prunes_slims_and_tests(tool, request, tmp_path, name):  # noqa: F811
    run(tool, request, tmp_path, name)


@pytest.mark.slow  # exporting takes half a minute
@pytest.mark.parametrize('name', config_params(MINIATURES))
def test_from_the_config_to_a_slim_onnx_file(tool, request, tmp_path, name):  # noqa: F811
    config, options = run(tool, request, tmp_path, name)
    code, _, err = tool('deploy', config, 'w/slim.pth', '--no-bench', *options)
    assert code == 0, err[-3000:]
    dense, small = json.loads((tmp_path / 'w/latency.json').read_text())['models']
    assert small['params'] < dense['params']
    assert (tmp_path / 'w/slim.onnx').stat().st_size < (tmp_path / 'w/dense.onnx').stat().st_size


def run(tool, request, tmp_path, name):  # noqa: F811
    """Train, prune, slim and test a miniature; return its config and the options."""
    config = FOLDER / f'{name}.py'
    if name == 'mobilevit_prune':  # a user's own config, in a folder of its own
        config = Path(shutil.copy(config, tmp_path))
    if name.startswith('camvid'):
        request.getfixturevalue('camvid')
    options = ['--cfg-options', *MINIATURES[name]]
    code, _, err = tool('train', config, '--work-dir', 'w', *options)
    assert code == 0, err[-3000:]
    meta = read_slim(tmp_path / 'w/slim.pth')['meta']
    ((quantity, target),) = read(name).default_hooks.prune.target.items()
    assert 0.5 * target < meta['slim'][quantity] / meta['dense'][quantity] <= target
    (log,) = (tmp_path / 'w').glob('*/*.log')
    assert 'loss_distill_' in log.read_text()

    code, out, err = tool('test', config, 'w/slim.pth', *options)
    assert code == 0, err[-3000:]
    metric = 'accuracy/top1' if 'accuracy/top1' in meta['slim']['metrics'] else next(iter(meta['slim']['metrics']))
    (line,) = [line for line in out.splitlines() if line.startswith(f'{metric}: ')]
    if not name.startswith('camvid'):  # which tests on other pictures than it validates on
        assert float(line.split(': ')[1]) == pytest.approx(meta['slim']['metrics'][metric], abs=0.02)
    return config, options
