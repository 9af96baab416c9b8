"""What `mmcpd prune` leaves in a folder is enough for the other tools, and no other run writes into it meanwhile."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmcpd.deploy import read_metadata
from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.slim_file import read_slim
from mmcpd.files import WriteError, alone_in, unfinished_name
from tests.test_tools.test_prune import SMALL, dense  # noqa: F401 - a fixture

FAST = ('--runs', 2, '--exporter', 'TorchScript')


@pytest.fixture
def pruned(tool, tiny, dense, tmp_path):  # noqa: F811
    code, _, err = tool('prune', tiny, dense, '--target', 'macs=0.5', '--out', tmp_path / 'pruned', *SMALL)
    assert code == 0, err
    return tmp_path / 'pruned'


def test_the_report_is_written_again_without_a_config(tool, pruned):
    (pruned / 'report.html').unlink()
    for suffix in ('.py', '.safetensors'):  # of `mmcpd export-code`, and newer
        (pruned / f'slim_model{suffix}').write_text('answer = 42\n')
    code, _, err = tool('report', pruned, '--pictures', 0)
    assert code == 0 and (pruned / 'report.html').is_file(), err


def test_the_dense_file_has_the_weights_that_were_pruned(tool, tiny, dense, pruned):  # noqa: F811
    code, out, err = tool('deploy', tiny, pruned / 'slim.pth', *FAST)
    assert code == 0 and f'dense weights: {dense}' in out, err
    results = []
    for file in (dense, pruned / 'dense.onnx'):
        code, out, err = tool('test', tiny, file)
        assert code == 0, err
        results += [line for line in out.splitlines() if line.startswith('accuracy/top1: ')]
    assert len(results) == 2 and results[0] == results[1]
    dense.unlink()
    code, out, err = tool('deploy', tiny, pruned / 'slim.pth', *FAST, '--no-bench')
    assert code == 0 and 'dense weights: initial, seed 0' in out, err


def test_a_slim_model_that_is_pruned_again_knows_the_first(tool, tiny, pruned, tmp_path):
    folder = tmp_path / 'again'
    code, _, err = tool('prune', tiny, pruned / 'slim.pth', '--target', 'macs=0.5', '--out', folder, *SMALL)
    assert code == 0, err
    once, twice = (read_slim(each / 'slim.pth')['meta'] for each in (pruned, folder))
    assert 'first' not in once and twice['first'] == once['dense']
    code, _, err = tool('deploy', tiny, folder / 'slim.pth', *FAST, '--no-bench')
    assert code == 0, err
    kept = read_metadata(folder / 'slim.onnx')['kept']
    assert kept['macs'] == pytest.approx(twice['slim']['macs'] / once['dense']['macs']) and kept['macs'] < 0.3


def test_a_slim_file_in_the_place_of_a_dense_one_is_said(tool, tiny, pruned):
    code, _, err = tool('comb', tiny, '--target', 'macs=0.5', '--checkpoint', pruned / 'slim.pth')
    assert code == 1 and "is a slim checkpoint and the config's model is dense" in err


def test_a_head_of_zeros_is_said(tool, tiny, dense, tmp_path):  # noqa: F811
    content = read_checkpoint(dense)
    for name, value in content['state_dict'].items():
        if name.startswith('head.'):
            value.zero_()
    torch.save(content, tmp_path / 'zeros.pth')
    code, _, err = tool('prune', tiny, tmp_path / 'zeros.pth', '--target', 'macs=0.5', *SMALL)
    assert code == 1 and 'no output depends on the groups' in err and 'Is the head all zeros' in err


def test_files_that_are_no_pictures_are_left_out(tool, tiny, dense, tmp_path):  # noqa: F811
    photos = tmp_path / 'photos'
    photos.mkdir()
    for number in range(6):
        Image.new('L', (20, 20), 40 * number).save(photos / f'{number}.png')
    (photos / 'half.png').write_bytes((photos / '3.png').read_bytes()[:60])
    (photos / '._0.png').write_bytes(b'of another system')
    options = ('--target', 'macs=0.5', '--images', photos, '--no-validate', '--no-refit', '--out', tmp_path / 'out')
    code, out, err = tool('prune', tiny, dense, *options)
    assert code == 0 and '1 of 7 pictures are left out' in out + err and 'half.png' in out + err, err
    for file in photos.glob('[0-9].png'):
        file.unlink()
    code, _, err = tool('prune', tiny, dense, *options)
    assert code == 1 and 'none of the 1 pictures can be read' in err


def test_options_without_effect_are_refused(tool, tiny, dense):  # noqa: F811
    code, _, err = tool('prune', tiny, dense, '--target', 'macs=0.5', '--lr', 0.1)
    assert code == 1 and '--lr is the rate of --distill' in err
    code, _, err = tool('comb', tiny, '--plot', 'groups.foo')
    assert code == 1 and '--plot: groups.foo must end in one of .png, .svg, .pdf' in err
    code, _, err = tool('comb', tiny, '--json', dense.parent)
    assert code == 1 and 'is a folder; name a file' in err


# -- two runs ----------------------------------------------------------------------------------------------------------
def hold(folder, held, done):
    with alone_in(folder):
        held.set()
        done.wait(60)


def test_a_folder_that_another_run_writes_into_is_refused(tool, tiny, dense, tmp_path):  # noqa: F811
    context = multiprocessing.get_context('spawn')
    held, done, folder = context.Event(), context.Event(), tmp_path / 'held'
    other = context.Process(target=hold, args=(folder, held, done))
    other.start()
    try:
        assert held.wait(60)
        code, _, err = tool('prune', tiny, dense, '--target', 'macs=0.5', '--out', folder, *SMALL)
        assert code == 1 and f'another run writes into {folder}' in err
        with pytest.raises(WriteError), alone_in(folder):
            pass
    finally:
        done.set()
        other.join()
    with alone_in(folder):
        assert [file.name for file in folder.iterdir()] == ['.lock']
    assert not folder.exists()


def test_unfinished_names_are_of_one_process(monkeypatch):
    names = set()
    for number in (1, 2):
        monkeypatch.setattr('os.getpid', lambda number=number: number)
        names |= {unfinished_name(Path('slim.pth'), note) for note in ('', '.unproved')}
    assert len(names) == 4


def test_the_settings_name_the_dense_checkpoint(pruned, dense):  # noqa: F811
    assert json.loads((pruned / 'prune.json').read_text())['settings']['checkpoint'] == str(dense)


def test_the_users_own_config_is_not_written_over(tool, tiny, dense, tmp_path):  # noqa: F811
    own = tiny.with_name('config.py')
    own.write_text('_base_ = "./tiny.py"  # mine\n')
    code, _, err = tool('prune', own, dense, '--target', 'macs=0.5', '--out', tmp_path, *SMALL)
    assert code == 0 and (tmp_path / 'slim.pth').is_file(), err
    assert own.read_text() == '_base_ = "./tiny.py"  # mine\n'
