"""Read what a run has left in its folder: its slim file, its config and log, and what others measured there."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from torch import nn

from mmcpd.engine.checkpoints import load_any, load_slim
from mmcpd.engine.saving import loadable
from mmcpd.engine.slim_file import read_slim
from mmcpd.errors import SlimError
from mmcpd.report.data import Quantity

SLIM, DENSE, PRUNED, LATENCY = 'slim.pth', 'dense.pth', 'prune.json', 'latency.json'


@dataclass(frozen=True, eq=False)
class Models:
    """The two models of a run, on one device."""

    dense: nn.Module
    slim: nn.Module


@dataclass(frozen=True, eq=False)
class Run:
    """What a run has left in its folder: its slim file's content, the config, and the JSON of `mmcpd prune`."""

    folder: Path
    cfg: Config
    content: Mapping[str, Any]
    pruned: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, cfg: Config) -> Run:
        """Read a run's folder.

        Raises:
            SlimError: it has no slim.pth, or one or a prune.json that cannot be read.
        """
        file, pruned = folder / PRUNED, None
        if file.is_file() and (pruned := json_of(file)) is None:
            raise SlimError(f'{file} is damaged: remove it, or write it anew by `mmcpd prune`')
        return cls(folder, cfg, read_slim(folder / SLIM), pruned or {})

    @property
    def meta(self) -> Mapping[str, Any]:
        return self.content['meta']

    def dense_file(self) -> Path | None:
        """Return the file of the dense model's weights, None where it is not there any more."""
        known = [self.folder / DENSE, Path(self.pruned.get('settings', {}).get('checkpoint', DENSE))]
        return next((path for path in known if path.is_file()), None)

    def models(self, device: str) -> Models | None:
        """Load both models, None where the dense one's weights are not there."""
        file = self.dense_file()
        if file is None or 'model' not in self.cfg:
            return None
        with tempfile.TemporaryDirectory() as folder:
            dense = load_any(self.cfg, loadable(self.cfg, file, Path(folder)))
        return Models(dense.to(device), load_slim(self.cfg, self.folder / SLIM, device=device))


def latency_of(run: Run) -> list[Quantity]:
    """Return the medians of what `mmcpd deploy` measured last in the folder, of this slim.pth: not of an older one."""
    ages = {file: file.stat().st_mtime for file in run.folder.glob(f'**/{LATENCY}')}
    written = (run.folder / SLIM).stat().st_mtime
    for file in sorted((file for file, age in ages.items() if age >= written), key=lambda file: -ages[file]):
        try:
            times = {each['name']: float(each['median']) for each in (json_of(file) or {})['latency']}
            return [Quantity('latency', 'ms', times['dense'], times['slim'])]
        except (KeyError, TypeError, ValueError):  # not of `mmcpd deploy`, or without a measurement of both
            continue
    return []


def json_of(file: Path) -> dict[str, Any] | None:
    """Return the content of a file of JSON, None where it is damaged or no mapping."""
    try:
        content = json.loads(file.read_text(encoding='utf-8'))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def config_of(run: Run) -> Path | None:
    """Return the config that training or `mmcpd prune` put into the run's folder, None where there is none."""
    own = run.folder / Path(run.cfg.filename or '').name
    return own if own.is_file() else min(run.folder.glob('*.py'), default=None)


def log_of(run: Run) -> str:
    """Return the beginning of the log of the run's last part."""
    files = sorted(run.folder.glob('*/*.log'))
    return files[-1].read_text(encoding='utf-8', errors='replace')[:20_000] if files else ''


def path_in_words(path: Path) -> str:
    """Return a path as page and card say it, from the current folder; elsewhere its name, not where it lies."""
    here = path.absolute()
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else path.name
