"""A dense.pth is that of the run that is resumed, or it is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmcpd.engine.dense_file import read_dense, write_dense
from mmcpd.engine.hashing import digest
from mmcpd.errors import SlimError
from tests.helpers import on_two_processes


def written(folder: Path, seed: int) -> str:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    (folder / 'iter_2.pth').touch()
    return write_dense(folder, nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))


def test_every_bit_and_name_counts_and_their_order_does_not():
    tensors = {'a': torch.zeros(2), 'b': torch.ones((), dtype=torch.bfloat16), 'c': torch.zeros(0, dtype=torch.bool)}
    same = digest(dict(reversed(tensors.items())))
    assert same == digest(tensors)
    for other in (
        {**tensors, 'a': torch.tensor([0.0, 1e-45])},
        {**tensors, 'a': torch.zeros(1, 2)},
        {**tensors, 'a': torch.zeros(2, dtype=torch.int32)},
        {'x' + name: value for name, value in tensors.items()},
    ):
        assert digest(other) != same


def test_it_lies_beside_the_checkpoint_or_in_the_work_dir(tmp_path):
    expected = written(tmp_path / 'first', 0)
    checkpoint, work = tmp_path / 'first' / 'iter_2.pth', tmp_path / 'second'
    work.mkdir()
    weights = read_dense(work, checkpoint, expected)
    assert digest(weights) == expected
    assert (work / 'dense.pth').is_file(), 'so that the run can be resumed from its own work dir'
    written(tmp_path / 'first', 1)
    assert digest(read_dense(work, checkpoint, expected)) == expected, 'another beside the checkpoint, ours here'


@pytest.mark.parametrize('fault', ['another', 'missing', 'half'])
def test_another_runs_a_missing_or_half_a_file_is_refused_in_one_line(tmp_path, fault):
    expected = written(tmp_path, 0)
    path = tmp_path / 'dense.pth'
    if fault == 'another':
        written(tmp_path, 1)
    elif fault == 'half':
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.unlink()
    words = {'another': 'is of another run', 'missing': 'is missing', 'half': 'is truncated or not a checkpoint'}
    with pytest.raises(SlimError, match=words[fault]) as error:
        read_dense(tmp_path, None, expected)
    assert '\n' not in str(error.value) and str(path) in str(error.value)


def only_the_main_one_has_it(rank: int, folder: Path) -> None:
    own = folder / str(rank)
    expected = [written(own, 0) if rank == 0 else '']
    dist.broadcast_object_list(expected)
    own.mkdir(exist_ok=True)
    got = read_dense(own, None, expected[0])
    try:
        read_dense(own, None, 'of another run')
    except SlimError as error:
        refused = str(error)
    torch.save({'digest': digest(got) == expected[0], 'refused': refused}, folder / f'{rank}.pth')


def test_the_main_process_reads_for_all(tmp_path):
    on_two_processes(only_the_main_one_has_it, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pth', weights_only=True) for rank in (0, 1))
    assert first['digest'] and second['digest']
    assert first['refused'] == second['refused']
