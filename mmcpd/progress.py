"""Say on the screen how far a long stage is, and how long it will still take."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class ProgressLine:
    """Write `scoring: 3/8 batches, 0:12 left` at most every so many seconds; call it as `line(done, total)`.

    Without `every` that is once a second over the same line in a terminal, and a line each 15 seconds elsewhere. The
    time left is worked out from the first call on, which may be `line(0, total)`, unless it is given in seconds. A
    `total` of 0 is not known: the line is `scoring: 3 batches`, and ends once `done` is given as the total.

    Example:
        >>> from io import StringIO
        >>> stream = StringIO()
        >>> line = ProgressLine('scoring', 'batches', stream, every=0)
        >>> line(1, 2, left=3)
        >>> stream.getvalue().rstrip()
        'scoring: 1/2 batches, 0:03 left'
    """

    def __init__(self, stage: str, unit: str, stream: TextIO | None = None, every: float | None = None) -> None:
        self.stage, self.unit = stage, unit
        self.stream = sys.stderr if stream is None else stream
        self.terminal = self.stream.isatty()
        self.every = (1.0 if self.terminal else 15.0) if every is None else every
        self.begun = self.last = time.monotonic()

    def __call__(self, done: int, total: int, left: float | None = None) -> None:
        now = time.monotonic()
        if left is None and done and total:
            left = (now - self.begun) / done * (total - done)
        finished = (done == total > 0) or (left is not None and left <= 0)
        if now - self.last < self.every and not finished:
            return
        self.last = now
        ending = '' if left is None else f', {int(left) // 60}:{int(left) % 60:02d} left'
        text = f'{self.stage}: {done}{f"/{total}" if total else ""} {self.unit}{ending}'
        self.stream.write(f'\r{text:<60}' + '\n' * finished if self.terminal else f'{text}\n')
        self.stream.flush()
