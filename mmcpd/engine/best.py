"""The best checkpoints of a run that prunes: begun anew at the target, and said what they are."""

from __future__ import annotations

from mmengine.dist import master_only
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.pruning_state import STATE
from mmcpd.engine.stage import stage_of
from mmcpd.errors import SlimError


class BestFiles:
    """Follow what `save_best` of MMEngine's `CheckpointHook` writes.

    Attributes:
        before: the best files of a model that was not at its target yet.
        restarted: whether `save_best` began anew.
    """

    def __init__(self) -> None:
        self.before: list[str] = []
        self.restarted = False

    def restart(self, runner: Runner) -> None:
        """Let `save_best` begin anew, once: a larger model's score does not count. The files up to now stay."""
        if self.restarted:
            return
        self.restarted = True
        self.before += _files(runner)  # MMEngine removes the best before only where it knows of it
        info = runner.message_hub.runtime_info
        for name in [name for name in info if name.startswith(('best_score', 'best_ckpt'))]:
            info.pop(name)
        for hook in _savers(runner):
            if hasattr(hook, 'best_ckpt_path'):
                hook.best_ckpt_path = None
            else:
                hook.best_ckpt_path_dict = dict.fromkeys(hook.best_ckpt_path_dict)
        if _savers(runner):
            kept = f'; {", ".join(self.before)} stays, of a larger model' if self.before else ''
            runner.logger.info(f'the target is reached: save_best starts anew{kept}')

    @master_only
    def describe(self, runner: Runner) -> None:
        """Say of each best file whether it is dense, partly pruned or at the target."""
        for file in dict.fromkeys([*self.before, *_files(runner)]):
            try:
                runner.logger.info(f'{file} is {stage_of(read_checkpoint(file).get(STATE))}')
            except SlimError as error:  # someone moved it
                runner.logger.warning(str(error))


def _savers(runner: Runner) -> list[CheckpointHook]:
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook) and hook.save_best]


def _files(runner: Runner) -> list[str]:
    """Return the paths of the best checkpoints that the Runner's hooks know of."""
    found: list[str] = []
    for hook in _savers(runner):
        paths = getattr(hook, 'best_ckpt_path_dict', {}).values()
        found += [path for path in (getattr(hook, 'best_ckpt_path', None), *paths) if path]
    return found
