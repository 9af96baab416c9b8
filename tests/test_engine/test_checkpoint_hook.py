"""Checkpoints appear whole or not at all, and old ones go after the new one is there."""

from __future__ import annotations

import io
import os
import pathlib
from pathlib import Path

import pytest
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook as PlainCheckpointHook
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from mmcpd.engine.checkpoint_hook import RANDOM, CheckpointHook, WholeFiles
from mmcpd.files import UNFINISHED


class Model(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1)

    def forward(self, inputs, mode):
        out = self.fc(inputs)
        return {'loss': out.square().mean()} if mode == 'loss' else list(out)


class Score(Evaluator):
    """Give a score that grows."""

    def __init__(self, score: int = 0) -> None:
        super().__init__([])
        self.score = score

    def process(self, *_, **__) -> None:
        pass

    def evaluate(self, size: int) -> dict[str, int]:
        self.score += 1
        return {'acc': self.score}


def runner_of(
    folder: Path, hook: PlainCheckpointHook, *others: Hook, iterations: int = 6, score: int = 0, **options
) -> Runner:
    torch.manual_seed(0)
    data = TensorDataset(torch.rand(8, 2, generator=torch.Generator().manual_seed(0)))

    def load() -> DataLoader:
        return DataLoader(data, batch_size=2, sampler=InfiniteSampler(data, seed=0))

    return Runner(
        Model(),
        str(folder),
        train_dataloader=load(),
        train_cfg={'by_epoch': False, 'max_iters': iterations, 'val_interval': 2},
        val_dataloader=DataLoader(data, batch_size=8),
        val_cfg={},
        val_evaluator=Score(score),
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1}},
        default_hooks={'checkpoint': hook},
        custom_hooks=list(others),
        experiment_name=f'{folder.name}_{id(hook)}',
        log_level='WARNING',
        **options,
    )


class Full(Exception):
    pass


def checkpoints(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file() and not file.name.endswith('.py')}


@pytest.mark.parametrize('kind', [CheckpointHook, PlainCheckpointHook])
def test_a_run_keeps_the_same_files_as_mmengine(tmp_path, kind):
    hook = kind(interval=2, by_epoch=False, max_keep_ckpts=1, save_best='acc', rule='greater')
    runner_of(tmp_path, hook).train()
    assert checkpoints(tmp_path) == {'iter_6.pth', 'best_acc_iter_6.pth', 'last_checkpoint'}
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'iter_6.pth')


@pytest.mark.parametrize('moment', ['iter_4.pth', 'last_checkpoint', 'best_acc_iter_4.pth'])
@pytest.mark.parametrize('kind', [CheckpointHook, PlainCheckpointHook])
def test_what_ends_in_the_midst_of_a_write_leaves_the_old_files_whole(tmp_path, monkeypatch, kind, moment):
    hook = kind(interval=2, by_epoch=False, max_keep_ckpts=1, save_best='acc', rule='greater')
    runner_of(tmp_path, hook, iterations=2).train()
    before = {name: (tmp_path / name).read_bytes() for name in checkpoints(tmp_path)}
    hook = kind(interval=2, by_epoch=False, max_keep_ckpts=1, save_best='acc', rule='greater')
    runner = runner_of(tmp_path, hook, score=1, resume=True, load_from=str(tmp_path / 'iter_2.pth'))
    break_off(monkeypatch, moment)
    with pytest.raises(Full):
        runner.train()
    whole = [name for name, content in before.items() if whole_as(tmp_path / name, content, moment)]
    if kind is CheckpointHook:
        assert sorted(whole) == sorted(before)
    else:
        assert len(whole) < len(before), 'MMEngine removes first and writes in place'


def whole_as(path: Path, content: bytes, moment: str) -> bool:
    """Say whether a file is there as it was, or, of those that are complete by then, a new one that can be read."""
    if not path.is_file():
        return path.name == 'iter_2.pth' and moment.startswith('best') and (path.parent / 'iter_4.pth').is_file()
    if path.name == 'last_checkpoint':
        return Path(path.read_text()).is_file()
    return path.read_bytes() == content


