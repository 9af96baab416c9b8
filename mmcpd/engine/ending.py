"""What is said of a run that prunes: that nothing can be scored, since when it is not finite, and how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.device import get_device
from mmengine.dist import is_main_process
from mmengine.runner import Runner

from mmcpd.coupling import Coupling
from mmcpd.engine.combing import shape_combed
from mmcpd.engine.run_report import report_line
from mmcpd.engine.slim_file import plain_entries
from mmcpd.engine.stage import at_target, stage_meta, stage_of
from mmcpd.prune import Pruner
from mmcpd.prune.finite import FiniteWatch


class RunWatch(FiniteWatch):
    """Know since when the losses are not finite, and warn once of each interval in which nothing was scored."""

    def __init__(self) -> None:
        super().__init__()
        self._warned = ''

    def warn(self, runner: Runner, pruner: Pruner) -> None:
        """Log why nothing is removed though it is time, if that was not said yet."""
        if pruner.waits and pruner.waits != self._warned:
            self._warned = pruner.waits
            runner.logger.warning(pruner.waits)


def say_ended(runner: Runner, pruner: Pruner, stage: Mapping[str, Any], written: bool) -> None:
    """Log how many iterations entered no score, and if a run ended before its target; `written`: its slim file is."""
    if skipped := pruner.importance.skipped:
        runner.logger.info(f'{skipped} iterations entered no score: a gradient was not finite')
    if not at_target(stage):
        file = 'slim.pth' if written else 'its model'
        runner.logger.warning(f'the run ended before its target; {file} is {stage_of(stage)}')


def meta_of(
    runner: Runner, coupling: Coupling, dense: Mapping[str, Any], small: Mapping[str, Any], stage: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what a slim file says of the run that made it: config, progress, costs with metrics, the target."""
    meta = {'cfg': runner.cfg.pretty_text, 'epoch': runner.epoch, 'iter': runner.iter}
    meta |= {'input_shape': shape_combed(coupling), 'dense': dense, 'slim': small, **stage_meta(stage)}
    data = getattr(runner.train_dataloader.dataset, 'metainfo', None)
    return meta | ({'dataset_meta': plain_entries(data, 'metainfo')} if data is not None else {})


def report_ended(runner: Runner, coupling: Coupling) -> None:
    """Write the report and the card of a run that wrote its slim file, on the main process, and log where they are."""
    if is_main_process():
        runner.logger.info(report_line(Path(runner.work_dir), runner.cfg, coupling, device=get_device()))
