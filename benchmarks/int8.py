"""Dense and slim, float32 and int8: size, latency and accuracy of their ONNX files in one table.

    mmcpd train configs/cpd/mobilenetv2_prune.py
    python benchmarks/int8.py --row configs/cpd/mobilenetv2_prune.py work_dirs/mobilenetv2_prune/slim.pth
    mmcpd prune configs/cpd/resnet20_prune_cifar10.py checkpoints/resnet20_cifar10.pth --target macs=0.5
    python benchmarks/int8.py --row configs/cpd/resnet20_prune_cifar10.py work_dirs/resnet20_prune_cifar10/slim.pth \
        --dense checkpoints/resnet20_cifar10.pth --cfg-options data_root=data/cifar10

Files hold the normalisation too, so that they take pictures as they are (`mmcpd deploy --preprocess --int8`); accuracy
is that of `mmcpd test` on each file, latency that of pairwise runs on one picture. Results go to
`benchmarks/results/int8.json`; `--table` prints them again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mmcpd.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / 'benchmarks' / 'results' / 'int8.json'


def mmcpd(*arguments: object) -> None:
    """Run a command of mmcpd; what it says goes to the screen.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, '-m', 'mmcpd', *map(str, arguments)]
    if (code := subprocess.run(command, check=False).returncode) != 0:
        raise SystemExit(code)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Export, quantise, time and test the models of one config."""
    config, checkpoint = args.row
    options = ['--cfg-options', *args.cfg_options] if args.cfg_options else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        how = [
            '--out',
            folder,
            '--runs',
            args.runs,
            '--threads',
            args.threads,
            '--calibrate',
            args.calibrate,
            '--opset',
            args.opset,
        ]
        dense = ['--dense', args.dense] if args.dense else []
        mmcpd('deploy', config, checkpoint, '--preprocess', '--int8', *how, *dense, *options)
        content = json.loads((folder / 'latency.json').read_text())
        if content['facts']['dense_weights'].startswith('initial'):
            raise SystemExit('the dense model has no trained weights: name them by --dense')
        times = {entry['name']: entry for entry in content['latency']}
        rows = []
        for model in content['models']:
            out = folder / f'{model["name"]}.json'
            mmcpd('test', config, folder / model['file'], '--work-dir', folder / 'work', '--out', out, *options)
            timed = times[model['name']]
            rows.append(
                {
                    'model': model['name'],
                    'params': model['params'],
                    'bytes': model['bytes'],
                    'parity': model['parity']['max_rel'],
                    **{key: timed[key] for key in ('median', 'ratio', 'ratio_p10', 'ratio_p90')},
                    'metrics': json.loads(out.read_text()),
                }
            )
    return {
        'config': str(config),
        'facts': content['facts'],
        'runs': args.runs,
        'threads': args.threads,
        'models': rows,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the results as a table in Markdown."""
    lines = ['| config | model | size MB | median ms | ratio | metric |', '|---|---|--:|--:|--:|--:|']
    for name, result in results.items():
        for row in result['models']:
            metric, value = next(iter(row['metrics'].items()))
            lines.append(
                f'| {name} | {row["model"]} | {row["bytes"] / 1e6:.2f} | {row["median"]:.3f} | {row["ratio"]:.2f} | '
                f'{value:.2f} {metric} |'
            )
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--row', nargs=2, metavar=('CONFIG', 'SLIM'), help='a config and its slim.pth')
    parser.add_argument('--dense', help='trained dense weights; default: dense.pth beside the slim.pth')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE')
    parser.add_argument('--runs', type=int, default=1000)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--opset', type=int, default=17, help='default 17, whose exporter is the faster one')
    parser.add_argument('--calibrate', type=int, default=256, help='pictures')
    parser.add_argument('--out', type=Path, default=RESULTS)
    parser.add_argument('--table', action='store_true', help='print what is there and measure nothing')
    args = parser.parse_args()
    if args.table == bool(args.row):
        parser.error('give --row CONFIG SLIM, or --table')
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.row:
        results[Path(args.row[0]).stem] = measure(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, results)
    print(table(results))


if __name__ == '__main__':
    main()
