"""Say which stage of a command runs, how long it will take, and remember how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmcpd.progress import ProgressLine


class Stages:
    """Time the stages of a command, each with a line of progress on stderr.

    Attributes:
        seconds: of each stage so far; stages of one name add up.

    Example:
        >>> stages = Stages()
        >>> with stages('scoring', 'batches') as progress:
        ...     progress(1, 1)
        >>> list(stages.seconds)
        ['scoring']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, unit: str = 'steps') -> Iterator[ProgressLine]:
        begun = time.perf_counter()
        line = ProgressLine(name, unit)
        yield line
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
