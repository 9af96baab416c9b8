"""tools/prune.py: a smaller model from a checkpoint and a few pictures, and one clear line on bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmcpd.cli.curve import write_curve
from mmcpd.cli.stages import Stages
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_dense, load_slim
from mmcpd.engine.pictures import pictures
from mmcpd.engine.slim_file import read_slim
from mmcpd.slim.compare import evaluating
from tests.test_tools.conftest import ROOT
from tests.test_tools.test_train import only_line

SMALL = ('--pictures', 32)


@pytest.fixture
def dense(tiny, tmp_path) -> Path:
    """A checkpoint with statistics that a model has which saw data."""
    torch.manual_seed(0)
    model = build_dense(tiny).train()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 32, 32))
    path = tmp_path / 'dense.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path


def outputs(model: torch.nn.Module, config: Path) -> torch.Tensor:
    """Return what a model says about other digits than it was fitted on."""
    with evaluating(model):
        return model(torch.cat(pictures(config, model, 32, seed=1)))


def test_it_writes_a_slim_model_and_a_report(tool, tiny, dense, tmp_path):
    code, out, err = tool('prune', tiny, dense, '--target', 'macs=0.5', *SMALL)
    assert code == 0, err
    folder = tmp_path / 'work_dirs' / 'tiny'
    names = ['card.md', 'config.py', 'coupling.txt', 'prune.json', 'refit.txt', 'report.html', 'slim.pth']
    assert sorted(path.name for path in folder.iterdir()) == names
    page, command = (folder / 'report.html').read_text(), f'mmcpd prune {tiny} {dense} --target macs=0.5'
    assert command in page and '<h2>The model</h2>' in page and 'the model was pruned at once' in page
    assert '<h2>Predictions</h2>' in page, page[page.index('What is not in this') :]
    assert 'load_slim(&#x27;config.py&#x27;, &#x27;slim.pth&#x27;)' in page
    assert 'backbone.conv1' in (folder / 'coupling.txt').read_text()
    assert 'backbone.conv1' in (folder / 'refit.txt').read_text()
    report = json.loads((folder / 'prune.json').read_text())
    small = load_slim(tiny, folder / 'slim.pth')
    assert sum(p.numel() for p in small.parameters()) == report['slim']['params'] < report['dense']['params']
    assert 0.3 < report['slim']['macs'] / report['dense']['macs'] <= 0.5
    assert report['slim']['memory'] < report['dense']['memory']
    assert set(report['dense']['metrics']) == set(report['slim']['metrics']) == {'accuracy/top1'}
    assert {'read pictures', 'comb', 'score', 'refit', 'slim', 'validate dense'} <= report['seconds'].keys()
    assert report['settings']['pictures'] == 32 and 'torch' in report['versions']
    assert 'layers refitted' in out and 'MACs' in out and '0:00 left' in err
    assert read_slim(folder / 'slim.pth')['meta']['slim']['units'] == report['slim']['units']
    code, out, err = tool('test', tiny, folder / 'slim.pth')
    assert code == 0, err
    assert f'{report["slim"]["metrics"]["accuracy/top1"]:.4f}' in out


def test_refitting_brings_the_outputs_nearer(tool, tiny, dense, tmp_path):
    for name, options in (('with', []), ('without', ['--no-refit'])):
        assert tool('prune', tiny, dense, '--target', 'macs=0.5', *SMALL, '--out', name, *options)[0] == 0
    wanted = outputs(load_dense(tiny, dense), tiny)
    files = [tmp_path / name / 'slim.pth' for name in ('with', 'without')]
    gaps = [(outputs(load_slim(tiny, file), tiny) - wanted).norm() for file in files]
    assert gaps[0] < 0.6 * gaps[1]
    assert (tmp_path / 'without' / 'refit.txt').read_text() == 'not refitted\n'
    assert not json.loads((tmp_path / 'without' / 'prune.json').read_text())['settings']['refit']


def test_distillation_goes_on_from_there_without_labels(tool, tiny, dense, tmp_path):
    code, _, err = tool('prune', tiny, dense, '--target', 'macs=0.5', *SMALL, '--distill', 3, '--lr', 0.001)
    assert code == 0, err
    report = json.loads((tmp_path / 'work_dirs' / 'tiny' / 'prune.json').read_text())
    assert report['before_distillation']['metrics'] and 'distil' in report['seconds']
    assert 'distil: 3/3 iterations' in err


def test_pictures_from_any_folder(tool, tiny, dense, tmp_path):
    folder = tmp_path / 'photos' / 'inside'
    folder.mkdir(parents=True)
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 32, 3), np.uint8)
        cv2.imwrite(str(folder / f'{number}.png'), pixels)
    # no data of the config are there, and none are needed
    gone = ('--cfg-options', 'train_dataloader=None', 'val_dataloader=None', 'val_evaluator=None')
    options = ('--images', folder.parent, '--distill', 2, '--out', 'o')
    code, _, err = tool('prune', tiny, dense, '--target', 'macs=0.5', '--pictures', 8, *options, *gone)
    assert code == 0, err
    assert load_slim(tiny, tmp_path / 'o' / 'slim.pth')


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
def test_it_prunes_and_distils_on_a_device(tool, tiny, dense, tmp_path, device):
    arguments = ('--target', 'macs=0.5', *SMALL, '--distill', 3, '--device', device)
    code, _, err = tool('prune', tiny, dense, *arguments, '--out', 'a')
    assert code == 0, err
    weights = read_slim(tmp_path / 'a' / 'slim.pth')['state_dict']
    assert {tensor.device.type for tensor in weights.values()} == {'cpu'}
    found = json.loads((tmp_path / 'a' / 'prune.json').read_text())
    assert found['slim']['macs'] <= 0.5 * found['dense']['macs']
    code, _, err = tool('deploy', tiny, tmp_path / 'a' / 'slim.pth', '--runs', 20)
    assert code == 0, err


def test_a_slim_model_is_pruned_further(tool, tiny, dense, tmp_path):
    assert tool('prune', tiny, dense, '--target', 'macs=0.6', *SMALL, '--no-validate', '--out', 'a')[0] == 0
    code, _, err = tool('prune', tiny, tmp_path / 'a' / 'slim.pth', '--target', 'macs=0.5', *SMALL, '--out', 'b')
    assert code == 0, err
    first, second = (json.loads((tmp_path / name / 'prune.json').read_text()) for name in 'ab')
    assert second['dense']['macs'] == first['slim']['macs']
    assert second['slim']['macs'] <= 0.5 * first['slim']['macs']
    small = load_slim(tiny, tmp_path / 'b' / 'slim.pth')
    assert sum(p.numel() for p in small.parameters()) == second['slim']['params']


def test_averaged_weights_are_those_that_are_pruned(tool, tiny, tmp_path):
    averaging = tiny.with_name('averaging.py')
    averaging.write_text("_base_ = './tiny.py'\ncustom_hooks = [dict(type='EMAHook', momentum=0.5)]\n")
    assert tool('train', averaging, '--work-dir', 'w', '--cfg-options', 'train_cfg.max_epochs=1')[0] == 0
    checkpoint = torch.load(tmp_path / 'w' / 'epoch_1.pth', weights_only=False)
    assert 'ema_state_dict' in checkpoint
    averaged = load_dense(tiny, tmp_path / 'w' / 'epoch_1.pth')
    assert torch.equal(averaged.head.fc.weight, checkpoint['state_dict']['head.fc.weight'])
    other = checkpoint['ema_state_dict']['module.head.fc.weight']
    assert not torch.equal(averaged.head.fc.weight, other)
    code, _, err = tool('prune', tiny, tmp_path / 'w' / 'epoch_1.pth', '--target', 'macs=0.5', *SMALL)
    assert code == 0, err


def test_a_pruned_training_checkpoint_is_pruned_further(tool, pruning, tmp_path):
    assert tool('train', pruning, '--no-validate')[0] == 0
    work = tmp_path / 'work_dirs' / 'prune'
    checkpoint, trained = work / 'epoch_4.pth', read_slim(work / 'slim.pth')['meta']['slim']
    code, _, err = tool('prune', pruning, checkpoint, '--target', 'macs=0.7', *SMALL, '--no-validate', '--out', 'o')
    assert code == 0, err
    dense = json.loads((tmp_path / 'o' / 'prune.json').read_text())['dense']
    assert {name: dense[name] for name in ('macs', 'params')} == {name: trained[name] for name in ('macs', 'params')}
    assert load_slim(pruning, tmp_path / 'o' / 'slim.pth')


def test_the_options_of_a_prune_hook_hold(tool, pruning, dense, tmp_path):
    own = pruning.with_name('own.py')
    hook = "dict(ignore=['backbone.layer1.*'], importance='magnitude', min_units=3, seed=5)"
    own.write_text(f"_base_ = './prune.py'\ndefault_hooks = dict(prune={hook})\n")
    code, _, err = tool('prune', own, dense, *SMALL, '--no-validate')
    assert code == 0, err
    content = read_slim(tmp_path / 'work_dirs' / 'own' / 'slim.pth')
    shapes = content['structure']['tensors']
    assert shapes['backbone.layer1.0.conv1.weight'][0] == 8 > shapes['backbone.layer2.0.conv1.weight'][1]
    assert all(shape[0] >= 3 for shape in shapes.values())
    assert json.loads((tmp_path / 'work_dirs' / 'own' / 'prune.json').read_text())['settings']['seed'] == 5
    assert 0.4 < content['meta']['slim']['macs'] / content['meta']['dense']['macs'] <= 0.5  # its target too
    hessian = '--cfg-options', 'default_hooks.prune.importance=hessian'
    code, out, _ = tool('prune', own, dense, *SMALL, '--no-validate', *hessian)
    assert code == 0 and "importance 'hessian' reads the gradients of a loss" in out


@pytest.mark.slow
def test_several_targets_make_a_curve(tool, tiny, dense, tmp_path):
    pytest.importorskip('onnxruntime')
    targets = ('--target', 'macs=0.7', '--target', 'macs=0.5', 'params=0.6')
    code, out, err = tool('prune', tiny, dense, *targets, *SMALL, '--out', 'o')
    assert code == 0, err
    names = ['dense', 'macs-0.7', 'macs-0.5_params-0.6']
    rows = json.loads((tmp_path / 'o' / 'curve.json').read_text())['rows']
    assert [row['name'] for row in rows] == names
    assert rows[0]['macs'] > rows[1]['macs'] > rows[2]['macs'] and rows[2]['params'] <= 0.6 * rows[0]['params']
    assert all(row['ms'] > 0 and row['metrics'] for row in rows)
    assert (tmp_path / 'o' / 'curve.png').read_bytes()[:4] == b'\x89PNG'
    assert all((tmp_path / 'o' / name / 'slim.pth').is_file() for name in names[1:])
    assert err.count('score: ') == 1  # for both
    seconds = [json.loads((tmp_path / 'o' / name / 'prune.json').read_text())['seconds'] for name in names[1:]]
    assert 'score' in seconds[0] and 'score' not in seconds[1] and seconds[0]['comb'] == seconds[1]['comb']
    assert all(name in out for name in names)


def test_a_curve_is_timed_on_the_threads_that_were_asked_for(monkeypatch, tmp_path):
    pytest.importorskip('onnxruntime')
    seen = {}

    def deploy(*_, **options):
        seen.update(options)
        raise InterruptedError

    monkeypatch.setattr('mmcpd.deploy.deploy', deploy)
    with pytest.raises(InterruptedError):
        write_curve(tmp_path, {}, [], torch.zeros(1, 3, 8, 8), 3, Stages())
    assert seen['threads'] == 3


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['{tiny}', '{dense}'], '--target: say what remains'),
        (['{tiny}', '{dense}', '--target', 'macs'], "--target: 'macs' is not QUANTITY=SHARE"),
        (['{tiny}', '{dense}', '--target', 'flops=0.5'], "unknown quantity 'flops'"),
        (['{tiny}', '{dense}', '--target', 'macs=1.5'], 'between 0 and 1'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--target', 'macs=1e-5'], 'macs cannot go down to 0.0000'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--target', 'macs=0.50'], '--target: macs-0.5 is there twice'),
        (['{bare}', '{dense}', '--target', 'macs=0.5', '--distill', '5'], 'has no optim_wrapper with an lr'),
        (['{mistaken}', '{dense}', '--target', 'macs=0.5'], "unknown importance 'gaus_newton'"),
        (['{tiny}', '{dense}', '--target', 'macs=0.0001'], 'macs cannot go down to 0.0001'),
        (['{tiny}', 'none.pth', '--target', 'macs=0.5'], 'checkpoint: there is no checkpoint none.pth'),
        (['none.py', '{dense}', '--target', 'macs=0.5'], 'none.py: there is no such config'),
        (['{tiny}', '{tiny}', '--target', 'macs=0.5'], 'truncated or not a checkpoint'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--images', 'none'], '--images: there is no folder none'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--images', '{empty}'], 'holds no picture'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--pictures', '0'], '--pictures must be 1 or more'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--lr', '-1'], '--lr must be above 0'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--device', 'cuda:99'], '--device cuda:99'),
        (['{tiny}', '{dense}', '--target', 'macs=0.5', '--out', '{tiny}/inside'], '--out: cannot write'),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tool, tiny, dense, tmp_path, arguments, message):
    (tmp_path / 'empty').mkdir()
    bare, mistaken = tiny.with_name('bare.py'), tiny.with_name('mistaken.py')
    bare.write_text("_base_ = './tiny.py'\noptim_wrapper = None\n")
    hook = "dict(type='mmcpd.PruneHook', at_once=True, importance='gaus_newton')"
    mistaken.write_text(f"_base_ = './tiny.py'\ndefault_hooks = dict(prune={hook})\n")
    before = sorted(tmp_path.rglob('*'))
    few = '--pictures' not in arguments
    paths = {'tiny': tiny, 'dense': dense, 'empty': tmp_path / 'empty', 'bare': bare, 'mistaken': mistaken}
    code, _, err = tool(
        'prune', *(argument.format(**paths) for argument in [*arguments, *(map(str, SMALL) if few else ())])
    )
    assert code == 1
    assert message in only_line('\n'.join(line for line in err.splitlines() if ' left' not in line))
    assert sorted(tmp_path.rglob('*')) == before


def test_an_interruption_leaves_nothing(tiny, dense, tmp_path):
    command = [sys.executable, str(ROOT / 'tools' / 'prune.py'), str(tiny), str(dense), '--target', 'macs=0.5']
    environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    options = [*map(str, SMALL), '--distill', '5000', '--no-validate']
    process = subprocess.Popen(
        [*command, *options],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    for line in process.stderr:
        if line.startswith('refit'):
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and 'interrupted' in err
    assert not (tmp_path / 'work_dirs').exists()
