"""Checkpoints that a killed run leaves whole, and that have the states of all random numbers in them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mmengine
from mmengine.dist import all_gather_object, get_rank, get_world_size, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook as PlainCheckpointHook
from mmengine.runner import Runner
from mmengine.utils import digit_version

from mmcpd.engine.batches import Batches, reseed
from mmcpd.engine.latest import newest_whole, numbered
from mmcpd.engine.plain_states import Place, Plain, plain_states, set_plain_states
from mmcpd.files import sweep, whole
from mmcpd.registry import HOOKS

RANDOM = 'mmcpd_random'  # where the states are in a checkpoint
WHOLE = 'mmcpd.whole'


class WholeFiles(LocalBackend):
    """Local files, each written whole or not at all; what is removed goes when `remove_outdated` is called.

    Example:
        >>> from tempfile import mkdtemp
        >>> files, path = WholeFiles(), Path(mkdtemp(), 'a.pth')
        >>> files.put(b'1', path)
        >>> files.remove(path)
        >>> before = path.exists()
        >>> files.remove_outdated(path.parent)
        >>> before, path.exists()
        (True, False)
    """

    def __init__(self) -> None:
        self._outdated: list[Path] = []

    def put(self, obj: bytes, filepath: str | Path) -> None:
        path = Path(filepath)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as unfinished:
            unfinished.write_bytes(obj)

    def remove(self, filepath: str | Path) -> None:
        self._outdated.append(Path(filepath))

    rmtree = remove

    def remove_outdated(self, folder: str | Path, in_use: Sequence[Path] = ()) -> None:
        """Remove what was given to `remove` and lies in this folder, unless it was written again.

        Names of outdated files come from a checkpoint, which may name any file.
        """
        while self._outdated:
            path = self._outdated.pop()
            if path in in_use or path.resolve().parent != Path(folder).resolve():
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


register_backend(WHOLE, WholeFiles, force=True)


@HOOKS.register_module()
class CheckpointHook(PlainCheckpointHook):
    """Save checkpoints as MMEngine's hook of this name, with the same options, and lose nothing when killed.

    A local file appears whole or not at all, `last_checkpoint` and the best ones too, and those that it replaces go
    after that. The states of Python's, numpy's, torch's and the GPU's random numbers, of every process, are in the
    checkpoint, so that a resumed run draws the same pictures, augmentations and dropout as one that was never stopped;
    validation draws no number of training's.
    """

    backend_args: dict[str, Any] | None
    _loaded: list[dict[str, Any]] | None = None  # of each process, in the checkpoint that was read
    _gathered: list[dict[str, Any]] | None = None  # of each process, for the checkpoint that is written
    _in_training: Plain | None = None  # the states before the validation that runs
    _seed: int | None = None  # that the loaders were built with

    def before_run(self, runner: Runner) -> None:
        """Let a run that resumes without a name take the newest whole checkpoint, under any package's train tool."""
        self._seed = runner.seed
        if runner._resume and runner._load_from is None:
            folders = [Path(self.out_dir) / Path(runner.work_dir).absolute().name] if self.out_dir else []
            runner._load_from = newest_whole(runner.work_dir, folders, [self.filename_tmpl])

    def before_train(self, runner: Runner) -> None:
        remote = self.file_client_args is not None or '://' in str(self.out_dir or runner.work_dir)
        if not remote and self.backend_args in (None, {}, {'backend': 'local'}):
            self.backend_args = {'backend': WHOLE}
        super().before_train(runner)
        if is_main_process():
            for folder in {Path(runner.work_dir), Path(self.out_dir)}:
                for file in sweep(folder):
                    runner.logger.info(f'removed {file}, which a killed run left unfinished')
            others = numbered(self.out_dir, templates=[self.filename_tmpl])
            if runner.iter == 0 and others:
                runner.logger.warning(
                    f'{others[0]} is of an earlier run, and this one starts anew and writes over its files; --resume '
                    '(resume=True) goes on with it, another work_dir keeps it'
                )
        if runner.iter > 0 and runner.seed != self._seed:
            reseed(runner.train_dataloader, self._seed, runner.seed)
        self._go_on(runner)

    def _states_of_this_process(self, runner: Runner) -> dict[str, Any] | None:
        """Return what the checkpoint that is resumed has for this process; a line says why it has nothing."""
        if runner.iter == 0:
            return None
        if self._loaded is None:
            runner.logger.info('random numbers go on from the seed: the checkpoint has no states of them')
            return None
        if len(self._loaded) != get_world_size():
            runner.logger.warning(
                f'the checkpoint has the random states of {len(self._loaded)} processes and these are '
                f'{get_world_size()}: random numbers go on from the seed'
            )
            return None
        return self._loaded[get_rank()]

    def _go_on(self, runner: Runner) -> None:
        """Put the states back of the checkpoint that is resumed, right before the first batch is drawn."""
        own = self._states_of_this_process(runner)
        loop = runner.train_loop
        batches = getattr(loop, 'dataloader_iterator', None)
        if type(batches).__name__ == '_InfiniteDataloaderIterator':
            forward = getattr(loop, 'fast_forward_on_resume', False)
            # Versions before 0.10.3 begin anew, those before 0.10.8 draw and drop, others call `skip_iter`.
            drops = digit_version(mmengine.__version__) >= digit_version('0.10.3') and not hasattr(batches, 'skip_iter')
            loop.dataloader_iterator = Batches(loop.dataloader, runner.iter if drops and not forward else 0)
            if own is not None:
                place = Place(**own['place']) if own['place'] is not None and not forward else None
                loop.dataloader_iterator.resume(place, own['states'])
        elif own is not None:
            set_plain_states(own['states'])

    def before_val(self, runner: Runner) -> None:
        self._in_training = plain_states()

    def after_val(self, runner: Runner) -> None:
        if self._in_training is not None:  # None where only validation runs
            set_plain_states(self._in_training)
            self._in_training = None

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(RANDOM)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self._gathered is not None:
            checkpoint[RANDOM], self._gathered = self._gathered, None

    def _gather(self, runner: Runner) -> None:
        """Collect where every process is; during a validation, where it was before."""
        batches = getattr(runner.train_loop, 'dataloader_iterator', None)
        place = asdict(batches.place) if isinstance(batches, Batches) else None
        self._gathered = all_gather_object({'states': self._in_training or plain_states(), 'place': place})

    def _save_best_checkpoint(self, runner: Runner, metrics: dict[str, Any]) -> None:
        self._gather(runner)
        super()._save_best_checkpoint(runner, metrics)
        self._gathered = None
        self._remove_outdated()

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        """Save, name the file in `last_checkpoint`, and then remove what is outdated."""
        self._gather(runner)
        outdated = self._outdated(runner, step)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            with whole(Path(runner.work_dir) / 'last_checkpoint') as unfinished:
                unfinished.write_text(str(self.last_ckpt), encoding='utf-8')
            if outdated is not None and self.file_backend.exists(outdated):
                remove = self.file_backend.rmtree if self.file_backend.isdir(outdated) else self.file_backend.remove
                remove(outdated)
            self._remove_outdated()

    def _outdated(self, runner: Runner, step: int) -> str | None:
        """Count a new checkpoint among those that are kept, and return the one that goes for it.

        The new one counts both: where a kill leaves both, the resumed run removes the old one, by MMEngine's own count.
        """
        if self.max_keep_ckpts <= 0 or (self.keep_ckpt_ids and self.keep_ckpt_ids[-1] == step):
            return None  # a checkpoint that is written again
        steps = [*self.keep_ckpt_ids, step]
        self.keep_ckpt_ids.append(step)  # which drops the first where they are full
        runner.message_hub.update_info('keep_ckpt_ids', steps)
        if len(steps) == len(self.keep_ckpt_ids):
            return None
        return self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(steps[0]))

    def _remove_outdated(self) -> None:
        if isinstance(self.file_backend, WholeFiles):
            best = [getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()]
            in_use = [Path(path) for path in (self.last_ckpt, *best) if path]
            self.file_backend.remove_outdated(self.out_dir, in_use)
