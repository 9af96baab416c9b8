"""Export a slim model and its dense original to ONNX, check both against torch, and measure them.

Writes slim.onnx, dense.onnx and latency.json. The files hold the model's tensor mode on normalised images: a
classifier's logits, a segmentor's logits at the resolution of its head, a detector's maps. With --boxes they hold what
a one-stage detector finds: boxes (N, K, 4) in pixels of the input, scores (N, K) and labels (N, K; -1: none), N fixed.

Example:
  mmcpd deploy mmcpd::cpd/resnet50_prune.py work_dirs/resnet50_prune/slim.pth
  mmcpd deploy my_config.py slim.pth --shape 512 512 --runs 200 --random-input
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmcpd.cli.checks import check_checkpoint, check_data, check_folder
from mmcpd.cli.common import UserError
from mmcpd.cli.configs import read_config
from mmcpd.deploy import Parity, check_detections, check_parity, deploy
from mmcpd.engine.build import build_dense
from mmcpd.engine.checkpoints import load_dense, load_slim, read_checkpoint, removed_units
from mmcpd.engine.detections import detections, predictions, why_no_boxes
from mmcpd.engine.examples import data_batches, random_batches
from mmcpd.engine.samples import pass_on_pictures
from mmcpd.errors import SlimError
from mmcpd.progress import ProgressLine


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add('checkpoint', help='a slim.pth')
    add('--out', type=Path, help="folder, or the slim model's file (.onnx); default: the checkpoint's folder")
    add('--opset', type=int, default=18, help='ONNX operator set; default 18')
    add('--shape', type=int, nargs=2, metavar=('H', 'W'), help="size of the input; default: the config's")
    add('--batch', type=int, default=1, help='batch size of the measurement; default 1')
    batch = parser.add_mutually_exclusive_group()
    batch.add_argument('--batch-dynamic', action='store_true', help='leave the batch size open (the default)')
    batch.add_argument('--batch-static', '--static', action='store_true', help='fix the batch size to --batch')
    add('--boxes', action='store_true', help="a detector's boxes, scores and labels after nms, instead of its maps")
    add('--runs', type=int, default=1000, help='paired runs; default 1000')
    add('--time-limit', type=float, metavar='S', help='seconds after which no run starts')
    add('--threads', type=int, help="ONNX Runtime's threads; default: as many as cores")
    add('--dense', help="the dense model's weights; default: dense.pth beside the checkpoint, or initial weights")
    add('--no-bench', action='store_true', help='export and check only')
    add('--random-input', action='store_true', help='check and measure on noise, where there are no test data')


def dense_model(cfg: Config, args: argparse.Namespace) -> tuple[nn.Module, str]:
    """Return the dense model and where its weights come from; its speed does not depend on them."""
    beside = Path(args.checkpoint).with_name('dense.pth')
    weights = args.dense or (str(beside) if beside.is_file() else None)
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


def _check_boxes(path: Path, model: nn.Module, batches: list[Tensor], _forward: object) -> Parity:
    return check_detections(path, model, batches, predictions)


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    for name in ('batch', 'runs', 'threads', 'time_limit'):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f'--{name.replace("_", "-")} must be above 0, not {value}')
    args.batch_static = args.batch_static or args.boxes  # nms is a node for each picture
    if args.boxes and args.batch_dynamic:
        raise UserError('--boxes: the batch size of a file with boxes is fixed (--batch); leave --batch-dynamic out')
    check_checkpoint(args.checkpoint, 'checkpoint')
    check_checkpoint(args.dense, '--dense')
    out = args.out or Path(args.checkpoint).parent
    folder, name = (out.parent, out.stem) if out.suffix == '.onnx' else (out, 'slim')
    if name == 'dense':
        raise UserError(f'--out: {out} is where the dense model goes; choose another name')
    check_folder(folder, '--out')
    slim = load_slim(cfg, args.checkpoint)
    dense, weights = dense_model(cfg, args)
    batches, source = real_batches(cfg, slim, args)
    if args.boxes and (why := why_no_boxes(slim)):
        raise UserError(f'{args.config}: no boxes can be exported of a {type(slim).__name__}: {why}; leave --boxes out')
    try:
        forward = detections if args.boxes else pass_on_pictures(slim, batches[0])
    except ValueError as error:
        raise UserError(f'{args.config}: {error}') from error
    print(f'inputs: {source}; dense weights: {weights}')
    facts = {'config': args.config, 'checkpoint': args.checkpoint, 'dense_weights': weights}
    report = deploy(
        {'dense': dense, name: slim},
        [*batches],
        folder,
        opset=args.opset,
        dynamic_batch=not args.batch_static,
        forward=forward,
        check=_check_boxes if args.boxes else check_parity,
        runs=0 if args.no_bench else args.runs,
        time_limit=args.time_limit,
        threads=args.threads,
        progress=ProgressLine('measuring', 'rounds'),
        facts={**facts, 'inputs': source, 'seed': 0},
    )
    print(f'\n{report}\n\nwrote {folder}/dense.onnx, {folder}/{name}.onnx and {folder}/latency.json')
