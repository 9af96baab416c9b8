"""Say while something runs that says nothing itself for how long it has been running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mmcpd.progress import ProgressLine

TICK = 1.0  # seconds


@contextmanager
def waiting(what: str, line: ProgressLine | None = None) -> Iterator[None]:
    """Write `exporting slim: 15 seconds` now and then, from a thread, until the block ends.

    Example:
        >>> with waiting('exporting slim'):
        ...     pass
    """
    line = line or ProgressLine(what, 'seconds')
    done, begun = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(TICK):
            line(int(time.monotonic() - begun), 0)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if line.last > line.begun:  # something was written
            seconds = max(1, round(time.monotonic() - begun))
            line(seconds, seconds)
