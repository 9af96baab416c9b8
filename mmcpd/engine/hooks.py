"""When to comb, prune and slim in a training run; the work is done by `mmcpd.comb`, `mmcpd.prune` and `mmcpd.slim`."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner

from mmcpd.comb.api import HEADS
from mmcpd.engine.checkpoints import STATE, save_checked
from mmcpd.engine.closure import StepClosure
from mmcpd.engine.combing import comb_runner, shape_combed
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.examples import check_shape
from mmcpd.engine.plan import plan
from mmcpd.engine.report import comparison, costs
from mmcpd.engine.slim_file import save_whole
from mmcpd.engine.wrappers import bare_model, unwrapped
from mmcpd.names import check_options, look_up
from mmcpd.prune import NORMALIZERS, Pruner, Schedule, check_floors, check_importance
from mmcpd.registry import HOOKS

DENSE, SLIM, TABLE = 'dense.pth', 'slim.pth', 'coupling.txt'


@HOOKS.register_module()
class CombHook(Hook):
    """Comb the bare model before training: show what belongs together, and why the rest is frozen.

    A look at a model that nothing prunes; PruneHook combs by itself.

    Args:
        heads: what an attention gives up: 'dim', the same index in each head, or 'head', whole heads.
        ignore: groups that are never pruned, by patterns of their names: ['backbone.conv1', 'backbone.layer1.*'].
        strict: True: an operation without a rule is an error; False: what goes through it is frozen.
        input_shape: (C, H, W) of the input that is combed with, see `mmcpd.engine.examples.input_shape`.
        save: a file name in the work dir, or None.

    Raises:
        ValueError: an unknown option, or a value that makes no sense.

    Example:
        >>> CombHook(head='dim')
        Traceback (most recent call last):
        ValueError: CombHook has no option 'head': did you mean heads?
    """

    def __init__(
        self,
        *,
        heads: str = 'dim',
        ignore: Sequence[str] = (),
        strict: bool = False,
        input_shape: Sequence[int] | None = None,
        save: str | None = 'coupling.json',
        **unknown: object,
    ) -> None:
        _refuse(unknown, self)
        self.options = _comb_options(heads, ignore, strict, input_shape)
        self.save = save

    def before_train(self, runner: Runner) -> None:
        coupling = comb_runner(runner, **self.options)
        runner.logger.info(f'combed:\n{coupling}')
        if self.save is not None and is_main_process():
            coupling.to_json(Path(runner.work_dir) / self.save)


@HOOKS.register_module()
class PruneHook(Hook):
    """Comb the model, prune it while it trains, and save the slim model at the end.

    When pruning begins the dense model becomes the teacher (where a `Distiller` teaches itself) and goes to
    `dense.pth`; at the end come `slim.pth` and a table, dense beside slim. In a config:

        default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5)))

    and on the command line `--cfg-options default_hooks.prune.target.macs=0.4`.

    Args:
        target: how far: the share of the dense model's quantity that **remains**, between 0 and 1, by the names `macs`,
            `params`, `memory` (bytes of activations), `units`; where there are several, all of them hold.
        begin: when pruning begins, an iteration (int) or a share of the run (float); dense training before it.
        end: when the last units go, likewise; fine-tuning after it.
        interval: iterations of scoring between two removals.
        curve: from 1 to the target: 'cubic' (fast first), 'linear', 'cosine', or 'paper': `units_per_event` each time.
        units_per_event: only for the curve 'paper'.
        importance: 'hessian', 'curvature', 'group_fisher', 'magnitude' or 'random'; with options it is a dict:
            dict(type='curvature', probes=2).
        normalize: what the score is divided by: 'memory', 'channel_memory', 'macs', 'params' or 'none'.
        round_to: groups of at least 64 units keep a multiple of it; 8 suits most hardware.
        min_units: units that each group keeps.
        heads, ignore, strict, input_shape: as in `CombHook`.
        seed: of importances that draw random numbers.

    Raises:
        ValueError: an unknown option, or a value that makes no sense, when the hook is built; groups that the
            importance cannot score (those of frozen stages), before training.
        PruneError: nothing can be pruned, or not as far as the target, before training.

    Example:
        >>> PruneHook(target=dict(macs=0.4), importance='curvature').schedule.target
        {'macs': 0.4}
    """

    def __init__(
        self,
        *,
        target: Mapping[str, float] = dict(macs=0.5),
        begin: int | float = 0,
        end: int | float = 0.6,
        interval: int = 10,
        curve: str = 'cubic',
        units_per_event: int | None = None,
        importance: str | Mapping[str, object] = 'hessian',
        normalize: str = 'memory',
        round_to: int = 8,
        min_units: int = 1,
        heads: str = 'dim',
        ignore: Sequence[str] = (),
        seed: int = 0,
        input_shape: Sequence[int] | None = None,
        strict: bool = False,
        **unknown: object,
    ) -> None:
        _refuse(unknown, self)
        self.schedule = Schedule(target, begin, end, interval, curve, units_per_event)
        check_importance(importance, seed=seed)
        look_up(NORMALIZERS, normalize, 'normalizer')
        check_floors(min_units=min_units, round_to=round_to)
        self.importance, self.normalize, self.seed = importance, normalize, seed
        self.round_to, self.min_units = round_to, min_units
        self.comb_options = _comb_options(heads, ignore, strict, input_shape)
        self._pruner: Pruner | None = None
        self.closure: StepClosure | None = None
        self.begun = False
        self.dense_metrics: dict[str, float] = {}
        self._loaded: dict[str, Any] | None = None
        self._validated: tuple[int, dict[str, float]] = (-1, {})

    @property
    def pruner(self) -> Pruner:
        """The work behind this hook.

        Raises:
            RuntimeError: training has not started.
        """
        if self._pruner is None:
            raise RuntimeError('PruneHook makes its pruner when training starts: read it after that')
        return self._pruner

    def before_train(self, runner: Runner) -> None:
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError('EMAHook averages over weights that PruneHook removes: take one of them out of the hooks')
        if not isinstance(runner.optim_wrapper, OptimWrapper) or isinstance(runner.optim_wrapper, OptimWrapperDict):
            raise ValueError('PruneHook reads the gradients of one optimizer: OptimWrapperDict is not supported')
        runner.model.train()  # some backbones freeze their first stages only here
        loaded = self._loaded if runner.iter > 0 else None
        if loaded is not None:
            self._resume(runner, loaded)
        coupling = comb_runner(runner, **self.comb_options)
        self._pruner = Pruner(
            bare_model(runner.model),
            coupling,
            runner.optim_wrapper.optimizer,
            self.schedule.resolve(runner.max_iters),
            importance=self.importance,
            normalize=self.normalize,
            min_units=self.min_units,
            round_to=self.round_to,
            seed=self.seed,
        )
        if self.pruner.importance.needs_closure:
            self.closure = self.pruner.closure = StepClosure(runner.model, runner.optim_wrapper)
        if is_main_process():
            (Path(runner.work_dir) / TABLE).write_text(f'{coupling}\n', encoding='utf-8')
        for line in plan(runner, self.pruner):
            runner.logger.info(line)
        if loaded is not None:
            self.pruner.load_state_dict(loaded['pruner'])
        else:
            self.pruner.skip_to(runner.iter)
        self._log(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.pruner.begun and not self.begun:
            self._begin(runner)
        if self.closure is not None:
            self.closure.record(data_batch)
        if self.pruner.importance.needs_batches:
            self.pruner.importance.next_batch()
            if isinstance(runner.optim_wrapper, AmpOptimWrapper):
                self.pruner.loss_scale = runner.optim_wrapper.loss_scaler.get_scale()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.pruner.step():
            self._log(runner)

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        numbers = {name: value for name, value in (metrics or {}).items() if np.ndim(value) == 0}
        self._validated = (runner.iter, {name: float(value) for name, value in numbers.items()})

    def after_train(self, runner: Runner) -> None:
        self.pruner.stop()
        if self.pruner.importance.skipped:
            runner.logger.info(
                f'{self.pruner.importance.skipped} iterations entered no score: a gradient was not finite'
            )
        coupling, keep = self.pruner.coupling, self.pruner.keep
        dense = {**costs(coupling, coupling.keep()), 'metrics': self.dense_metrics}
        small = {**costs(coupling, keep), 'metrics': self._metrics(runner)}  # masked and slim compute the same
        if is_main_process():
            path = Path(runner.work_dir) / SLIM
            meta = {'cfg': runner.cfg.pretty_text, 'epoch': runner.epoch, 'iter': runner.iter}
            data = getattr(runner.train_dataloader.dataset, 'metainfo', None)
            meta |= {'input_shape': shape_combed(coupling), 'dense': dense, 'slim': small}
            meta |= {'dataset_meta': data} if data is not None else {}
            save_checked(self.pruner.model, coupling, keep, path, meta)
            runner.logger.info(f'saved {path}\n{comparison(dense, small)}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self._pruner is not None:
            checkpoint[STATE] = {
                'pruner': self._pruner.state_dict(),
                'begun': self.begun,
                'dense_metrics': self.dense_metrics,
                'input_shape': shape_combed(self._pruner.coupling),
            }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(STATE)

    def _begin(self, runner: Runner) -> None:
        """Keep the dense model, as a file and as the teacher, before anything is scored."""
        self.begun = True
        if runner.iter == 0 and runner.cfg.get('load_from') is None:
            runner.logger.warning(
                'pruning begins at iteration 0 and nothing was loaded: an untrained model is pruned. Set load_from, '
                'or a later begin'
            )
        self.pruner.stop()  # its hooks are no part of the teacher, which is a copy
        self.dense_metrics = self._metrics(runner)
        model = unwrapped(runner.model)
        if isinstance(model, Distiller):
            model.begin_distillation()
        if is_main_process():
            save_whole(Path(runner.work_dir) / DENSE, {'state_dict': self.pruner.model.state_dict()})
        self.pruner.start()
        metrics = ', '.join(f'{name} {value:.2f}' for name, value in self.dense_metrics.items())
        runner.logger.info(f'pruning begins; the dense model is in {DENSE}: {metrics or "not validated"}')

    def _resume(self, runner: Runner, loaded: Mapping[str, Any]) -> None:
        """Bring back what was known of the dense model, and the teacher, which is a copy without the pruner's hooks."""
        self.begun, self.dense_metrics = loaded['begun'], loaded['dense_metrics']
        self.comb_options['input_shape'] = loaded['input_shape']
        model = unwrapped(runner.model)
        if self.begun and isinstance(model, Distiller) and model.teaches_itself:
            path = Path(runner.work_dir) / DENSE
            if not path.is_file():
                raise ValueError(f'{path} is missing: it holds the teacher of the run that is resumed')
            model.snapshot_teacher(torch.load(path, map_location='cpu', weights_only=True)['state_dict'])

    def _metrics(self, runner: Runner) -> dict[str, float]:
        """Return the validation's metrics at this iteration; validate if that was not just done."""
        if runner.val_loop is None:
            return {}
        if self._validated[0] != runner.iter:
            training = runner.model.training
            runner.val_loop.run()
            runner.model.train(training)
        return self._validated[1]

    def _log(self, runner: Runner) -> None:
        for quantity, left in self.pruner.left().items():
            runner.message_hub.update_scalar(f'train/prune_{quantity}', left)


def _comb_options(heads: str, ignore: Sequence[str], strict: bool, input_shape: Sequence[int] | None) -> dict[str, Any]:
    """Check the options of combing, as far as that is possible without a model, and return them by name."""
    look_up(dict.fromkeys(HEADS), heads, 'heads')
    if not isinstance(ignore, list | tuple) or not all(isinstance(pattern, str) for pattern in ignore):
        raise ValueError(f"ignore is a list of patterns of group names, as ['backbone.layer1.*']: got {ignore!r}")
    if not isinstance(strict, bool):
        raise ValueError(f'strict is True or False: got {strict!r}')
    shape = None if input_shape is None else check_shape(input_shape)
    return {'heads': heads, 'ignore': list(ignore), 'strict': strict, 'input_shape': shape}


def _refuse(unknown: Iterable[str], hook: Hook) -> None:
    """Refuse options that are not in the hook's signature: MMEngine would raise a TypeError without near names."""
    known = [name for name in inspect.signature(type(hook)).parameters if name != 'unknown']
    check_options(unknown, known, type(hook).__name__)
