"""A resumed run ends with the weights of one that was never stopped, random augmentation and dropout included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from torch.utils.data import DataLoader, TensorDataset

from mmcpd.engine.batches import Batches
from mmcpd.engine.checkpoint_hook import RANDOM
from mmcpd.engine.plain_states import plain_states
from tests.helpers import on_two_processes
from tests.test_engine.resumed import config, run, same

torch.set_num_threads(1)


def stopped_and_resumed(folder: Path, by_epoch: bool, stop: int, *, states: bool = True, **changes: object):
    """Return what an uninterrupted run ends with, and one that is stopped and goes on from its last checkpoint."""
    cfg = config(folder / 'whole', by_epoch, **changes)
    whole = run(cfg)
    cfg.work_dir = str(folder / 'parts')
    run(cfg, stop=stop)
    last = Path((folder / 'parts' / 'last_checkpoint').read_text())
    if not states:
        content = torch.load(last, weights_only=False)
        del content[RANDOM]
        torch.save(content, last)
    cfg.resume, cfg.load_from = True, str(last)
    torch.rand(3)  # a process of its own would begin at other states, too
    return whole, run(cfg)


@pytest.mark.parametrize(
    ('by_epoch', 'stop'),
    [
        (False, 7),
        (True, 9),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((False, 3), (False, 12), (True, 5))),
    ],
    ids=str,
)  # before pruning begins, while it prunes, after it
def test_it_is_bit_for_bit_the_uninterrupted_one(tmp_path, by_epoch, stop):
    assert same(*stopped_and_resumed(tmp_path, by_epoch, stop))


@pytest.mark.parametrize(('counts', 'exact'), [(2, True), (4, False)])
def test_a_checkpoint_in_the_midst_of_summed_gradients_is_said(tmp_path, counts, exact):
    change = {'optim_wrapper.accumulative_counts': counts}
    assert same(*stopped_and_resumed(tmp_path, False, 7, **change)) is exact  # goes on from the sixth iteration
    logs = ''.join(file.read_text() for file in (tmp_path / 'parts').glob('*/*.log'))
    assert ('Resumed iteration number is not divisible' in logs) is not exact  # MMEngine says it


@pytest.mark.parametrize('by_epoch', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_without_the_states_it_is_not(tmp_path, by_epoch):
    assert not same(*stopped_and_resumed(tmp_path, by_epoch, 5, states=False))


@pytest.mark.parametrize(
    ('by_epoch', 'workers'), [(False, 0), *(pytest.param(True, n, marks=pytest.mark.slow) for n in (0, 1))]
)
def test_a_run_whose_seed_no_config_says(tmp_path, by_epoch, workers):
    cfg = config(tmp_path / 'parts', by_epoch, workers=workers)
    cfg.randomness = {'seed': None}
    run(cfg, stop=9)
    last = (tmp_path / 'parts' / 'last_checkpoint').read_text()
    cfg.resume, cfg.load_from = True, last
    resumed = run(cfg)
    whole = config(tmp_path / 'whole', by_epoch, workers=workers)
    whole.randomness = {'seed': torch.load(last, weights_only=False)['meta']['seed']}
    assert same(run(whole), resumed)


@pytest.mark.parametrize('sampler', ['DefaultSampler', 'TorchSampler'])
def test_passes_that_end_and_samplers_that_draw_from_torch(tmp_path, sampler):
    changes = {'sampler': sampler, 'train_dataloader.dataset.indices': 24}  # three iterations are a pass
    assert same(*stopped_and_resumed(tmp_path, False, 9, **changes))


def test_workers_that_begin_with_each_epoch_are_bit_for_bit(tmp_path):
    assert same(*stopped_and_resumed(tmp_path, True, 9, workers=1))


@pytest.mark.slow
@pytest.mark.parametrize('by_epoch', [False, True])
def test_workers_that_would_have_lived_on_draw_other_numbers(tmp_path, by_epoch):
    changes = {'train_dataloader.persistent_workers': by_epoch}
    assert not same(*stopped_and_resumed(tmp_path, by_epoch, 9, workers=1, **changes)), 'docs/design.md says so'


def two_processes(rank: int, folder: Path, by_epoch: bool, stop: int) -> None:
    os.environ['LOCAL_RANK'] = str(rank)
    cfg = config(folder / 'whole', by_epoch, launcher='pytorch', **{'train_dataloader.dataset.indices': 64})
    cfg.randomness.diff_rank_seed = True
    cfg.model_wrapper_cfg = {'type': 'MMDistributedDataParallel', 'device_ids': None, 'broadcast_buffers': False}
    whole = run(cfg)
    cfg.work_dir = str(folder / 'parts')
    run(cfg, stop=stop)
    cfg.resume, cfg.load_from = True, (folder / 'parts' / 'last_checkpoint').read_text()
    torch.rand(rank + 1)
    resumed = run(cfg)
    # A checkpoint holds the running statistics of the main process: MMEngine's, and no weight depends on them.
    own = [name for name in whole if rank and 'running_' in name]
    torch.save({'same': same(without(own, whole), without(own, resumed))}, folder / f'{rank}.pth')


def without(names: list[str], tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in tensors.items() if name not in names}


@pytest.mark.parametrize(('by_epoch', 'stop'), [pytest.param(False, 7, marks=pytest.mark.slow), (True, 5)])
def test_two_processes(tmp_path, by_epoch, stop):
    on_two_processes(two_processes, tmp_path, by_epoch, stop)
    assert [torch.load(tmp_path / f'{rank}.pth', weights_only=True)['same'] for rank in (0, 1)] == [True, True]
    last = Path((tmp_path / 'parts' / 'last_checkpoint').read_text())
    first, second = torch.load(last, weights_only=False)[RANDOM]
    assert not torch.equal(first['states']['numpy'][0], second['states']['numpy'][0]), 'each process has its own'


def test_a_loop_of_before_skip_iter_draws_and_drops():
    def batches(discarded: int) -> Batches:
        return Batches(DataLoader(TensorDataset(torch.arange(12)), shuffle=True, batch_size=2), discarded)

    whole = batches(0)
    drawn = [next(whole) for _ in range(4)]
    place, states = whole.place, plain_states()
    expected = [next(whole) for _ in range(7)]  # into the next pass
    torch.rand(5)
    again = batches(4)
    again.resume(place, states)
    assert [next(again) for _ in drawn] == [None] * 4
    assert str([next(again) for _ in expected]) == str(expected)


@pytest.mark.parametrize('workers', [0, 1])
def test_an_iterator_that_the_loop_made_before_does_not_end_the_stream(monkeypatch, workers):
    monkeypatch.delattr(InfiniteSampler, 'skip', raising=False)  # as in the versions whose loops make one
    data = TensorDataset(torch.arange(12))

    def loader() -> DataLoader:
        return DataLoader(data, sampler=InfiniteSampler(data, seed=0), batch_size=2, num_workers=workers)

    expected = next(iter(loader()))
    begun = loader()
    eager = iter(begun)
    next(eager)
    del eager
    with pytest.raises(StopIteration):
        next(iter(begun))
    assert torch.equal(next(Batches(begun))[0], expected[0])
