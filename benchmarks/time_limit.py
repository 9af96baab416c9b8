"""Stop what takes too long, in the main thread."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Slow(BaseException):
    """It took too long; no exception that others catch."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `Slow` in the block once so many seconds are over."""

    def stop(*_: object) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
