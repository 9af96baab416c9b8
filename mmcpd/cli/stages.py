"""Say which stage of a command runs, how long it will take, and remember how long each took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mmcpd.progress import ProgressLine


class Stages:
    """Time the stages of a command, each with a line of progress on stderr.

    Attributes:
        seconds: of each stage so far; stages of one name add up.

    Example:
        >>> stages = Stages()
        >>> with stages('validate', 'batches') as progress:
        ...     progress(1, 1)
        >>> list(stages.seconds)
        ['validate']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._lines: dict[str, ProgressLine] = {}

    @contextmanager
    def __call__(self, name: str, unit: str = 'batches') -> Iterator[ProgressLine]:
        begun = time.perf_counter()
        yield ProgressLine(name, unit)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun

    def progress(self, name: str, done: int, total: int) -> None:
        """Show the progress of a stage that is timed elsewhere."""
        if name not in self._lines or done <= 1:
            self._lines[name] = ProgressLine(name, 'batches')
        self._lines[name](done, total)

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add the seconds of stages that were timed elsewhere."""
        for name, value in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + value
