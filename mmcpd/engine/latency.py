"""Latency as a target of a run or a command: time the layers, remember the times, and compare at the end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmengine.dist import broadcast_object_list, is_main_process
from torch import Tensor, nn

from mmcpd.compat import require
from mmcpd.coupling import Coupling
from mmcpd.engine.examples import picture_of
from mmcpd.engine.passes import DEPLOYED, runs
from mmcpd.errors import PruneError, SlimError, first_line
from mmcpd.files import write_json
from mmcpd.progress import ProgressLine
from mmcpd.prune import LATENCY, Pruner
from mmcpd.prune.schedule import is_count
from mmcpd.slim import slim

if TYPE_CHECKING:
    from mmcpd.deploy import Promise, Times

Say = Callable[[str], None]
PROMISE = 'latency_target.json'


def check_threads(threads: object, target: Collection[str]) -> None:
    """Refuse threads that make no sense, or where nothing is timed; a latency target needs ONNX Runtime.

    Raises:
        ValueError: with what to change.
        ModuleNotFoundError: latency is a target, and a package is missing.

    Example:
        >>> check_threads(2, {'macs': 0.5})
        Traceback (most recent call last):
        ValueError: threads belongs to a target of latency: leave it out, or target=dict(latency=0.6)
    """
    timed = LATENCY in target
    if threads is not None and not timed:
        raise ValueError('threads belongs to a target of latency: leave it out, or target=dict(latency=0.6)')
    if threads is not None and not is_count(threads, 1):
        raise ValueError(f'threads counts threads of ONNX Runtime, at least 1: got {threads!r}')
    if timed:
        require('deploy')


def picture_exported(model: nn.Module, coupling: Coupling) -> Tensor:
    """Return the pictures (N, C, H, W) that a model was combed with, and that its file is timed on.

    Raises:
        PruneError: it does not run on pictures alone.

    Example:
        >>> tuple(picture_exported(model, coupling).shape)
        (2, 3, 8, 8)
    """
    (data,) = coupling.example.inputs
    picture = picture_of(data).to(next(model.parameters()).device)
    if why := runs(model, picture, DEPLOYED):
        raise PruneError(
            f"latency cannot be a target: {type(model).__name__} does not run in mode 'tensor' on pictures alone "
            f'({why}), so that no file of it can be timed; take macs'
        )
    return picture


def measured_times(
    model: nn.Module, coupling: Coupling, threads: int | None, progress: ProgressLine | None = None,
    folder: Path | None = None,
) -> Times:  # fmt: skip
    """Return the times of a model's layers, those of process 0 on all processes; `folder` is that of the cache.

    Raises:
        PruneError: it cannot be exported, and so not timed.

    Example:
        >>> sorted(measured_times(model, coupling, 1, folder=Path('cache')).plain())
        ['dense', 'machine', 'tables']
    """
    from mmcpd.deploy import DeployError, Times, times_of

    picture, shared = picture_exported(model, coupling), [{}, '']
    if is_main_process():
        line = progress or ProgressLine('timing layers', 'layers')
        try:
            times = times_of(
                model, coupling, inputs=picture, forward=DEPLOYED, threads=threads, progress=line, folder=folder
            )
            shared = [times.plain(), '']
        except DeployError as error:
            shared = [{}, first_line(error)]
    broadcast_object_list(shared)
    plain, why = shared
    if why:
        raise PruneError(f'latency cannot be a target, no file of the model can be timed: {why}')
    return Times.of_plain(plain)


def timed(model: nn.Module, coupling: Coupling, times: Times, say: Say) -> Coupling:
    """Return a coupling that knows latency from these times, and say what they explain.

    Raises:
        ValueError: they are of another model.

    Example:
        >>> known = timed(model, coupling, measured_times(model, coupling, 1, folder=Path('cache')), print)
        latency: ... ms dense on ..., ONNX Runtime ...; 3 layers take ... ms
        >>> known.cost(keep).latency > 0
        True
    """
    from mmcpd.deploy.timed import in_words, with_times

    found = with_times(model, coupling, times)
    say(in_words(model, coupling, times))
    return found


def say_promise(
    dense: nn.Module, small: nn.Module, coupling: Coupling, target: float, predicted: float, threads: int | None,
    say: Say,
) -> Promise | None:  # fmt: skip
    """Measure a finished model in turns with its dense one, say what was promised and measured, and return it.

    A file that cannot be measured is said too: the model is there all the same, and None is returned.

    Example:
        >>> promise = say_promise(model, small, coupling, 0.6, 0.58, 1, print)
        latency: promised 60.0% of the dense model, predicted 58.0%, measured ...
    """
    from mmcpd.deploy import promise_of

    try:
        picture = picture_exported(dense, coupling)
        promise = promise_of(
            dense, small, picture, target, predicted, forward=DEPLOYED, threads=threads,
            progress=ProgressLine('measuring', 'rounds'),
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - of the export, the disk or ONNX Runtime: the model is there
        say(f'the latency could not be compared with its promise of {target:.1%}: {first_line(error)}')
        return None
    say(str(promise))
    return promise


class LatencyTarget:
    """What a run knows of latency, if that is its target: the times of layers, which its checkpoints hold.

    Raises:
        ValueError: threads that make no sense.

    Example:
        >>> LatencyTarget({'macs': 0.5}).state() is None
        True
    """

    def __init__(self, target: Mapping[str, float], threads: int | None = None) -> None:
        check_threads(threads, target)
        self.share, self.threads = target.get(LATENCY), threads
        self.times: Times | None = None

    def give(self, model: nn.Module, coupling: Coupling, say: Say) -> Coupling:
        """Return a coupling that knows latency where that is the target; times of a resumed run are not measured anew.

        Raises:
            PruneError, ValueError: the model cannot be timed, or the times are of another one.
        """
        if self.share is None:
            return coupling
        self.times = self.times or measured_times(model, coupling, self.threads)
        return timed(model, coupling, self.times, say)

    def state(self) -> dict[str, Any] | None:
        """Return the times, which `resume` reads, None where there are none."""
        return None if self.times is None else self.times.plain()

    def resume(self, state: object) -> None:
        """Take the times of a checkpoint, so that a run keeps its target on a machine that became slower.

        Raises:
            SlimError: they are damaged.
        """
        if self.share is None or state is None:
            return
        from mmcpd.deploy import Times

        try:
            self.times = Times.of_plain(state)
        except ValueError as error:
            raise SlimError(f'the latency in the pruning state of the checkpoint is damaged ({error})') from error

    def compare(self, pruner: Pruner, folder: Path, say: Say) -> None:
        """Measure a finished model where latency was the target; what was promised and measured goes into a file."""
        if self.share is None:
            return
        small = slim(pruner.model, pruner.coupling, pruner.keep)
        predicted = pruner.left()[LATENCY]
        promise = say_promise(pruner.model, small, pruner.coupling, self.share, predicted, self.threads, say)
        if promise is not None:
            write_json(folder / PROMISE, asdict(promise))
