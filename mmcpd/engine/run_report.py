"""Gather what a run has left in its folder for its report, and write `report.html` and `card.md` there."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmcpd.coupling import Coupling
from mmcpd.engine.build import hook_options, prunes, type_name
from mmcpd.engine.combing import comb_by_config
from mmcpd.engine.course import course, events
from mmcpd.engine.predicted import PICTURES, compare_predictions
from mmcpd.engine.report import ROWS
from mmcpd.engine.run_folder import DENSE, SLIM, Models, Run, config_of, latency_of, log_of, path_in_words
from mmcpd.engine.stage import stage_of
from mmcpd.engine.wrappers import student_config
from mmcpd.errors import first_line
from mmcpd.files import whole
from mmcpd.random_state import seeded
from mmcpd.registry import HOOKS
from mmcpd.report import RunReport, card, report_page
from mmcpd.report.data import Predictions, Quantity, Setting
from mmcpd.report.layers import frozen_reasons, layers, streams

PAGE, CARD = 'report.html', 'card.md'
PREFERRED = ('mIoU', 'mAP', 'top1')  # of several metrics, the one that counts
LOGGED = ('Python', 'PyTorch', 'TorchVision', 'OpenCV', 'MMEngine', 'GPU 0')


def write_run_report(
    run: Run,
    coupling: Coupling | None = None,
    *,
    pictures: int = PICTURES,
    device: str = 'cpu',
    progress: Callable[[int, int], None] | None = None,
) -> RunReport:
    """Write the page and the card of a run into its folder, and return what they hold.

    Args:
        run: what the run has left.
        coupling: what combing the dense model found; without it the model is combed anew.
        pictures: validation pictures to compare the models on; 0: none.
        device: where the models go.
        progress: called as `progress(done, pictures)`.

    Raises:
        SlimError: the run's files are unreadable, or of another model than its config.
    """
    models = run.models(device) if pictures or coupling is None else None
    if coupling is None and models is not None:
        coupling = comb_by_config(models.dense, run.cfg, input_shape=run.meta.get('input_shape'))
    found, why = None, 'no pictures were asked for (--pictures)'
    if pictures:
        found, why = _compared(run, models, pictures, progress)
    report = gather(run, coupling, found, why)
    for name, text in ((PAGE, report_page(report)), (CARD, card(report))):
        with whole(run.folder / name) as unfinished:
            unfinished.write_text(text, encoding='utf-8')
    return report


def report_line(folder: Path, cfg: Config, coupling: Coupling, *, pictures: int = PICTURES, device: str = 'cpu') -> str:
    """Write the report of a run that wrote its slim.pth, and say where it is, or why there is none: the run is done."""
    try:
        with seeded(0):
            write_run_report(Run.of(folder, cfg), coupling, pictures=pictures, device=device)
    except Exception as error:  # noqa: BLE001 - whatever a report lacks, the slim model is there
        why = first_line(error) or type(error).__name__
        return f'there is no {PAGE} ({type(error).__name__}: {why}); `mmcpd report {folder} --debug` shows where'
    return f'the report is {folder / PAGE}'


def _compared(
    run: Run, models: Models | None, pictures: int, progress: Callable[[int, int], None] | None
) -> tuple[Predictions | None, str]:
    """Return what both models predict, or None and why not."""
    if models is None:
        return None, f'the dense weights are not there any more ({DENSE}, or the checkpoint that was pruned)'
    try:
        found = compare_predictions(models.dense, models.slim, run.cfg, pictures=pictures, progress=progress)
    except FileNotFoundError as error:
        why = path_in_words(Path(error.filename)) if error.filename else first_line(error)
        return None, f'the validation data are not there ({why})'
    return found, 'the config has no validation data with labels of pictures, pixels or boxes'


def gather(run: Run, coupling: Coupling | None, found: Predictions | None = None, why: str = '') -> RunReport:
    """Return the report of a run; `why` says why there are no predictions."""
    meta, pruned = run.meta, run.pruned
    metrics = list((meta.get('slim') or {}).get('metrics') or {})
    past, options = course(run.folder, metrics), _options(run)
    # At the end of a run the log's iterations are the run's.
    length = int(meta.get('iter') or 0)
    shapes = {name: tuple(value.shape) for name, value in _tensors(run.content).items()}
    shown = layers(coupling, shapes) if coupling is not None else []
    quantities = _quantities(run, coupling)
    return RunReport(
        title=f'{run.folder.absolute().name}: {_model(run)}, pruned',
        model=_model(run),
        data=_data(run),
        stage=stage_of(meta) if 'target' in meta else '',
        quantities=quantities,
        metric=next((n for p in PREFERRED for n in metrics if p in n), metrics[0] if metrics else ''),
        layers=shown,
        streams=streams(coupling, shown) if coupling is not None else [],
        frozen=frozen_reasons(coupling) if coupling is not None else [],
        costs=past.costs,
        curves=past.curves,
        events=events(options, length) if past.costs and length and prunes(run.cfg) else [],
        predictions=found,
        settings=[Setting(name, _words(value)) for name, value in options.items()],
        versions=_versions(run),
        command=pruned.get('command') or _command(run),
        config=str(meta.get('cfg') or ''),
        load=_load(run),
        missing=_missing(run, coupling, bool(past.curves), quantities, '' if found else why),
    )


def _quantities(run: Run, coupling: Coupling | None) -> list[Quantity]:
    dense, slim = (run.meta.get(name) or {} for name in ('dense', 'slim'))
    found = [
        Quantity(name, f'{sign.strip()}', dense[key] / unit, slim[key] / unit)
        for key, (name, unit, sign) in ROWS.items()
        if key in dense and key in slim
    ]
    found += latency_of(run)
    tensors = _tensors(run.content)
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    before = None
    if coupling is not None:
        shapes = {name: info.shape for name, info in coupling.tensors.items()}
        full = {name: prod(shapes.get(name, value.shape)) for name, value in tensors.items()}
        before = sum(full[name] * value.element_size() for name, value in tensors.items()) / 1e6
    found.append(Quantity('weights', 'MB', before, size / 1e6))
    known = dense.get('metrics') or {}
    found += [Quantity(n, '', known.get(n), value, False) for n, value in (slim.get('metrics') or {}).items()]
    return found


def _tensors(content: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in {**content['buffers'], **content['state_dict']}.items()
        if hasattr(value, 'shape')
    }


def _model(run: Run) -> str:
    if 'model' not in run.cfg:
        return 'model'
    config = student_config(run.cfg)
    config = config.get('model', config) if type_name(config) == 'slimmed' else config
    backbone = config.get('backbone')
    return f'{type_name(config)} ({type_name(backbone)})' if backbone else type_name(config)


def _data(run: Run) -> str:
    loader = next(
        (run.cfg[f'{n}_dataloader'] for n in ('val', 'test', 'train') if run.cfg.get(f'{n}_dataloader')), None
    )
    shape = 'x'.join(map(str, run.meta.get('input_shape') or []))
    parts = [type_name(loader['dataset'])] if loader else []
    classes = (run.meta.get('dataset_meta') or {}).get('classes')
    parts += [f'{len(classes)} classes'] if classes else []
    return ', '.join([*parts, *([f'input {shape}'] if shape else [])])


def _options(run: Run) -> dict[str, Any]:
    """Return the settings: those of `mmcpd prune`, or every option of the config's PruneHook, defaults too."""
    if run.pruned:
        return dict(run.pruned.get('settings', {}))
    if not prunes(run.cfg):
        return {}
    hook: Any = HOOKS.get('PruneHook')
    given = inspect.signature(hook).parameters.values()
    defaults = {each.name: each.default for each in given if each.default is not inspect.Parameter.empty}
    return defaults | {name: value for name, value in hook_options(run.cfg).items() if name != 'type'}


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ', '.join(f'{name}={_words(each)}' for name, each in value.items()) or 'none'
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ', '.join(map(_words, value)) or 'none'
    return 'default' if value is None else str(value)


