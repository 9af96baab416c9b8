"""Prune a trained model in minutes, without training and without labels, and write slim.pth.

Attention heads are rotated, units scored on a few hundred pictures, the least important ones removed, and the layers
around them refitted so that they give out what the dense model's do. --distill goes on with a short training on what
the dense model answers. CONFIG is any config of a model; the options of a PruneHook in it hold.

--target latency=0.6 times layers on this machine, once, and measures the slim model beside the dense one in the end.

Several --target give a curve of the metric against MACs, parameters and latency from one scoring.

Example:
  mmcpd prune my_config.py my_checkpoint.pth --target macs=0.5
  mmcpd prune my_config.py my_checkpoint.pth --target macs=0.5 --images photos/ --distill 240
  mmcpd prune my_config.py my_checkpoint.pth --target latency=0.6 --threads 1
  mmcpd prune my_config.py my_checkpoint.pth --target macs=0.75 --target macs=0.5 --target macs=0.35
"""

from __future__ import annotations

import argparse
import datetime
import platform
import shlex
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mmengine
from mmengine.config import Config
from mmengine.model import BaseModel
from torch import Tensor, nn

from mmcpd.cli.checks import check_hooks
from mmcpd.cli.configs import read_config
from mmcpd.cli.curve import write_curve
from mmcpd.cli.request import Request, Target, add_options, name_of, read_request
from mmcpd.cli.stages import Stages
from mmcpd.compat import require
from mmcpd.coupling import Coupling
from mmcpd.engine.at_once import PrunedAtOnce, ends_in_softmax, prune_at_once
from mmcpd.engine.checkpoints import load_any, read_checkpoint
from mmcpd.engine.combing import comb_by_config, shape_combed
from mmcpd.engine.evaluate import evaluate
from mmcpd.engine.label_free import teach_
from mmcpd.engine.latency import measured_times, say_promise, timed
from mmcpd.engine.pictures import pictures
from mmcpd.engine.predicted import PICTURES
from mmcpd.engine.report import comparison, costs
from mmcpd.engine.run_report import report_line
from mmcpd.engine.samples import on_pictures
from mmcpd.engine.saving import Proof, cut_checked, loadable, nothing_trained, save_proved
from mmcpd.engine.stage import check_target, stage_meta
from mmcpd.files import alone_in, whole, write_json
from mmcpd.prune import LATENCY, Schedule, check_reachable
from mmcpd.rotate import rotate_
from mmcpd.version import __version__

__all__ = ['add_options', 'main']
SLIM, REPORT, COUPLING, REFIT, CONFIG = 'slim.pth', 'prune.json', 'coupling.txt', 'refit.txt', 'config.py'


@dataclass(frozen=True, eq=False)
class Dense:
    """What all targets start from: the dense model, combed and rotated."""

    model: BaseModel
    coupling: Coupling
    batches: list[Tensor]
    facts: dict[str, Any]  # costs, and metrics where validated
    meta: dict[str, Any]  # of its checkpoint
    rotated: str | None
    seconds: dict[str, float]


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    check_hooks(cfg)
    request = read_request(args, cfg)
    if len(request.targets) > 1:
        require('deploy')
        require('demo')
    with alone_in(request.out):
        _prune(cfg, request)


def _prune(cfg: Config, request: Request) -> None:
    several = len(request.targets) > 1
    dense = prepare(cfg, request)
    floors = {name: request.choice[name] for name in ('min_units', 'round_to', 'remain') if name in request.choice}
    for target in request.targets:  # before the first minutes are spent
        check_reachable(dense.coupling, Schedule(target), **floors)
    models: dict[str, nn.Module] = {'dense': dense.model}
    facts, scores = [dense.facts], None
    ends: dict[Path, dict[str, Any]] = {}
    for target in request.targets:
        stages, name = Stages(), name_of(target)
        pruned = prune_at_once(
            dense.model, dense.coupling, dense.batches, target, scores=scores, refit=request.refit,
            absorb=request.distill > 0, seed=request.seed, progress=stages.progress, **request.choice,
        )  # fmt: skip
        stages.add(pruned.seconds)
        scores = pruned.scores
        print(f'\n{pruned}')
        small, report = slim_down(dense, pruned, target, cfg, request, stages)
        if LATENCY in target:
            wanted = target[LATENCY], pruned.left[LATENCY]
            promise = say_promise(dense.model.cpu(), small, dense.coupling, *wanted, request.threads, print)
            dense.model.to(request.device)
            report['latency'] = promise and asdict(promise)
        folder = request.out / name if several else request.out
        write(folder, small, report, dense, pruned, cfg)
        print(f'\n{comparison(dense.facts, report["slim"])}\nsaved {folder / SLIM} and {folder / REPORT}')
        shown = PICTURES if request.validate else 0
        print(report_line(folder, cfg, dense.coupling, pictures=shown, device=request.device))
        models[name] = small
        facts.append(report['slim'])
        ends[folder / SLIM] = report
    if several:
        dense.model.cpu()
        write_curve(request.out, models, facts, dense.batches[0][:1], request.threads, Stages())
    for file, report in ends.items():
        check_target(report, file)