def break_off(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let what is written to a file, or beside it, end in its midst, as when the process is killed."""
    plain = io.open

    def opened(path, mode='r', *args, **kwargs):
        file = plain(path, mode, *args, **kwargs)
        if 'w' in mode and name in Path(str(path)).name:
            write = file.write
            file_write = lambda data: (write(data[: len(data) // 2]), file.flush(), fail())  # noqa: E731
            return Broken(file, file_write)
        return file

    def fail():
        raise Full

    monkeypatch.setattr('builtins.open', opened)
    monkeypatch.setattr('io.open', opened)
    if hasattr(pathlib, '_NormalAccessor'):  # Python 3.10's paths keep the function
        monkeypatch.setattr(pathlib._NormalAccessor, 'open', staticmethod(opened))


class Broken:
    def __init__(self, file, write) -> None:
        self.file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def test_the_states_are_plain_and_read_without_code(tmp_path):
    runner_of(tmp_path, CheckpointHook(interval=2, by_epoch=False), iterations=2).train()
    content = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    torch.save(content[RANDOM], tmp_path / 'states.pth')
    (states,) = torch.load(tmp_path / 'states.pth', weights_only=True)
    assert states['states'].keys() == {'python', 'numpy', 'torch', 'cuda'}
    assert states['place']['drawn'] == 2


def test_left_overs_of_ours_are_swept_and_nothing_else(tmp_path):
    dead = tmp_path / f'.iter_2.pth.{os.getpid()}{UNFINISHED}'
    alive = tmp_path / f'.iter_2.pth.{os.getppid()}{UNFINISHED}'
    others = tmp_path / f'.notes{UNFINISHED}'
    unproved = tmp_path / f'.slim.pth.unproved.{os.getpid()}{UNFINISHED}'
    for file in (dead, alive, others, unproved):
        file.write_text('half')
    runner_of(tmp_path, CheckpointHook(interval=2, by_epoch=False), iterations=2).train()
    assert not dead.exists() and not unproved.exists()
    assert alive.exists() and others.exists()


def test_another_number_of_processes_is_said(tmp_path, caplog):
    runner_of(tmp_path, CheckpointHook(interval=2, by_epoch=False), iterations=2).train()
    content = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    content[RANDOM] *= 2
    torch.save(content, tmp_path / 'iter_2.pth')
    hook, said = CheckpointHook(interval=2, by_epoch=False), []
    runner = runner_of(tmp_path, hook, resume=True, load_from=str(tmp_path / 'iter_2.pth'))
    runner.logger.warning = said.append
    runner.train()
    assert [line for line in said if 'the random states of 2 processes and these are 1' in line]


def test_validation_draws_nothing_of_training(tmp_path):
    class Draw(Hook):
        def after_val_iter(self, *_, **__) -> None:
            torch.rand(7)

    def weights(folder: str, *hooks: Hook) -> torch.Tensor:
        class Noise(Hook):
            def after_train_iter(self, runner, *_, **__) -> None:
                runner.model.fc.weight.data += torch.rand(1)

        runner = runner_of(tmp_path / folder, hooks[0], Noise(), *hooks[1:], randomness={'seed': 0})
        runner.train()
        return runner.model.fc.weight

    plain = [weights('a', PlainCheckpointHook()), weights('b', PlainCheckpointHook(), Draw())]
    ours = [weights('c', CheckpointHook()), weights('d', CheckpointHook(), Draw())]
    assert torch.equal(*ours)
    assert not torch.equal(*plain)


def test_a_kill_before_the_old_one_goes_leaves_it_to_the_resumed_run(tmp_path, monkeypatch):
    hook = CheckpointHook(interval=2, by_epoch=False, max_keep_ckpts=1)
    runner = runner_of(tmp_path, hook, iterations=4)

    def full(in_use) -> None:
        if hook.file_backend._outdated:
            raise Full

    monkeypatch.setattr(CheckpointHook, '_remove_outdated', lambda hook: full([]))
    with pytest.raises(Full):
        runner.train()
    assert {'iter_2.pth', 'iter_4.pth'} <= checkpoints(tmp_path)
    monkeypatch.undo()
    runner_of(tmp_path, CheckpointHook(interval=2, by_epoch=False, max_keep_ckpts=1), resume=True).train()
    assert checkpoints(tmp_path) == {'iter_6.pth', 'last_checkpoint'}


def test_any_runner_resumes_the_newest_whole_one(tmp_path):
    runner_of(tmp_path, CheckpointHook(interval=2, by_epoch=False), iterations=4).train()
    (tmp_path / 'iter_4.pth').write_bytes(b'half')
    for kind in (CheckpointHook, PlainCheckpointHook):
        runner = runner_of(tmp_path, kind(interval=2, by_epoch=False), iterations=4, resume=True)
        begun: list[int] = []
        runner.register_hook(Begin(begun))
        if kind is PlainCheckpointHook:
            with pytest.raises(Exception, match='truncated or not a checkpoint'):
                runner.train()
        else:
            runner.train()
            assert begun == [2]
            (tmp_path / 'iter_4.pth').write_bytes(b'half')


class Begin(Hook):
    def __init__(self, begun: list[int]) -> None:
        self.begun = begun

    def before_train(self, runner: Runner) -> None:
        self.begun.append(runner.iter)


def test_starting_anew_over_an_earlier_run_is_said(tmp_path):
    def said(**options) -> list[str]:
        runner, lines = runner_of(tmp_path, CheckpointHook(interval=2, by_epoch=False), **options), []
        runner.logger.warning = lines.append
        runner.train()
        return [line for line in lines if 'this one starts anew' in line]

    assert not said(iterations=2)
    assert not said(iterations=4, resume=True)
    assert len(said(iterations=2)) == 1


def test_a_best_file_that_is_written_again_is_not_removed(tmp_path):
    def hook() -> CheckpointHook:
        return CheckpointHook(interval=2, by_epoch=False, save_best='acc', rule='greater')

    runner_of(tmp_path, hook(), iterations=4).train()
    # As after a kill between the best file of iteration 4 and its checkpoint: the one of iteration 2 is resumed.
    content = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    content['message_hub']['runtime_info']['best_ckpt'] = str(tmp_path / 'best_acc_iter_4.pth')
    torch.save(content, tmp_path / 'iter_2.pth')
    runner_of(tmp_path, hook(), iterations=4, score=9, resume=True, load_from=str(tmp_path / 'iter_2.pth')).train()
    assert (tmp_path / 'best_acc_iter_4.pth').is_file()


def test_a_file_that_a_checkpoint_names_elsewhere_is_not_removed(tmp_path):
    """A checkpoint says which best file the next one replaces."""
    own, other = tmp_path / 'run' / 'best.pth', tmp_path / 'important.pth'
    own.parent.mkdir()
    for path in (own, other):
        path.write_bytes(b'1')
    files = WholeFiles()
    for path in (own, other, own.parent / '..' / other.name):
        files.remove(path)
    files.remove_outdated(own.parent)
    assert other.exists() and not own.exists()
