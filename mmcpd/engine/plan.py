"""Say in ten lines what a run will do."""

from __future__ import annotations

from collections.abc import Sized

from mmengine.runner import Runner
from torch import nn

from mmcpd.coupling import Coupling
from mmcpd.engine.combing import shape_combed
from mmcpd.engine.distillers import Distiller
from mmcpd.engine.report import ROWS
from mmcpd.engine.wrappers import unwrapped
from mmcpd.names import in_short
from mmcpd.prune import Pruner, few_events, reachable

REASONS = 3  # lines about what is frozen


def plan(runner: Runner, pruner: Pruner, at_once: str = '') -> list[str]:
    """Say in at most ten lines what a run will do: with what, how far, when, and where the results go.

    `at_once` says how all units are chosen when pruning begins, and is '' where they go one by one.
    """
    coupling, schedule = pruner.coupling, pruner.schedule
    model = unwrapped(runner.model)
    cost = coupling.cost(coupling.keep())
    sizes = ', '.join(f'{cost[key] / unit:,.2f}{sign} {name}' for key, (name, unit, sign) in ROWS.items())
    (prunable, total), (channels, width) = coupling.prunable(), coupling.prunable_channels()
    target = ' and '.join(f'{share:.1%} of the {ROWS.get(key, (key,))[0]}' for key, share in schedule.target.items())
    when = f'iterations {schedule.begin} to {schedule.end} of {runner.max_iters}, every {schedule.interval}'
    if at_once:
        when = f'iteration {schedule.begin} of {runner.max_iters}, {at_once}'
    lines = [
        ('model', f'{type(pruner.model).__name__} at {"x".join(map(str, shape_combed(coupling)))}: {sizes}'),
        ('data', _data(runner)),
        ('coupling', f'{len(coupling.groups)} groups, {coupling.units} units; {prunable / total:.1%} of the '
         f'parameters and {channels / max(width, 1):.1%} of the channels can be pruned'),
        *(('frozen', reason) for reason in _frozen(coupling)),
        *(('alone', line) for line in left_alone(pruner)),
        ('target', f'{target} of the dense model remain'),
        ('pruning', f'{when}, by {type(pruner.importance).__name__} / {pruner.normalizer}'),
        ('teacher', _teacher(model, int(schedule.begin))),
        ('results', f'{runner.work_dir}: coupling.txt now, dense.pth when pruning begins, slim.pth at the end'),
    ]  # fmt: skip
    return [f'{name:<9}{text}' for name, text in lines]


def left_alone(pruner: Pruner) -> list[str]:
    """Say which groups keep their units for want of a gradient, and how far the others can go: a line, or none."""
    if not pruner.left_alone:
        return []
    lowest = reachable(pruner.coupling, keep=pruner.keep, fixed=pruner.left_alone, **pruner.floors)
    reach = ' and '.join(f'{lowest[key]:.1%} of the {ROWS.get(key, (key,))[0]}' for key in pruner.schedule.target)
    return [
        f'{len(pruner.left_alone)} groups keep their units while they get no gradient '
        f'({next(iter(pruner.left_alone.values()))}): {in_short(pruner.left_alone)}; the others allow {reach}'
    ]


def doubts(pruner: Pruner) -> list[str]:
    """Say why a run may end before its target, as far as that is known before it starts: a line, or none."""
    line = few_events(pruner.coupling, pruner.schedule, pruner.floors)
    return [line] if line else []


def _data(runner: Runner) -> str:
    loaders = [runner.train_dataloader, *([] if runner.val_loop is None else [runner.val_dataloader])]
    sizes = [str(len(loader.dataset)) if isinstance(loader.dataset, Sized) else 'streamed' for loader in loaders]
    validated = f'{sizes[1]} to validate on' if len(sizes) > 1 else 'not validated'
    return f'{type(runner.train_dataloader.dataset).__name__}: {sizes[0]} samples to train on, {validated}'


def _frozen(coupling: Coupling) -> list[str]:
    """Return the reasons that freeze most rows, one a line, and how many more there are."""
    reasons = [f'{rows} rows: {reason}' for reason, rows in coupling.merged_reasons()]
    more = len(reasons) - REASONS + 1
    return reasons if more <= 1 else [*reasons[: REASONS - 1], f'{more} more reasons: see coupling.txt']


def _teacher(model: nn.Module, begin: int) -> str:
    if not isinstance(model, Distiller) or not model.loss_configs:
        return 'none: only the losses of the task'
    kinds = {name: type(model.distill[name]).__name__ for name in model.loss_configs}
    losses = ', '.join(f'{kinds[name]} at {" + ".join(c.taps)}' for name, c in model.loss_configs.items())
    if model.task_weight != 1:
        losses += f'; task losses times {model.task_weight:g}' if model.task_weight else '; no task loss, no labels'
    if model.teaches_itself:
        return f'the model itself as it is at iteration {begin}; {losses}'
    return f'{type(model.teacher).__name__}; {losses}' if model.teacher is not None else 'none'
