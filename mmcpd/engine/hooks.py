"""When to comb, prune and slim in a training run; the work is done by `mmcpd.comb` and `mmcpd.prune`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.engine.build import whole_forward
from mmcpd.engine.closure import Replay, random_state, set_random_state
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.finish import comparison, costs, finish
from mmcpd.engine.inputs import example_inputs, noise
from mmcpd.engine.options import comb_options, prune_options
from mmcpd.engine.slimmed import save_whole
from mmcpd.prune.pruner import Pruner

STATE = 'mmcpd'  # where the pruning state sits in a checkpoint
DENSE, SLIM = 'dense.pth', 'slim.pth'


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside a data-parallel wrapper and a distiller: the one that is combed, pruned and slimmed."""
    model = unwrapped(model)
    return model.student if isinstance(model, Distiller) else model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside a data-parallel wrapper."""
    return cast(nn.Module, model.module) if is_model_wrapper(model) else model


@HOOKS.register_module()
class CombHook(Hook):
    """Coupling the bare model before training: show what belongs together, and why the rest is frozen.

    Args:
        **options: `heads`, `ignore`, `strict` of `mmcpd.comb.comb`; `input_shape`, (C, H, W) of the example that runs
            through the model, by default the size in the config, or the first training picture's; `save`, a file
            name in the work dir, or None. They win over the config's `comb = dict(...)`.

    Raises:
        ValueError: an unknown option.

    Example:
        >>> custom_hooks = [dict(type='mmcpd.CombHook', heads='head'), dict(type='mmcpd.PruneHook')]
    """

    priority = 'ABOVE_NORMAL'  # before PruneHook, which needs the comb

    def __init__(self, **options: Any) -> None:
        self.options = comb_options({}, options)
        self.comb: Coupling | None = None

    def before_train(self, runner: Runner) -> None:
        options = comb_options(runner.cfg, self.options)
        shape, file = options.pop('input_shape', None), options.pop('save', None)
        model = bare_model(runner.model)
        example = _example(runner, shape).to(next(model.parameters()).device)
        self.comb = comb(model, example, forward=whole_forward, **options)
        runner.logger.info(f'combed:\n{self.comb}')
        if file is not None and is_main_process():
            self.comb.to_json(Path(runner.work_dir) / file)


@HOOKS.register_module()
class PruneHook(Hook):
    """Prune while training, from a share of the run to another, and save the slim model at the end.

    When pruning begins the dense model becomes the teacher (where a `Distiller` teaches itself) and goes to
    `dense.pth`; at the end `slim.pth` and a table, dense beside slim. Needs a `CombHook`.

    Args:
        **options: those of `mmcpd.prune.Pruner`: `begin`, `end`, `interval`, `target`, `metric`, `curve`,
            `units_per_event`, `importance`, `normalize`, `min_units`, `round_to`, `ignore`, `seed`; they win over the
            config's `prune = dict(...)`, whose defaults and comments are in `configs/_base_/cpd.py`.

    Raises:
        ValueError: an unknown option, or groups that the importance cannot score: frozen stages, for one.
        PruneError: nothing can be pruned, or not as far as the target; before training starts.

    Example:
        >>> prune = dict(target=0.4, metric='params')
        >>> custom_hooks = [dict(type='mmcpd.CombHook'), dict(type='mmcpd.PruneHook')]
    """

    def __init__(self, **options: Any) -> None:
        self.options = options
        self._pruner: Pruner | None = None
        self.replay: Replay | None = None
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
            raise RuntimeError('PruneHook starts with training; there is nothing to ask before')
        return self._pruner

    def before_train(self, runner: Runner) -> None:
        options = prune_options(runner.cfg, self.options)
        model = bare_model(runner.model)
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError('EMAHook averages over weights that PruneHook removes: take one of them out of the hooks')
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            raise ValueError('PruneHook reads the gradients of one optimizer: OptimWrapperDict is not supported')
        runner.model.train()  # some backbones freeze their first stages only here
        self._pruner = Pruner(model, _comb_of(runner), runner.optim_wrapper.optimizer, runner.max_iters, **options)
        if self.pruner.importance.needs_closure:
            self.replay = self.pruner.closure = Replay(runner.model, model, runner.optim_wrapper)
        plan = self.pruner.schedule
        runner.logger.info(
            f'pruning to {plan.target} of the {plan.metric} from iteration {plan.begin} to {plan.end} of '
            f'{runner.max_iters}, {plan.events()} times by {type(self.pruner.importance).__name__} / '
            f'{self.pruner.normalizer}'
        )
        if runner.iter > 0:
            self._resume(runner)
        self._log(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if not self.begun and runner.iter >= self.pruner.schedule.begin:
            self._begin(runner)
        if self.replay is not None:
            self.replay.record(data_batch)
        if self.pruner.importance.needs_batches:
            self.pruner.importance.next_batch()
            if isinstance(runner.optim_wrapper, AmpOptimWrapper):
                self.pruner.loss_scale = runner.optim_wrapper.loss_scaler.get_scale()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        if self.pruner.after(runner.iter + 1):
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
        comb, keep = self.pruner.comb, self.pruner.keep
        dense = {**costs(comb, comb.keep()), 'metrics': self.dense_metrics}
        small = {**costs(comb, keep), 'metrics': self._metrics(runner)}  # masked and slim compute the same
        if is_main_process():
            path = Path(runner.work_dir) / SLIM
            meta = {'cfg': runner.cfg.pretty_text, 'epoch': runner.epoch, 'iter': runner.iter}
            data = getattr(runner.train_dataloader.dataset, 'metainfo', None)
            meta |= {'dense': dense, 'slim': small, **({'dataset_meta': data} if data is not None else {})}
            finish(self.pruner.model, comb, keep, path, meta)
            runner.logger.info(f'saved {path}\n{comparison(dense, small)}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self._pruner is not None:
            state = {'begun': self.begun, 'dense_metrics': self.dense_metrics}
            checkpoint[STATE] = {**self._pruner.state_dict(), **state}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(STATE)

    def _begin(self, runner: Runner) -> None:
        """Keep the dense model, as a file and as the teacher, and start to score."""
        self.begun = True
        if runner.iter == 0 and runner.cfg.get('load_from') is None:
            runner.logger.warning(
                'pruning begins at iteration 0 and nothing was loaded: an untrained model is pruned. Set load_from, '
                'or a later begin'
            )
        self.dense_metrics = self._metrics(runner)
        model = unwrapped(runner.model)
        if isinstance(model, Distiller):
            model.begin_distillation()
        if is_main_process():
            save_whole(Path(runner.work_dir) / DENSE, {'state_dict': self.pruner.model.state_dict()})
        self.pruner.start()
        runner.logger.info(f'pruning begins; the dense model is in {DENSE}: {_shown(self.dense_metrics)}')

    def _resume(self, runner: Runner) -> None:
        """Go on where the checkpoint left."""
        if self._loaded is None:
            if runner.iter > self.pruner.schedule.begin:
                raise ValueError(
                    f'the checkpoint is of iteration {runner.iter} and has no pruning state, but pruning begins at '
                    f'{self.pruner.schedule.begin}: start from it by load_from, or resume one that was pruned'
                )
            return
        self.pruner.load_state_dict(self._loaded)
        self.begun, self.dense_metrics = self._loaded['begun'], self._loaded['dense_metrics']
        if not self.begun:
            return
        model = unwrapped(runner.model)
        if isinstance(model, Distiller) and model.teaches_itself:
            path = Path(runner.work_dir) / DENSE
            if not path.is_file():
                raise ValueError(f'{path} is missing: it holds the teacher of the run that is resumed')
            weights = torch.load(path, map_location='cpu', weights_only=True)['state_dict']
            model.snapshot_teacher(weights)  # before the norms are masked: it is a copy of the student
        self.pruner.start()

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
        for metric, left in self.pruner.left().items():
            runner.message_hub.update_scalar(f'train/prune_{metric}', left)


def _example(runner: Runner, shape: Sequence[int] | None) -> Tensor:
    """Return the input that is combed with, (1, C, H, W): of this shape, the config's, or the first picture's."""
    if shape is None and 'model' in runner.cfg:
        try:
            return example_inputs(runner.cfg)
        except ValueError as error:
            runner.logger.info(f'combing at the size of the first training picture: {error}')
    if shape is None:
        before = random_state()
        shape = runner.train_dataloader.dataset[0]['inputs'].shape
        set_random_state(before)
    return noise(1, shape)


def _comb_of(runner: Runner) -> Coupling:
    for hook in runner.hooks:
        if isinstance(hook, CombHook) and hook.comb is not None:
            return hook.comb
    raise ValueError("PruneHook prunes what CombHook found: add dict(type='mmcpd.CombHook') to custom_hooks")


def _shown(metrics: Mapping[str, float]) -> str:
    return ', '.join(f'{name} {value:.2f}' for name, value in metrics.items()) or 'not validated'
