"""Export a slim model and its dense original to ONNX, check both against torch, and measure them.

Writes slim.onnx, dense.onnx and latency.json. The files hold the model's tensor mode on normalised images: a
classifier's logits, a segmentor's logits at the resolution of its head, a detector's maps. With --boxes they hold what
a one-stage detector finds: boxes (N, K, 4) in pixels of the input, scores (N, K) and labels (N, K; -1: none), N fixed.

With --preprocess files take pictures of whole numbers from 0 to 255 as they are, with --postprocess they return a
classifier's scores, or each pixel's class at the picture's size: then an application needs the file alone. Files say
in their metadata_props what they take and return. With --int8 each gets a quantised one beside it, slim-int8.onnx.
`mmcpd test CONFIG slim.onnx` measures what a file predicts; of a detector, one with --boxes.

Example:
  mmcpd deploy mmcpd::cpd/resnet50_prune.py work_dirs/resnet50_prune/slim.pth
  mmcpd deploy my_config.py slim.pth --shape 512 512 --runs 200 --random-input
  mmcpd deploy my_config.py slim.pth --preprocess --postprocess --int8
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmcpd.cli.checks import check_checkpoint, check_data, check_folder
from mmcpd.cli.common import UserError, check_least
from mmcpd.cli.configs import read_config
from mmcpd.cli.whole_file import WholeFile
from mmcpd.deploy import Exporter, Parity, check_detections, check_parity, deploy
from mmcpd.deploy.graph import WholeForward
from mmcpd.deploy.waiting import waiting
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_dense, load_slim, read_checkpoint, removed_units
from mmcpd.engine.detections import detections, predictions, why_no_boxes
from mmcpd.engine.examples import data_batches, example_inputs, random_batches
from mmcpd.engine.operators import followed
from mmcpd.engine.pictures import pictures
from mmcpd.engine.run_folder import PRUNED, json_of
from mmcpd.engine.samples import pass_on_pictures
from mmcpd.engine.slim_file import is_slim, read_slim
from mmcpd.errors import SlimError
from mmcpd.progress import ProgressLine


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', help='a slim.pth')
    add('--out', type=Path, help="folder, or the slim model's file (.onnx); default: the checkpoint's folder")
    add('--opset', type=int, help="ONNX operator set; default 18, or the first with the model's operators")
    add('--exporter', type=Exporter, choices=list(Exporter), help='default: torch.export from opset 18')
    add('--shape', type=int, nargs=2, metavar=('H', 'W'), help="size of the input; default: the config's")
    add('--batch', type=int, default=1, help='batch size of the measurement; default 1')
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument('--batch-dynamic', action='store_true', help='leave the batch size open (the default)')
    batch.add_argument('--batch-static', '--static', action='store_true', help='fix the batch size to --batch')
    add('--size-dynamic', action='store_true', help='leave height and width open, and compare at another size too')
    add('--preprocess', action='store_true', help='the file normalises and reorders channels: it takes uint8 pictures')
    add('--postprocess', action='store_true', help="the file returns scores, or each pixel's class")
    add('--int8', action='store_true', help='quantise as well, calibrated on training pictures')
    add('--calibrate', type=int, default=256, metavar='N', help='pictures to calibrate on; default 256')
    add('--boxes', action='store_true', help="a detector's boxes, scores and labels after nms, instead of its maps")
    add('--runs', type=int, default=1000, help='paired runs; default 1000')
    add('--time-limit', type=float, metavar='S', help='seconds after which no run starts')
    add('--threads', type=int, help="ONNX Runtime's threads; default: as many as cores")
    weights = 'dense.pth beside the checkpoint, what `mmcpd prune` pruned, or initial weights'
    add('--dense', help=f"the dense model's weights; default: {weights}")
    add('--no-bench', action='store_true', help='export and check only')
    add('--random-input', action='store_true', help='check and measure on noise, where there are no test data')


def dense_model(cfg: Config, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the dense model and where its weights come from; its speed does not depend on them."""
    beside = Path(args.checkpoint).with_name('dense.pth')
    weights = args.dense or (str(beside) if beside.is_file() else pruned_from(Path(args.checkpoint)))
    if weights is None:
        torch.manual_seed(0)
        return build_dense(cfg), 'initial, seed 0'
    if removed := removed_units(read_checkpoint(weights)):
        raise UserError(f'--dense: {weights} was pruned ({removed} units are gone); give one from before pruning began')
    try:
        return load_dense(cfg, weights), weights
    except SlimError as error:
        if args.dense:
            raise
        raise UserError(f"{error}; give the run's own config, or the dense weights by --dense") from error


def pruned_from(checkpoint: Path) -> str | None:
    """Return the dense checkpoint that `mmcpd prune` made a slim one of, or None where it is not there any more."""
    file = checkpoint.with_name(PRUNED)
    settings = ((json_of(file) or {}) if file.is_file() else {}).get('settings') or {}
    weights = settings.get('checkpoint')
    if not weights or not Path(weights).is_file() or is_slim(weights):
        return None
    try:
        return None if removed_units(read_checkpoint(weights)) else weights
    except SlimError:  # it may only be read where it is trusted
        return None


