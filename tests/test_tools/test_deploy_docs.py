"""The example in docs/deploy.md runs with NumPy and ONNX Runtime alone, on a file that mmcpd wrote."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config

from mmcpd.datasets import DigitsDataset
from mmcpd.engine.checkpoints import load_slim
from tests.test_tools.test_onnx_file import save_half

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_needs_numpy_and_onnx_runtime_alone(tool, tiny):
    text = (ROOT / 'docs' / 'deploy.md').read_text(encoding='utf-8')
    (code,) = re.findall(r'```python\n(.*?)```', text, re.S)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    checkpoint = save_half(tiny)
    options = ['--preprocess', '--postprocess', '--int8', '--calibrate', 8]
    assert tool('deploy', tiny, checkpoint, '--no-bench', '--opset', 17, *options)[0] == 0
    picture = DigitsDataset('test', indices=4)[3]['img']
    np.save(checkpoint.with_name('picture.npy'), picture)
    model = load_slim(Config.fromfile(tiny), checkpoint).eval()
    inputs = model.data_preprocessor({'inputs': [torch.from_numpy(picture).permute(2, 0, 1)]}, False)['inputs']
    with torch.no_grad():
        scores = model(inputs).softmax(1)[0]
    expected = f'{int(scores.argmax())}: {float(scores.max()):.1%}'
    alone = f'{code}\nimport sys\nassert not {{"torch", "mmengine", "mmcpd", "onnx"}} & sys.modules.keys()'

    def said() -> str:
        done = subprocess.run([sys.executable, '-c', alone], cwd=checkpoint.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert said() == expected
    np.save(checkpoint.with_name('picture.npy'), 255 - picture)
    assert said() != expected
    checkpoint.with_name('slim-int8.onnx').replace(checkpoint.with_name('slim.onnx'))
    assert re.fullmatch(r'\d: [\d.]+%', said())
