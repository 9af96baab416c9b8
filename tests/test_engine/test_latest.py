"""The newest whole checkpoint is found whatever happened to the newest one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmcpd.engine import latest
from mmcpd.engine.latest import newest_whole
from mmcpd.errors import SlimError


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(latest, 'print_log', lambda text, *_: lines.append(text))
    return lines


def save(path: Path, number: int = 1, time: str = '20260101_000000') -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {'epoch': number, 'iter': number, 'time': time}
    torch.save({'state_dict': {'weight': torch.full((64,), float(number))}, 'meta': meta}, path)
    return str(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    place = content.index(torch.full((64,), 10.0).numpy().tobytes())
    content[place + 2] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize('damage', [truncate, flip_a_bit, Path.unlink, lambda path: path.write_bytes(b'')])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, said, damage):
    save(tmp_path / 'iter_9.pth')
    save(tmp_path / 'best_acc_iter_99.pth')
    save(tmp_path / 'iter_10.pth', 10)
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'iter_10.pth'))
    assert newest_whole(tmp_path) == str(tmp_path / 'iter_10.pth')
    assert not said
    damage(tmp_path / 'iter_10.pth')
    assert newest_whole(tmp_path) == str(tmp_path / 'iter_9.pth')
    assert len(said) == 1
    assert 'iter_10.pth' in said[0] and said[0].endswith('iter_9.pth is taken')


@pytest.mark.parametrize('content', [None, '', '\0\0', 'x' * 5000, b'\xff\xfe'])
def test_without_a_name_the_greatest_number_counts(tmp_path, said, content):
    for number in (9, 10, 100):
        save(tmp_path / f'epoch_{number}.pth')
    if content is not None:
        (tmp_path / 'last_checkpoint').write_bytes(content if isinstance(content, bytes) else content.encode())
    assert newest_whole(tmp_path) == str(tmp_path / 'epoch_100.pth')
    assert said == [
        f'{tmp_path} has checkpoints and no last_checkpoint that names one; {tmp_path}/epoch_100.pth is taken'
    ]


def test_a_newer_one_that_is_not_named_is_taken(tmp_path, said):
    older, newer = save(tmp_path / 'epoch_1.pth'), save(tmp_path / 'epoch_2.pth', 2, '20260101_000001')
    (tmp_path / 'last_checkpoint').write_text(older)
    assert newest_whole(tmp_path) == newer
    assert said == [f'last_checkpoint names {older}, which is older; {newer} is taken']


def test_later_numbers_of_a_run_before_are_not_newer(tmp_path, said):
    save(tmp_path / 'epoch_9.pth', 9)
    own = save(tmp_path / 'epoch_2.pth', 2, '20260102_000000')
    (tmp_path / 'last_checkpoint').write_text(own)
    assert newest_whole(tmp_path) == own
    assert not said
    truncate(tmp_path / 'epoch_2.pth')
    assert newest_whole(tmp_path) == str(tmp_path / 'epoch_9.pth')


def test_what_is_named_and_gone_is_not_begun_anew(tmp_path):
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_1.pth'))
    with pytest.raises(SlimError, match=r'epoch_1\.pth: there is no such checkpoint'):
        newest_whole(tmp_path)


def test_weights_alone_are_nothing_to_go_on_from(tmp_path, said):
    (tmp_path / 'last_checkpoint').write_text(save(tmp_path / 'iter_1.pth'))
    torch.save({'weight': torch.ones(1)}, tmp_path / 'iter_2.pth')
    torch.save(torch.ones(1), tmp_path / 'iter_3.pth')
    assert newest_whole(tmp_path) == str(tmp_path / 'iter_1.pth')
    assert [line.split()[0] for line in said] == [str(tmp_path / f'iter_{number}.pth') for number in (3, 2)]


def test_all_damaged_is_an_error_and_none_at_all_is_not(tmp_path):
    assert newest_whole(tmp_path) is None
    assert newest_whole(tmp_path / 'nowhere') is None
    for name in ('iter_1.pth', 'iter_2.pth'):
        (tmp_path / name).write_bytes(b'half')
    with pytest.raises(SlimError, match='checkpoints and none that is whole') as error:
        newest_whole(tmp_path)
    assert '\n' not in str(error.value)


def test_other_folders_and_names(tmp_path, said):
    there = save(tmp_path / 'out' / 'run' / 'iter_3.pth')
    work = tmp_path / 'work' / 'run'
    assert newest_whole(work, [tmp_path / 'out' / 'run']) == there
    save(work / 'step-7-of-run.pt')
    assert newest_whole(work) is None
    assert newest_whole(work, templates=['step-{}-of-run.pt']) == str(work / 'step-7-of-run.pt')
    (work / 'last_checkpoint').write_text(str(work / 'step-9-of-run.pt'))
    assert newest_whole(work) == str(work / 'step-7-of-run.pt'), 'named as the one that is missing'


def test_a_folder_that_was_moved_and_a_remote_checkpoint(tmp_path):
    save(tmp_path / 'old' / 'iter_1.pth', 1, '20260102_000000')
    save(tmp_path / 'old' / 'iter_2.pth')
    (tmp_path / 'old' / 'last_checkpoint').write_text(str(tmp_path / 'old' / 'iter_1.pth'))
    (tmp_path / 'old').rename(tmp_path / 'new')
    assert newest_whole(tmp_path / 'new') == str(tmp_path / 'new' / 'iter_1.pth')
    save(tmp_path / 'old' / 'iter_1.pth', 9)  # another run is there now
    assert newest_whole(tmp_path / 'new') == str(tmp_path / 'new' / 'iter_1.pth')
    (tmp_path / 'new' / 'last_checkpoint').write_text('s3://bucket/iter_5.pth')
    assert newest_whole(tmp_path / 'new') == 's3://bucket/iter_5.pth'
