"""What the demo does, in miniature: train, prune with distillation, slim, test, and go on from what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmcpd.engine.build import build_dense
from mmcpd.engine.slim_file import read_slim


def top1(out: str) -> float:
    """Return the accuracy that a tool printed last."""
    (line,) = [line for line in out.splitlines() if line.startswith('accuracy/top1: ')]
    return float(line.split(': ')[1])


def test_from_training_to_a_slim_model_that_tools_use(tool, pruning, tmp_path):
    code, out, err = tool('train', pruning)
    assert code == 0, err
    work = tmp_path / 'work_dirs' / 'prune'
    meta = read_slim(work / 'slim.pth')['meta']
    assert meta['slim']['macs'] <= 0.5 * meta['dense']['macs']
    assert meta['dataset_meta']['classes'][3] == '3'

    code, out, err = tool('test', pruning, work / 'slim.pth', '--out', 'metrics.json')
    assert code == 0, err
    slim = top1(out)
    assert json.loads((tmp_path / 'metrics.json').read_text())['accuracy/top1'] == pytest.approx(slim, abs=1e-3)
    assert slim == pytest.approx(meta['slim']['metrics']['accuracy/top1'], abs=1e-3)

    # The last training checkpoint is the masked model: slimmed on the way, it says the same.
    code, out, err = tool('test', pruning, work / 'epoch_4.pth')
    assert code == 0, err
    assert top1(out) == slim
    # One from before pruning is the dense model.
    code, out, err = tool('test', pruning, work / 'dense.pth', '--out', 'pred.pkl')
    assert code == 0, err
    assert top1(out) == pytest.approx(meta['dense']['metrics']['accuracy/top1'], abs=1e-3)
    assert (tmp_path / 'pred.pkl').exists()

    code, out, err = tool('slim', pruning, work / 'epoch_4.pth', '--out', 'again/slim.pth')
    assert code == 0, err
    assert 'slim / dense' in out
    ours, theirs = (read_slim(path) for path in (work / 'slim.pth', tmp_path / 'again' / 'slim.pth'))
    assert theirs['structure'] == ours['structure']
    assert all(torch.equal(value, theirs['state_dict'][name]) for name, value in ours['state_dict'].items())
    assert theirs['meta']['dataset_meta'] == ours['meta']['dataset_meta']

    code, _, err = tool('slim', pruning, work / 'epoch_1.pth')
    assert code == 1
    assert 'no unit is removed in it yet' in err
    code, _, err = tool('slim', pruning, work / 'dense.pth')
    assert code == 1
    assert 'it holds no pruning state' in err

    fine_tune(tool, pruning, work / 'slim.pth', tmp_path)


def fine_tune(tool, pruning: Path, slim: Path, tmp_path: Path) -> None:
    """A slim model is trained further by an ordinary config, and stays slim."""
    file = pruning.with_name('tune.py')
    file.write_text(
        "_base_ = './tiny.py'\n"
        f"model = dict(_delete_=True, type='mmcpd.slimmed', model=_base_.model, structure={str(slim)!r})\n"
        'train_cfg = dict(max_epochs=1, val_interval=1)\n'
    )
    code, _, err = tool('train', file)
    assert code == 0, err
    tuned = torch.load(tmp_path / 'work_dirs/tune/epoch_1.pth', weights_only=False)['state_dict']
    before = read_slim(slim)['state_dict']
    assert {name: value.shape for name, value in tuned.items()} == {n: v.shape for n, v in before.items()}
    assert not torch.equal(tuned['head.fc.weight'], before['head.fc.weight'])


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('target.macs=0', 'macs'),
        ('target.macs=1.5', 'macs'),
        ('target.flops=0.5', 'flops'),
        ('target=0.5', 'target'),
        ('importance=hesian', 'did you mean hessian?'),
        ('head=dim', "no option 'head': did you mean heads"),
        ('heads=dims', 'dims'),
        ('begin=0.9', 'begin'),
        ('type=mmcpd.PrunHook', "no hook 'PrunHook': did you mean PruneHook"),
    ],
)
def test_a_wrong_option_of_a_hook_stops_before_any_data_set_is_touched(tool, pruning, tmp_path, option, message):
    options = [f'default_hooks.prune.{option}', 'train_dataloader.dataset.data_root=nowhere']
    code, _, err = tool('train', pruning, '--cfg-options', *options)
    assert code == 1
    (line,) = err.strip().splitlines()
    assert line.startswith('error: ')
    assert message in line
    assert not (tmp_path / 'work_dirs').exists()


def test_hooks_in_a_list_are_checked_too_and_other_people_s_are_left_alone(tool, pruning):
    hooks = '[dict(type="EMAHook", nonsense=1), dict(type="mmcpd.CombHook", save=None, head="dim", priority="LOW")]'
    pruning.write_text(f'{pruning.read_text()}\ncustom_hooks = {hooks}\n')
    code, _, err = tool('train', pruning)
    assert code == 1
    assert "error: CombHook has no option 'head'" in err


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('ignore=[nothing.*]', 'nothing.*'),
        ('target.macs=0.0001', 'cannot go down to'),
    ],
)
def test_what_the_model_cannot_do_stops_before_training(tool, pruning, tmp_path, option, message):
    code, _, err = tool('train', pruning, '--cfg-options', f'default_hooks.prune.{option}')
    assert code == 1
    line = err.strip().splitlines()[-1]
    assert line.startswith('error: ')
    assert message in line
    assert not list(tmp_path.glob('work_dirs/prune/*.pth'))


def test_test_refuses_what_does_not_fit(tool, pruning, tmp_path):
    (tmp_path / 'half.pth').write_bytes(b'PK\x03\x04 half of something')
    other = {'state_dict': {'backbone.conv1.weight': torch.zeros(3)}}
    torch.save(other, tmp_path / 'other.pth')
    for name, message in (
        ('none.pth', 'there is no checkpoint none.pth'),
        ('half.pth', 'half.pth is truncated or not a checkpoint'),
        ('other.pth', 'other.pth is of another model'),
    ):
        code, _, err = tool('test', pruning, name)
        assert code == 1
        (line,) = err.strip().splitlines()
        assert message in line
    assert not (tmp_path / 'work_dirs').exists()


def test_comb_shows_groups_reasons_and_writes_them(tool, pruning, tmp_path):
    code, out, err = tool('comb', pruning, '--json', 'out/coupling.json', '--plot', 'out/comb.png')
    assert code == 0, err
    assert 'backbone.layer1.0.conv1' in out
    assert 'model output' in out
    assert len(json.loads((tmp_path / 'out/coupling.json').read_text())['groups']) == 12
    assert (tmp_path / 'out/comb.png').read_bytes()[:4] == b'\x89PNG'


def test_comb_takes_a_size_and_a_checkpoint(tool, pruning, tmp_path):
    torch.save({'state_dict': build_dense(pruning).state_dict()}, tmp_path / 'dense.pth')
    small = tool('comb', pruning, '--shape', 3, 16, 16)[1]
    large = tool('comb', pruning, '--checkpoint', 'dense.pth', '--shape', 3, 64, 64)[1]
    macs = [float(out.splitlines()[1].split(' M MACs')[0].replace(',', '')) for out in (small, large)]
    assert macs[1] > 10 * macs[0]