def prepare(cfg: Config, request: Request) -> Dense:
    """Load the dense model and pictures, measure it, comb it and rotate its heads."""
    stages = Stages()
    with tempfile.TemporaryDirectory() as folder:
        path = loadable(cfg, request.checkpoint, Path(folder))  # a pruned training checkpoint is slimmed first
        model = load_any(cfg, path)
        meta = read_checkpoint(path)['meta']
    shape, module = meta.get('input_shape'), model.to(request.device)
    with stages('read pictures') as progress:
        batches = pictures(
            cfg, module, request.pictures, folder=request.images, shape=shape, seed=request.seed, progress=progress
        )
    metrics = _metrics(module, cfg, request, stages, 'dense')
    picture = batches[0][:1].to(request.device)
    with stages('comb'):
        coupling = on_pictures(comb_by_config(module, cfg, input_shape=shape), module, picture)
    print(f'{len(coupling.groups)} groups, {coupling.units} units')
    rotated = None
    if request.rotate:
        with stages('rotate'):
            rotated = str(rotate_(module, picture, forward=coupling.example.forward))
            print(rotated)
    if any(LATENCY in target for target in request.targets):
        with stages('time layers', 'layers') as progress:
            times = measured_times(module, coupling, request.threads, progress)
        coupling = timed(module, coupling, times, print)
    facts = {**costs(coupling, coupling.keep()), 'metrics': metrics}
    return Dense(module, coupling, batches, facts, meta, rotated, stages.seconds)


def slim_down(
    dense: Dense, pruned: PrunedAtOnce, target: Target, cfg: Config, request: Request, stages: Stages
) -> tuple[nn.Module, dict[str, Any]]:
    """Slim a masked model, let the dense one teach it where asked, and measure it; return it and the report."""
    with stages('slim'):
        small: Any = cut_checked(pruned.model, dense.coupling, pruned.keep)
    report: dict[str, Any] = {**stage_meta({'left': pruned.left, 'target': target}), 'dense': dense.facts}
    metrics = _metrics(small, cfg, request, stages, 'slim')
    if request.distill:
        report['before_distillation'] = {'metrics': metrics}
        with stages('distil', 'iterations') as progress:
            teach_(
                small, dense.model, cfg, request.distill, softmax=ends_in_softmax(dense.model),
                forward=dense.coupling.example.forward, lr=request.lr,
                pictures=[batch.to(request.device) for batch in dense.batches] if request.images else None,
                seed=request.seed, progress=progress,
            )  # fmt: skip
        metrics = _metrics(small, cfg, request, stages, 'slim, distilled')
    report['slim'] = {**costs(dense.coupling, pruned.keep), 'metrics': metrics}
    report |= {'seconds': {**dense.seconds, **stages.seconds}, 'rotated': dense.rotated}
    report['command'] = shlex.join(['mmcpd', 'prune', *sys.argv[1 + (sys.argv[1:2] == ['prune']) :]])
    paths = {'out': str(request.out), 'checkpoint': str(Path(request.checkpoint).resolve())}
    report |= {'settings': asdict(request) | paths, 'versions': versions()}
    return small.cpu(), report


def write(
    folder: Path, small: nn.Module, report: dict[str, Any], dense: Dense, pruned: PrunedAtOnce, cfg: Config
) -> None:
    """Write a slim model, its report, and the tables of coupling and refit into a folder, which is made."""
    meta = {'cfg': cfg.pretty_text, 'input_shape': shape_combed(dense.coupling)}
    meta |= {key: report[key] for key in ('dense', 'slim', 'left', 'target', 'reached')}
    meta |= {key: dense.meta[key] for key in ('dataset_meta',) if key in dense.meta}
    if first := dense.meta.get('first') or dense.meta.get('dense'):
        meta['first'] = first  # of a slim model that is pruned again: what the really dense one costs
    folder.mkdir(parents=True, exist_ok=True)
    mine = (folder / CONFIG).resolve() == Path(cfg.filename or '').resolve()
    names = (COUPLING, REFIT, REPORT) if mine else (COUPLING, REFIT, REPORT, CONFIG)
    with ExitStack() as stack:  # all of them appear together, when everything is written
        files = {name: stack.enter_context(whole(folder / name)) for name in names}
        files[COUPLING].write_text(f'{dense.coupling}\n', encoding='utf-8')
        files[REFIT].write_text(f'{pruned.refitted or "not refitted"}\n', encoding='utf-8')
        if not mine:  # never over what the user wrote
            files[CONFIG].write_text(cfg.pretty_text, encoding='utf-8')  # `mmcpd report` reads it
        write_json(files[REPORT], report)
        with nothing_trained():
            save_proved(folder / SLIM, small, meta, Proof.of_config(cfg, small), small)


def versions() -> dict[str, str]:
    """Return the versions of what the result depends on, and the date."""
    packages = {'mmcpd': __version__, 'python': platform.python_version(), 'mmengine': mmengine.__version__}
    packages |= {name: version(name) for name in ('torch', 'numpy')}
    return packages | {'date': datetime.datetime.now(datetime.timezone.utc).isoformat(timespec='seconds')}


def _metrics(model: nn.Module, cfg: Config, request: Request, stages: Stages, name: str) -> dict[str, float]:
    if not request.validate:
        return {}
    with stages(f'validate {name}') as progress:
        return evaluate(model, cfg, progress=progress)
