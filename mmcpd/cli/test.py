"""Test a config's model with a training checkpoint, a slim.pth or an ONNX file, and print the metrics.

An ONNX file of a classifier, of a segmentor, or of a detector with boxes runs in ONNX Runtime in place of the model,
on the CPU.

Example:
  mmcpd test mmcpd::cpd/resnet50_prune.py work_dirs/resnet50_prune/slim.pth
  mmcpd test my_config.py epoch_30.pth --out metrics.json
  mmcpd test my_config.py slim-int8.onnx
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mmengine
import numpy as np
from mmengine.evaluator import DumpResults

from mmcpd.cli.checks import check_checkpoint, check_data, check_folder
from mmcpd.cli.common import add_runner_options
from mmcpd.cli.configs import read_config, set_runner_options
from mmcpd.cli.runner import build_runner, run
from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.compat import start_processes
from mmcpd.engine.pruning_state import STATE
from mmcpd.engine.saving import use_checkpoint
from mmcpd.engine.slim_file import is_slim
from mmcpd.engine.stage import stage_of
from mmcpd.files import whole


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        'checkpoint', help='a slim.pth, a training checkpoint (a pruned one is slimmed first), or an .onnx'
    )
    add_runner_options(parser)
    parser.add_argument('--out', metavar='FILE', help='write results to a .pkl, or metrics to a .json')
    parser.add_argument('--out-item', choices=('metrics', 'pred'), help='what --out holds; default: by its ending')


def main(args: argparse.Namespace) -> None:
    cfg = read_config(args)
    set_runner_options(cfg, args)
    check_checkpoint(args.checkpoint, 'checkpoint')
    check_folder(cfg.work_dir, '--work-dir')
    check_data(cfg, ('test_dataloader',))
    if args.out:
        check_folder(Path(args.out).absolute().parent, '--out')
    with tempfile.TemporaryDirectory() as folder:
        is_onnx = Path(args.checkpoint).suffix == '.onnx'
        if is_onnx:
            from mmcpd.cli.onnx_file import run_file_, use_dense  # needs ONNX, which nothing else here does

            use_dense(cfg)
        else:
            use_checkpoint(cfg, args.checkpoint, Path(folder))
        start_processes(cfg)
        runner = build_runner(cfg)
        if is_onnx:
            check = run_file_(runner.model, args.checkpoint)
        item = args.out_item or ('metrics' if args.out and args.out.endswith('.json') else 'pred')
        if args.out and item == 'pred':
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
        metrics = run(runner, lambda runner: runner.test())
        if is_onnx:
            check()
    state = None if is_onnx or is_slim(args.checkpoint) else read_checkpoint(args.checkpoint).get(STATE)
    if state is not None:
        print(f'{args.checkpoint} is {stage_of(state)}')
    for name, value in metrics.items():
        print(f'{name}: {value:.4f}' if isinstance(value, (float, np.floating)) else f'{name}: {value}')
    if args.out and item == 'metrics':
        with whole(Path(args.out)) as unfinished:
            mmengine.dump(metrics, unfinished, file_format=Path(args.out).suffix[1:])
