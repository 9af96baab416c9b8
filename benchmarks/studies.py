"""Run the distillation studies: train, prune, distil and score small segmentors on SYNTHETIC scenes of digits.

What the four `study_*.py` share. A study is a list of cases for each seed; a case is one model, and a case that two
studies need is run once. For each seed one dense model is trained, and every pruned model of that seed starts from it,
so comparisons are in pairs. Losses and hooks are those of `configs/cpd/seaformer_prune*.py`; the model is a
plain convolutional one, for within a minute's training a SeaFormer tells ink from paper, and no digit from another.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import BaseModule
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout, installed or not

from benchmarks import study_report
from mmcpd.datasets import DigitScenesDataset
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import fill, load_slim
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.wrappers import bare_model

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / 'configs' / 'cpd'
RESULTS = ROOT / 'benchmarks' / 'results' / 'distillation.json'
DISTILLERS = ('none', 'KD', 'CWD', 'CIRKD')
DENSE = {'dense': 1.0, 'large': 1.5}  # unpruned models, and how wide they are
LARGE_DIGITS = {'count': (1, 2), 'scale': (0.6, 0.9)}  # so that small models learn them in minutes
TARGET = 0.35  # of the MACs remain, where a study does not vary it
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmseg', 'numpy')
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large an experiment is; results of unlike scales are never mixed."""

    iters: int = 300  # of a pruned model; units go in the first half
    dense_iters: int = 1000
    size: int = 32  # pixels
    batch: int = 16
    scenes: int = 2000  # to train on
    val_scenes: int = 300


@dataclass(frozen=True)
class Case:
    """One model: `kind` is a distiller, or 'dense' or 'large' for an unpruned model."""

    seed: int
    kind: str
    teacher: str = 'self'  # or 'large'
    target: float = TARGET

    @property
    def name(self) -> str:
        if self.kind in DENSE:
            return f's{self.seed}_{self.kind}'
        return f's{self.seed}_{self.kind}_{self.teacher}_{self.target:g}'

    def needs(self) -> list[Case]:
        """Return the unpruned models that this one begins with, or learns from."""
        if self.kind in DENSE:
            return []
        return [Case(self.seed, kind) for kind in ('dense', self.teacher) if kind in DENSE]


@dataclass(frozen=True)
class Study:
    """One question: the cases of a seed, and how their results are shown."""

    name: str
    cases: Callable[[int], list[Case]]
    table: Callable[[list[Row]], str]
    plot: Callable[[list[Row], Path], None]


@MODELS.register_module()
class PlainNet(BaseModule):
    """Encode by a chain of 3x3 convolutions with torch's own initialisation: what learns digits within a minute."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride, dilation in zip([3, *widths], widths, strides, dilations, strict=False):
            layers.append(nn.Conv2d(before, after, 3, stride, dilation, dilation, bias=False))
            layers += [nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        """Map pictures (N, 3, H, W) to features (N, widths[-1], H / 4, W / 4)."""
        return (self.layers(x),)


@DATASETS.register_module()
class DrawnOnceScenes(DigitScenesDataset):
    """Keep each scene once it is drawn and packed: that takes as long as a small model's forward."""

    packed: ClassVar[dict[tuple, Row]] = {}

    def prepare_data(self, idx: int) -> Row:
        key = (self.seed, self.split, self.size, idx)
        if key not in self.packed:
            self.packed[key] = super().prepare_data(idx)
        return dict(self.packed[key])