def _versions(run: Run) -> list[Setting]:
    found = {'mmcpd': str(run.meta.get('mmcpd_version', ''))} | dict(run.pruned.get('versions', {}))
    log = log_of(run)
    for name in LOGGED:
        if match := re.search(rf'^ +{name}: (.+)$', log, re.MULTILINE):
            found[name] = match[1].partition('(')[0].strip()
    return [Setting(name, value) for name, value in found.items() if value]


def _command(run: Run) -> str:
    """Return what repeats a training: its work dir has the config with all that the command line changed."""
    config = config_of(run)
    if config is None:
        return ''
    seed = re.search(r'^ +seed: (\d+)$', log_of(run), re.MULTILINE)
    fixed = (run.cfg.get('randomness') or {}).get('seed') is not None
    return shlex.join(['mmcpd', 'train', path_in_words(config), *(['--seed', seed[1]] if seed and not fixed else [])])


def _load(run: Run) -> str:
    """Return Python that loads the slim model where its folder is the current one."""
    config = config_of(run) or Path(run.cfg.filename or 'config.py')
    return f'from mmcpd.engine import load_slim\n\nmodel = load_slim({config.name!r}, {SLIM!r})'


def _missing(run: Run, coupling: Coupling | None, trained: bool, quantities: Sequence[Quantity], why: str) -> list[str]:
    found, folder = [], path_in_words(run.folder)
    if coupling is None:
        found.append(f'The picture of the model and its layers: they need the dense model ({DENSE} in the folder).')
    if not any(each.name == 'latency' for each in quantities):
        found.append(
            f'Latency: it was not measured. `mmcpd deploy CONFIG {folder}/{SLIM}` measures it, `mmcpd report {folder}` '
            'shows it then.'
        )
    if not any(not each.is_cost for each in quantities):
        found.append(
            'Accuracy: nothing was validated. It takes val_dataloader, val_evaluator and val_cfg in the config, and '
            'no --no-validate.'
        )
    if not trained:
        how = 'the model was pruned at once' if run.pruned else 'there is no vis_data/scalars.json in the folder'
        found.append(f'The course of a training: {how}; `mmcpd train` prunes in training and writes it.')
    if why:
        found.append(f'Predictions, class by class: {why}.')
    return found
