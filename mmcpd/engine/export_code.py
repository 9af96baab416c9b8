"""Export a slim model as plain code and a safetensors file, and try both."""

from __future__ import annotations

import runpy
import tempfile
from pathlib import Path

from mmengine.config import Config
from torch import nn

from mmcpd.engine.build import ConfigLike, as_config
from mmcpd.engine.checkpoints import load_slim
from mmcpd.engine.examples import example_data
from mmcpd.engine.passes import deployed_pass
from mmcpd.engine.plain_code import plain_code
from mmcpd.engine.reader import PathLike
from mmcpd.engine.samples import Samples
from mmcpd.engine.slim_file import read_slim
from mmcpd.engine.tensor_file import write_tensors
from mmcpd.errors import SlimError, first_line
from mmcpd.files import whole
from mmcpd.random_state import seeded
from mmcpd.slim.compare import difference, evaluating
from mmcpd.slim.mask import named_tensors
from mmcpd.version import __version__

TOLERANCE = 1e-6  # of the largest output: the same operations on the same numbers


def export_code(config: ConfigLike, checkpoint: PathLike, out: Path) -> float:
    """Write `out`, a Python file that builds a slim model without mmcpd, and its weights beside it.

    Returns:
        How far the outputs of the model that the file builds are from the slim model's, relative to the largest.

    Raises:
        SlimError: the checkpoint is not a slim one of this config; something cannot be written plainly; or what the
            file builds computes something else. Then nothing is written.
    """
    cfg, content = as_config(config), read_slim(checkpoint)
    small = load_slim(cfg, checkpoint)
    text = plain_code(cfg, content['structure'], small, out.stem)
    values = named_tensors(small)  # one that is shared, under its first name
    meta = {'model': type(small).__name__, 'written_by': f'mmcpd {__version__}'}
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        code = Path(folder) / out.name
        code.write_text(text, encoding='utf-8')
        write_tensors(code.with_suffix('.safetensors'), values, meta)
        gap = try_out(code, small, cfg, content['meta'].get('input_shape'))
    write_tensors(out.with_suffix('.safetensors'), values, meta)
    with whole(out) as unfinished:
        unfinished.write_text(text, encoding='utf-8')
    return gap


def try_out(code: Path, small: nn.Module, cfg: Config, shape: list[int] | None) -> float:
    """Run the file, and compare the model that it builds with the slim one.

    Raises:
        SlimError: it does not run, or computes something else.
    """
    try:
        twin = runpy.run_path(str(code))['build']()
    except Exception as error:  # the model's own code raises what it likes
        raise SlimError(f'{type(small).__name__} cannot be written as plain code: {first_line(error)}') from error
    data = example_data(small, cfg, Samples.of_config(cfg), shape)
    each = deployed_pass(small, data)
    with evaluating(small), evaluating(twin):
        with seeded(0):
            ours = each(small, data)
        with seeded(0):
            gap = difference(ours, each(twin, data))
    if not gap <= TOLERANCE:
        raise SlimError(
            f'{type(small).__name__} cannot be written as plain code: what the code builds is off the slim model by '
            f'{gap:.1e} of the largest output'
        )
    return gap
