"""Write a file whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, which appears at `path` if the block ends without an error.

    Example:
        >>> path = Path(tempfile.mkdtemp(), 'answer.txt')
        >>> with whole(path) as unfinished:
        ...     _ = unfinished.write_text('42')
        >>> path.read_text()
        '42'
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unfinished = Path(folder) / 'unfinished'
        yield unfinished
        os.replace(unfinished, path)


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read, whole or not at all.

    Example:
        >>> path = Path(tempfile.mkdtemp(), 'answer.json')
        >>> write_json(path, {'answer': 42})
        >>> json.loads(path.read_text())
        {'answer': 42}
    """
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + '\n', encoding='utf-8')
