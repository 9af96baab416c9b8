"""Test a config's model with a training checkpoint or a slim.pth, and print the metrics."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mmengine
import numpy as np
from mmengine.evaluator import DumpResults

from mmcpd.engine import cli
from mmcpd.engine.checkpoints import use_checkpoint
from mmcpd.engine.compat import leave, start_processes


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument('checkpoint', help='a slim.pth, or a checkpoint of the dense model')
    cli.add_runner_options(parser)
    parser.add_argument('--out', metavar='FILE', help='write results to a .pkl, or metrics to a .json')
    parser.add_argument('--out-item', choices=('metrics', 'pred'), help='what --out holds; default: by its ending')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    cfg = cli.read_config(args)
    cli.set_runner_options(cfg, args)
    cli.check_checkpoint(args.checkpoint, 'checkpoint')
    cli.check_folder(cfg.work_dir, '--work-dir')
    cli.check_data(cfg, ('test_dataloader',))
    if args.out:
        cli.check_folder(Path(args.out).absolute().parent, '--out')
    with tempfile.TemporaryDirectory() as folder:
        use_checkpoint(cfg, args.checkpoint, Path(folder))
        start_processes(cfg)
        runner = cli.build_runner(cfg)
        item = args.out_item or ('metrics' if args.out and args.out.endswith('.json') else 'pred')
        if args.out and item == 'pred':
            runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
        metrics = cli.run(runner, lambda runner: runner.test())
    for name, value in metrics.items():
        print(f'{name}: {value:.4f}' if isinstance(value, (float, np.floating)) else f'{name}: {value}')
    if args.out and item == 'metrics':
        mmengine.dump(metrics, args.out)


if __name__ == '__main__':
    arguments = parse_args()
    leave(cli.guard(main, arguments))
