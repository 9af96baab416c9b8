"""When to prune, distil and slim in a training run; `mmcpd.prune`, `mmcpd.slim` and `at_once.py` do the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from torch import nn

from mmcpd.engine.at_once import check_label_free, check_way, with_softmax
from mmcpd.engine.averages import Averages
from mmcpd.engine.begin import AtOnce, prune_at_once_in_training_, rotate_in_training_
from mmcpd.engine.best import BestFiles
from mmcpd.engine.closure import StepClosure
from mmcpd.engine.comb_hook import comb_options, refuse_unknown
from mmcpd.engine.combing import comb_runner, shape_combed
from mmcpd.engine.dense_file import DENSE, read_dense, write_dense
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.ending import RunWatch, meta_of, report_ended, say_ended
from mmcpd.engine.latency import LatencyTarget
from mmcpd.engine.optimizers import optimizer_of, refuse_shards
from mmcpd.engine.plan import doubts, left_alone, plan
from mmcpd.engine.pruning_state import STATE, pruning_state
from mmcpd.engine.reader import trust
from mmcpd.engine.report import comparison, costs, numbers
from mmcpd.engine.saving import Proof, keep_unslimmed, refuse_not_finite, rehearse, save_checked
from mmcpd.engine.stage import at_target, refuse_pruned, stage_of
from mmcpd.engine.validation import validate_unseen
from mmcpd.engine.wrappers import bare_model, unwrapped
from mmcpd.names import look_up
from mmcpd.prune import NORMALIZERS, Pruner, Schedule, check_floors, check_importance, default_normalizer
from mmcpd.prune.selection import Floors
from mmcpd.registry import HOOKS
from mmcpd.slim.copying import copied

SLIM, TABLE = 'slim.pth', 'coupling.txt'


@HOOKS.register_module()
class PruneHook(Hook):
    """Comb the model, prune it while it trains, and save the slim model at the end.

    When pruning begins the dense model becomes the teacher (where a `Distiller` teaches itself) and goes to
    `dense.pth`; at the end come `slim.pth` and a table, dense beside slim. In a config:

        default_hooks = dict(prune=dict(type='mmcpd.PruneHook', target=dict(macs=0.5)))

    and on the command line `--cfg-options default_hooks.prune.target.macs=0.4`. With `at_once=True` all units go in one
    step when pruning begins, and the weights that stay are refitted: the best start for a short training of a model
    that is loaded.

    Args:
        target: how far: the share of the dense model's quantity that **remains**, between 0 and 1, by the names `macs`,
            `params`, `memory` (bytes of activations), `units`, `latency` (of the ONNX file on this machine, see
            docs/deploy.md); where there are several, all of them hold.
        begin: when pruning begins, an iteration (int) or a share of the run (float); dense training before it.
        end: when the last units go, likewise; fine-tuning after it.
        interval: iterations of scoring between two removals.
        curve: from 1 to the target: 'cubic' (fast first), 'linear', 'cosine', or 'paper': `units_per_event` each time.
        at_once: choose all units at `begin`; `end`, `interval` and `curve` then have no meaning.
        pictures, refit: of at_once: how many training pictures it looks at, and whether weights are refitted on them.
        rotate: at `begin`, sort the dimensions inside attention heads by what they carry; no output changes, and more
            accuracy is kept, see docs/results.md.
        importance: 'hessian' (the default), 'curvature', 'group_fisher', 'magnitude', 'random' or 'gauss_newton' (the
            default with at_once, which takes those that need no loss); with options it is a dict:
            dict(type='curvature', probes=2).
        normalize: what the score is divided by: 'memory', 'channel_memory', 'macs', 'params', 'latency', 'none'; by
            default 'latency' where that is a target, else 'macs' at once and 'memory' in training, see docs/results.md.
        round_to: groups of at least 64 units keep a multiple of it; 8 suits most hardware.
        min_units: units that each group keeps.
        remain: the share of their units that groups keep at least, by patterns of their names: a floor for those who
            know better, as {'backbone.layer4.*': 0.8}; 1.0 prunes none of them.
        heads, ignore, strict, unused, input_shape: as in `CombHook`.
        seed: of importances that draw random numbers.
        threads: of ONNX Runtime, for a target of latency; by default as many as there are cores.
        trust_checkpoint: let the checkpoints that this process reads run code, where that is refused.

    Raises:
        ValueError, PruneError, SlimError: a wrong option (when the hook is built), or a model that cannot be pruned so.

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
        at_once: bool = False,
        pictures: int = 512,
        refit: bool = True,
        rotate: bool = True,
        importance: str | Mapping[str, object] | None = None,
        normalize: str | None = None,
        round_to: int = 8,
        min_units: int = 1,
        remain: Mapping[str, float] = {},
        heads: str = 'dim',
        ignore: Sequence[str] = (),
        seed: int = 0,
        input_shape: Sequence[int] | None = None,
        strict: bool = False,
        unused: str = 'freeze',
        threads: int | None = None,
        trust_checkpoint: bool = False,
        **unknown: object,
    ) -> None:
        refuse_unknown(unknown, self)
        if trust_checkpoint:
            trust()
        gradual = {'end': end, 'interval': interval, 'curve': curve, 'units_per_event': units_per_event}
        check_way(at_once, gradual, {'pictures': pictures, 'refit': refit}, rotate)
        end = 1.0 if at_once else end  # nothing goes after begin
        self.schedule = Schedule(target, begin, end, interval, curve, units_per_event)
        self.at_once, self.pictures, self.refit, self.rotate = at_once, pictures, refit, rotate
        importance = ('gauss_newton' if at_once else 'hessian') if importance is None else importance
        (check_label_free if at_once else check_importance)(importance, seed=seed)
        self.latency = LatencyTarget(self.schedule.target, threads)
        normalize = default_normalizer(target, 'macs' if at_once else 'memory') if normalize is None else normalize
        look_up(NORMALIZERS, normalize, 'normalizer')
        self.importance, self.normalize, self.seed = importance, normalize, seed
        self.floors: Floors = {'min_units': min_units, 'round_to': round_to, 'remain': remain}
        check_floors(**self.floors)
        self.comb_options = comb_options(heads, ignore, strict, unused, input_shape)
        self._pruner: Pruner | None = None
        self.closure: StepClosure | None = None
        self.begun = False
        self.dense_metrics: dict[str, float] = {}
        self.dense_digest = ''  # of the weights in dense.pth
        self.failure: Exception | None = None  # why there is no slim file at the end
        self._untrained: nn.Module | None = None  # a copy of a model that no config describes
        self._loaded: dict[str, Any] | None = None
        self._validated: tuple[int, dict[str, float]] = (-1, {})
        self._left_alone: Mapping[str, str] = {}  # what was said of them
        self.best, self.watch = BestFiles(), RunWatch()

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
        refuse_shards(runner)
        runner.model.train()  # some backbones freeze their first stages only here
        loaded = self._loaded if runner.iter > 0 else None
        if loaded is not None:
            self._resume(runner, loaded)
        elif self._loaded is not None:
            refuse_pruned(runner.cfg.get('load_from') or 'what was loaded', self._loaded)
        self._untrained = None if 'model' in runner.cfg else copied(bare_model(runner.model))
        coupling = comb_runner(runner, **self.comb_options)
        model = bare_model(runner.model)
        coupling = self.latency.give(model, coupling, runner.logger.info)
        self._stepping = optimizer_of(runner.optim_wrapper, model, coupling)
        self._pruner = Pruner(
            model,
            coupling,
            self._stepping.optimizer,
            self.schedule.resolve(runner.max_iters),
            importance=with_softmax(self.importance, model),
            normalize=self.normalize,
            **self.floors,
            seed=self.seed,
        )
        self.averages = Averages(runner)
        for average in self.averages.copies:
            self.pruner.also_mask(average)
        score = self.pruner.importance
        if not self.at_once and (score.needs_closure or score.needs_outputs):
            self.closure = StepClosure(runner.model, self._stepping, coupling.example.forward)
            self.pruner.closure = self.closure if score.needs_closure else self.closure.outputs
        if is_main_process():
            (Path(runner.work_dir) / TABLE).write_text(f'{coupling}\n', encoding='utf-8')
        self._left_alone = self.pruner.left_alone
        fitted = f'refitted on {self.pictures} training pictures' if self.refit else 'not refitted'
        for line in plan(runner, self.pruner, f'all at once, {fitted}' if self.at_once else ''):
            runner.logger.info(line)
        for line in doubts(self.pruner):
            runner.logger.warning(line)
        if loaded is not None:
            self.pruner.load_state_dict(loaded['pruner'])
        else:
            if is_main_process():
                rehearse(self.pruner.model, coupling, Proof.of_runner(runner, self._untrained))
            self.pruner.skip_to(runner.iter)
        self.best.restarted = at_target(self.stage())
        self._log(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.pruner.begun and not self.begun:
            self._begin(runner)
        if self.closure is not None:
            self.closure.record(data_batch)
        if self.pruner.importance.needs_batches:
            self.pruner.importance.next_batch()
            if isinstance(self._stepping, AmpOptimWrapper):
                self.pruner.loss_scale = self._stepping.loss_scaler.get_scale()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        self.watch.see(runner.iter + 1, outputs)
        if self.pruner.step():
            self._log(runner)
        self.watch.warn(runner, self.pruner)

    def after_train_epoch(self, runner: Runner) -> None:
        self.pruner.mask_()  # others may have replaced statistics: they are saved and validated next

    def after_val_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        self._validated = (runner.iter, numbers(metrics or {}))

    def after_train(self, runner: Runner) -> None:
        self.pruner.stop()
        self.pruner.mask_()
        try:
            with self.averages.in_model():
                self._save(runner)
        except Exception as error:  # noqa: BLE001 - whatever fails, the weights are kept
            self.failure = error
            keep_unslimmed(runner, error)
        say_ended(runner, self.pruner, self.stage(), written=self.failure is None)
        self.best.describe(runner)
        if self.failure is None and is_main_process():
            self.latency.compare(self.pruner, Path(runner.work_dir), runner.logger.info)
        if self.failure is None:
            report_ended(runner, self.pruner.coupling)

    def _save(self, runner: Runner) -> None:
        """Validate, and write the slim model, of the weights that are validated.

        Raises:
            SlimError: it is not what was trained, or is not finite.
        """
        refuse_not_finite(self.pruner.model, self.watch.since)
        coupling, keep = self.pruner.coupling, self.pruner.keep
        dense = {**costs(coupling, coupling.keep()), 'metrics': self.dense_metrics}
        small = {**costs(coupling, keep), 'metrics': self._metrics(runner)}  # masked and slim compute the same
        if is_main_process():
            path = Path(runner.work_dir) / SLIM
            meta = meta_of(runner, coupling, dense, small, self.stage())
            proof = Proof.of_runner(runner, self._untrained)
            save_checked(self.pruner.model, coupling, keep, path, meta, proof)
            runner.logger.info(f'saved {path}, {stage_of(self.stage())}\n{comparison(dense, small)}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        if self._pruner is not None:
            checkpoint[STATE] = {
                'pruner': self._pruner.state_dict(),
                'begun': self.begun,
                'dense_metrics': self.dense_metrics,
                'dense_digest': self.dense_digest,
                'input_shape': shape_combed(self._pruner.coupling),
                'best_before': self.best.before,
                'latency': self.latency.state(),
                **self.stage(),
            }

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        self._loaded = pruning_state(checkpoint, runner.cfg.get('load_from') or 'what was loaded')

    def _begin(self, runner: Runner) -> None:
        """Keep the dense model, as a file and as the teacher; then prune at once, or start to score."""
        self.begun = True
        if runner.iter == 0 and runner.cfg.get('load_from') is None:
            runner.logger.warning(
                'pruning begins at iteration 0 and nothing was loaded: an untrained model is pruned. Set load_from, '
                'or a later begin'
            )
        self.pruner.stop()  # its hooks are no part of the teacher, which is a copy
        with self.averages.in_model():
            turned = rotate_in_training_(self.pruner) if self.rotate else ''
            if turned:
                runner.logger.info(turned)
            self.dense_metrics = self._metrics(runner)
            model = unwrapped(runner.model)
            if isinstance(model, Distiller):
                model.begin_distillation()
            self.dense_digest = write_dense(runner.work_dir, self.pruner.model)
            metrics = ', '.join(f'{name} {value:.2f}' for name, value in self.dense_metrics.items())
            runner.logger.info(f'pruning begins; the dense model is in {DENSE}: {metrics or "not validated"}')
            if self.at_once:
                how = AtOnce(self.importance, self.pictures, self.refit, self.seed)
                runner.logger.info(prune_at_once_in_training_(self.pruner, runner.cfg, how, Path(runner.work_dir)))
                self._log(runner)
            if turned or self.at_once:
                self.averages.follow_()
        self.pruner.start()

    def _resume(self, runner: Runner, loaded: Mapping[str, Any]) -> None:
        """Bring back what was known of the dense model, and the teacher, which is a copy without the pruner's hooks."""
        self.begun, self.dense_metrics = loaded['begun'], loaded['dense_metrics']
        self.dense_digest = loaded['dense_digest']
        self.best.before = loaded['best_before']
        self.comb_options['input_shape'] = loaded['input_shape']
        self.latency.resume(loaded.get('latency'))
        model = unwrapped(runner.model)
        if self.begun and isinstance(model, Distiller) and model.teaches_itself:
            model.snapshot_teacher(read_dense(runner.work_dir, runner._load_from, self.dense_digest))

    def _metrics(self, runner: Runner) -> dict[str, float]:
        """Return the validation's metrics at this iteration; validate if that was not just done."""
        if self._validated[0] != runner.iter:
            self._validated = (runner.iter, validate_unseen(runner))
        return self._validated[1]

    def stage(self) -> dict[str, Any]:
        """Return what is left of each quantity and the target, which `stage_of` reads."""
        return {'left': self.pruner.left(), 'target': dict(self.schedule.target)}

    def _log(self, runner: Runner) -> None:
        stage = self.stage()
        for quantity, share in stage['left'].items():
            runner.message_hub.update_scalar(f'train/prune_{quantity}', share)
        if self.pruner.left_alone != self._left_alone:
            self._left_alone = self.pruner.left_alone
            for line in left_alone(self.pruner):
                runner.logger.warning(line)
        if at_target(stage):
            self.best.restart(runner)