# -- one case ----------------------------------------------------------------------------------------------------------
def config_of(case: Case, scale: Scale, out: Path) -> Config:
    """Return the shipped config of a case, at the study's scale."""
    file = 'seaformer_prune.py' if case.kind in (*DENSE, 'none') else f'seaformer_prune_{case.kind.lower()}.py'
    cfg = Config.fromfile(CONFIGS / file)
    if case.kind == 'KD':
        cfg.model.losses[0].tau = 1.0  # as all tables in docs/distillation.md have it
    plain_(cfg.model.student, DENSE.get(case.kind, 1), scale.size)
    for loader, length in ((cfg.train_dataloader, scale.scenes), (cfg.val_dataloader, scale.val_scenes)):
        loader.batch_size = scale.batch
        loader.dataset.update(type='DrawnOnceScenes', size=scale.size, length=length, **LARGE_DIGITS)
    cfg.update(val_dataloader=None, val_cfg=None, val_evaluator=None)  # scored afterwards, by class
    cfg.update(test_dataloader=None, test_cfg=None, test_evaluator=None)
    cfg.merge_from_dict({'default_hooks.checkpoint.interval': -1, 'default_hooks.checkpoint.save_last': False})
    cfg.update(log_level='WARNING', work_dir=str(out / case.name), randomness=dict(seed=case.seed))
    cfg.experiment_name = f'{case.name}_{time.time_ns()}'  # MMEngine keeps what is said under a name
    iters = scale.dense_iters if case.kind in DENSE else scale.iters
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=iters, val_interval=iters + 1)
    warm_up = max(1, iters // 20)
    cfg.param_scheduler = [
        dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=warm_up),
        dict(type='PolyLR', power=1.0, eta_min=1e-5, by_epoch=False, begin=warm_up),
    ]
    cfg.optim_wrapper.optimizer.lr = 3e-3 if case.kind in DENSE else 1e-3
    if case.kind in DENSE:
        cfg.model = cfg.model.student  # Config.update would merge the two
        cfg.default_hooks.pop('prune')
        return cfg
    cfg.load_from = str(out / Case(case.seed, 'dense').name / 'model.pth')
    options = dict(target=dict(macs=case.target), begin=0, end=0.5, interval=max(1, scale.iters // 40), round_to=1)
    cfg.default_hooks.prune.update(options)
    if case.kind == 'none':
        cfg.model.update(teacher=None, losses=[])
    elif case.teacher == 'large':
        folder = out / Case(case.seed, 'large').name
        cfg.model.teacher = dict(config=str(folder / 'config.py'), checkpoint=str(folder / 'model.pth'))
    return cfg


def plain_(model: Config, width: float, size: int) -> None:
    """Make the config's segmentor a plain convolutional one of `width` times 16 to 64 channels, in place."""
    c = round(16 * width)
    model.data_preprocessor.size = (size, size)
    widths, strides, dilations = [c, 2 * c, *[4 * c] * 4], [2, 1, 2, 1, 1, 1], [1, 1, 1, 1, 2, 4]
    model.backbone = dict(type='PlainNet', widths=widths, strides=strides, dilations=dilations)
    model.decode_head = dict(
        type='mmseg.FCNHead',
        in_channels=4 * c,
        channels=4 * c,
        num_convs=0,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=11,
        align_corners=False,
        loss_decode=dict(type='mmseg.CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
        init_cfg=dict(type='Normal', std=0.07, override=dict(name='conv_seg')),
    )


def run_case(case: Case, scale: Scale, out: Path) -> Row:
    """Train one model, score it, and write `result.json` into its folder; a folder that has one is read.

    Raises:
        ValueError: The folder holds a result of another scale.
    """
    folder = out / case.name
    file = folder / 'result.json'
    if file.is_file():
        row = json.loads(file.read_text())
        if row['scale'] != dataclasses.asdict(scale):
            raise ValueError(f'{file} is of the scale {row["scale"]}: choose another --out, or the same numbers')
        return row
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    start, cpu = time.perf_counter(), time.process_time()
    cfg = config_of(case, scale, out)
    folder.mkdir(parents=True)
    cfg.dump(folder / 'config.py')
    runner = Runner.from_cfg(cfg)
    runner.train()
    row = {'case': dataclasses.asdict(case), 'scale': dataclasses.asdict(scale)}
    if case.kind in DENSE:
        torch.save(bare_model(runner.model).state_dict(), folder / 'model.pth')
        model: nn.Module = build_dense(cfg)
        fill(model, torch.load(folder / 'model.pth', weights_only=True), folder / 'model.pth')
    else:
        meta = read_slim(folder / 'slim.pth')['meta']
        row['left'] = {name: meta['slim'][name] / meta['dense'][name] for name in ('macs', 'params', 'units')}
        row['macs'] = meta['slim']['macs']
        model = load_slim(cfg, folder / 'slim.pth')
        (folder / 'dense.pth').unlink()  # model.pth of the dense case again
    iou = class_iou(model.eval(), scale)
    row |= {'miou': float(np.nanmean(iou)), 'iou': [None if np.isnan(each) else float(each) for each in iou]}
    row |= {'params': sum(p.numel() for p in model.parameters()), **circumstances()}
    row |= {'seconds': round(time.perf_counter() - start, 1), 'cpu_seconds': round(time.process_time() - cpu, 1)}
    temporary = file.with_suffix('.part')
    temporary.write_text(json.dumps(row))
    os.replace(temporary, file)
    return row


@torch.no_grad()
def class_iou(model: nn.Module, scale: Scale) -> np.ndarray:
    """Return the IoU of each class (NaN where there is none) on all validation scenes, percent (11,)."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        options = {'size': scale.size, 'test_mode': True, 'pipeline': [dict(type='PackSegInputs')], **LARGE_DIGITS}
        scenes = DrawnOnceScenes('val', length=scale.val_scenes, **options)
    classes = len(scenes.METAINFO['classes'])
    confusion = np.zeros((classes, classes))
    for start in range(0, len(scenes), 50):
        batch = [scenes[i] for i in range(start, min(start + 50, len(scenes)))]
        for sample in model.test_step(pseudo_collate(batch)):
            pairs = classes * sample.gt_sem_seg.data.long() + sample.pred_sem_seg.data
            confusion += torch.bincount(pairs.flatten(), minlength=classes**2).view(classes, classes).numpy()
    hit = confusion.diagonal()
    union = confusion.sum(0) + confusion.sum(1) - hit
    return 100 * np.divide(hit, union, out=np.full(classes, np.nan), where=union > 0)


def circumstances() -> Row:
    """Say under what a number was measured."""
    return {
        'date': datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        'threads': torch.get_num_threads(),
        'python': platform.python_version(),
        'versions': {name: importlib.import_module(name).__version__ for name in PACKAGES},
    }


# -- all of them -------------------------------------------------------------------------------------------------------
def plan(studies: Sequence[Study], seeds: Sequence[int]) -> list[Case]:
    """List the cases in the order in which they run: seed by seed, each case once, what it needs before it."""
    wanted = [case for seed in seeds for study in studies for case in study.cases(seed)]
    return list(dict.fromkeys(each for case in wanted for each in (*case.needs(), case)))


def run_all(cases: Sequence[Case], scale: Scale, out: Path, results: Path) -> list[Row]:
    """Run what has no result yet, say how long the rest will take, save each result, and return all."""
    rows, spent = [], []
    for number, case in enumerate(cases, 1):
        there = (out / case.name / 'result.json').is_file()
        row = run_case(case, scale, out)
        rows.append(row)
        save(rows, results)
        if there:
            continue
        spent.append(row['seconds'])
        left = sum(not (out / c.name / 'result.json').is_file() for c in cases) * sum(spent) / len(spent)
        share = f'{row["left"]["macs"]:.0%} of the MACs, ' if 'left' in row else ''
        score = f'mIoU {row["miou"]:.2f} on synthetic scenes'
        print(
            f'[{number}/{len(cases)}] {case.name}: {share}{score}, {row["seconds"]:.0f} s, {left / 60:.0f} min left',
            flush=True,
        )
    return rows


def save(rows: Sequence[Row], file: Path) -> None:
    """Put results into the file that the report is made from; others of the same scale are kept."""
    known = json.loads(file.read_text()) if file.is_file() else []
    scales = [row['scale'] for row in rows]
    merged = {json.dumps(row['case']): row for row in (*known, *rows) if row['scale'] in scales}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('[\n' + ',\n'.join(json.dumps(merged[key]) for key in sorted(merged)) + '\n]\n')


def parse_args(description: str, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    for field in dataclasses.fields(Scale):
        parser.add_argument(f'--{field.name.replace("_", "-")}', type=int, default=field.default)
    parser.add_argument('--out', type=Path, default=Path('work_dirs/studies'), help='where runs go, and go on from')
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('--report', action='store_true', help='only write tables and plots from the results')
    parser.add_argument('--docs', type=Path, default=ROOT / 'docs' / 'distillation.md', help='where tables go')
    return parser.parse_args(arguments)


def main(description: str, studies: Sequence[Study], arguments: Sequence[str] | None = None) -> None:
    """Run studies, save their results, and write their tables and plots.

    Raises:
        ValueError: Results of another scale are in the way, or the document has no place for a table.
    """
    args = parse_args(description, arguments)
    if not args.report:
        warnings.filterwarnings('ignore')  # torch and OpenMMLab about each other
        torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', '1')))
        scale = Scale(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Scale)})
        run_all(plan(studies, args.seeds), scale, args.out, args.results)
    rows = json.loads(args.results.read_text())
    for study in studies:
        study_report.write_table(args.docs, study.name, study.table(rows))
        study.plot(rows, args.docs.parent / 'images' / f'study_{study.name}.png')
        print(study.table(rows), flush=True)