def real_batches(cfg: Config, model: nn.Module, args: argparse.Namespace) -> tuple[list[Tensor], str]:
    """Return batches of several sizes and where they come from."""
    sizes = (args.batch,) * 3 if args.batch_static else (args.batch, args.batch + 2, args.batch + 3)
    shape = tuple(args.shape) if args.shape else None
    if args.random_input:
        return random_batches(cfg, model, sizes, shape), 'normal noise, seed 0 (--random-input)'
    try:
        check_data(cfg, ('test_dataloader',))
    except UserError as error:
        raise UserError(f'{error}; or add --random-input') from error
    return data_batches(cfg, model, sizes, shape), f'test data ({cfg.test_dataloader.dataset.type})'


def _check_boxes(path: Path, model: nn.Module, batches: list[Tensor], forward: object) -> Parity:
    before = forward.before if isinstance(forward, WholeForward) else None
    return check_detections(
        path, model, batches, lambda model, x: predictions(model, x if before is None else before(x))
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that make no sense.

    Raises:
        UserError: which.
    """
    check_least(args, 1, 'shape', 'batch', 'runs', 'threads', 'calibrate')
    if args.time_limit is not None and not args.time_limit > 0:
        raise UserError(f'--time-limit must be above 0, not {args.time_limit}')
    if args.boxes and args.batch_dynamic:
        raise UserError('--boxes: the batch size of a file with boxes is fixed (--batch); leave --batch-dynamic out')
    for name in ('postprocess', 'size_dynamic'):
        if args.boxes and getattr(args, name):
            raise UserError(f'--{name.replace("_", "-")} is not for files with boxes: leave it or --boxes out')
    if args.int8 and args.random_input:
        raise UserError('--int8 is calibrated on pictures of the training data: leave --random-input out')
    args.batch_static = args.batch_static or args.boxes  # nms is a node for each picture
    check_checkpoint(args.checkpoint, 'checkpoint')
    check_checkpoint(args.dense, '--dense')


def calibration_pictures(cfg: Config, model: nn.Module, args: argparse.Namespace) -> list[Tensor]:
    """Return pictures of the training data, as the model sees them in a test, for --int8."""
    if not args.int8:
        return []
    check_data(cfg, ('train_dataloader',))
    shape = (example_inputs(cfg, model).shape[1], *args.shape) if args.shape else None
    return pictures(cfg, model, args.calibrate, shape=shape, progress=ProgressLine('reading pictures', 'batches'))


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    check_options(args)
    out = args.out or Path(args.checkpoint).parent
    folder, name = (out.parent, out.stem) if out.suffix == '.onnx' else (out, 'slim')
    if name in ('dense', 'dense-int8'):
        raise UserError(f'--out: {out} is where the dense model goes; choose another name')
    check_folder(folder, '--out')
    slim = load_slim(cfg, args.checkpoint)
    dense, weights = dense_model(cfg, args)
    models = {'dense': dense, name: slim}
    batches, source = real_batches(cfg, slim, args)
    if args.boxes and (why := why_no_boxes(slim)):
        raise UserError(f'{args.config}: no boxes can be exported of a {type(slim).__name__}: {why}; leave --boxes out')
    try:
        forward = detections if args.boxes else pass_on_pictures(slim, batches[0])
    except ValueError as error:
        raise UserError(f'{args.config}: {error}') from error
    whole = WholeFile.of(cfg, slim, batches[0], forward, args)
    calibration = calibration_pictures(cfg, slim, args)
    print(f'inputs: {source}; dense weights: {weights}')
    facts = {'config': args.config, 'checkpoint': args.checkpoint, 'dense_weights': weights}
    with followed():
        report = deploy(
            models,
            whole.taken(batches),
            folder,
            opset=args.opset,
            dynamic_batch=not args.batch_static,
            forward=whole.forward,
            check=_check_boxes if args.boxes else check_parity,
            runs=0 if args.no_bench else args.runs,
            time_limit=args.time_limit,
            threads=args.threads,
            progress=ProgressLine('measuring', 'rounds'),
            facts={**facts, 'inputs': source, 'seed': 0, 'calibration': sum(map(len, calibration))},
            dynamic_size=args.size_dynamic,
            exporter=args.exporter,
            metadata={each: {**whole.facts, 'kept': kept(each, models, args.checkpoint)} for each in models},
            calibration=whole.taken(calibration),
            waiting=waiting,
        )
    written = [f'{folder}/{each.file}' for each in report.models]
    print(f'\n{report}\n\nwrote {", ".join(written)} and {folder}/latency.json')


def kept(name: str, models: Mapping[str, nn.Module], checkpoint: str) -> dict[str, float]:
    """Return what share of the dense model's parameters a model has, and of its MACs and memory where that is known."""
    if name == 'dense':
        return {'params': 1.0}
    counts = [sum(each.numel() for each in models[key].parameters()) for key in ('dense', name)]
    meta = read_slim(checkpoint)['meta']
    dense, slim = meta.get('first') or meta.get('dense') or {}, meta.get('slim') or {}  # costs, and metrics in a dict
    shares = {key: slim[key] / dense[key] for key in ('macs', 'memory') if key in slim and dense.get(key)}
    return {**shares, 'params': counts[1] / counts[0]}
