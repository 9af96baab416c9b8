"""The times of a model's layers on one machine, and the file in the user's cache that remembers them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime

from mmcpd.cost import StepTable, WidthGrid
from mmcpd.deploy.latency import cpu_name, usable_cores
from mmcpd.errors import first_line
from mmcpd.files import write_json

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Machine:
    """What times depend on beside the model."""

    cpu: str
    cores: int
    onnxruntime: str
    threads: int

    @classmethod
    def here(cls, threads: int) -> Machine:
        """Return this machine, with so many threads."""
        return cls(cpu_name(), usable_cores(), onnxruntime.__version__, threads)

    def __str__(self) -> str:
        return f'{self.cpu}, {self.threads} of {self.cores} cores, ONNX Runtime {self.onnxruntime}'


@dataclass(frozen=True)
class Times:
    """What was measured of a model's layers.

    Attributes:
        machine: where.
        dense: milliseconds of whole dense files, by the models' names.
        tables: of each layer, by its key.
    """

    machine: Machine
    dense: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, StepTable] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """Return it in types of JSON, which a checkpoint holds as well.

        Example:
            >>> times = Times(Machine('cpu', 2, '1.20', 1), {'net': 3.0})
            >>> Times.of_plain(times.plain()) == times
            True
        """
        return asdict(self)

    @classmethod
    def of_plain(cls, plain: object) -> Times:
        """Return what `plain` gave.

        Raises:
            ValueError: it is damaged, or something else's.
        """
        try:
            content: Any = plain
            machine = Machine(**content['machine'])
            dense = {str(name): float(ms) for name, ms in content['dense'].items()}
            if not all(0 < ms < math.inf for ms in dense.values()):
                raise ValueError('a model takes no time')
            tables = {str(key): _table(each) for key, each in content['tables'].items()}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f'no times of layers of this mmcpd: {type(error).__name__}: {error}') from error
        return cls(machine, dense, tables)


def cache_folder() -> Path:
    """Return the folder of this user in which times are remembered."""
    local = os.environ.get('LOCALAPPDATA') if os.name == 'nt' else None
    return Path(os.environ.get('XDG_CACHE_HOME') or local or Path.home() / '.cache') / 'mmcpd'


def remembered(machine: Machine, folder: Path) -> Times:
    """Return what is known of a machine; a file that cannot be read is said, and counts as empty.

    Example:
        >>> import tempfile
        >>> machine, folder = Machine('cpu', 2, '1.20', 1), Path(tempfile.mkdtemp())
        >>> remember(Times(machine, {'net': 3.0}), folder)
        >>> remembered(machine, folder).dense['net']
        3.0
    """
    path = _path(machine, folder)
    try:
        found = Times.of_plain(json.loads(path.read_text(encoding='utf-8')))
        if found.machine == machine:
            return found
        logger.warning('%s holds times of another machine (%s): layers are timed anew', path, found.machine)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        logger.warning('%s cannot be used (%s): layers are timed anew', path, first_line(error))
    return Times(machine)


def remember(times: Times, folder: Path) -> None:
    """Write times beside what others wrote of this machine meanwhile; a folder that cannot be written to is said."""
    before = remembered(times.machine, folder)
    both = Times(times.machine, {**before.dense, **times.dense}, {**before.tables, **times.tables})
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(_path(times.machine, folder), both.plain())
    except OSError as error:
        logger.warning('the times of layers are not remembered: %s', error)


def _path(machine: Machine, folder: Path) -> Path:
    return folder / f'latency-{hashlib.sha256(str(machine).encode()).hexdigest()[:16]}.json'


def _table(plain: Any) -> StepTable:
    grids = tuple(WidthGrid(tuple(map(int, grid['points'])), int(grid['step'])) for grid in plain['grids'])
    return StepTable(grids, tuple(map(float, plain['times'])))
