"""Find the newest checkpoint from which a run can go on, whatever happened to the newest one."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mmengine.logging import print_log

from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.slim_file import PathLike
from mmcpd.errors import SlimError, first_line

LAST = 'last_checkpoint'
TEMPLATES = ('iter_{}.pth', 'epoch_{}.pth')


def newest_whole(work_dir: PathLike, folders: Sequence[PathLike] = (), templates: Sequence[str] = ()) -> str | None:
    """Return the newest whole training checkpoint of a run, or None where there was never one.

    First comes what `last_checkpoint` names, also where the folder was moved, then all that are numbered, newest first.
    A warning names those that are passed over. A remote one is not looked at.

    Args:
        work_dir: Where `last_checkpoint` is, and checkpoints usually are.
        folders: Where they may be besides.
        templates: Names of checkpoints other than `iter_{}.pth` and `epoch_{}.pth`.

    Raises:
        SlimError: There are checkpoints, and none of them is whole: to start anew would write over them.

    Example:
        >>> from tempfile import mkdtemp
        >>> print(newest_whole(mkdtemp()))
        None
    """
    named = _named(Path(work_dir))
    if named is not None and '://' in named:
        return named
    faults: list[str] = []
    for path in _candidates(Path(work_dir), named, folders, templates):
        fault = _fault(path)
        if fault is None:
            for line in faults:
                print_log(f'{line}; {path} is taken', 'current', logging.WARNING)
            return str(path)
        faults.append(fault)
    if faults:
        raise SlimError(
            f'{work_dir} has checkpoints and none that is whole ({faults[0]}): name one elsewhere, or choose another '
            'work dir to start anew'
        )
    return None


def _candidates(
    work_dir: Path, named: str | None, others: Sequence[PathLike], templates: Sequence[str]
) -> Iterator[Path]:
    """Give what may be resumed, the likeliest first, each once."""
    folders, names = [work_dir, *map(Path, others)], list(TEMPLATES + tuple(templates))
    first = []
    if named is not None:
        path = Path(named)
        moved = work_dir / path.name
        first = [path if path.is_file() or not moved.is_file() else moved]
        folders.append(path.parent)
        names += [f'{before}{{}}{after}' for before, after in re.findall(r'^(.*?)\d+(\D*)$', path.name)]
    patterns = [re.compile(r'(\d+)'.join(map(re.escape, name.split('{}')))) for name in names]
    numbered = {
        file: int(match[1])
        for folder in folders
        if folder.is_dir()
        for file in folder.iterdir()
        for pattern in patterns
        if (match := pattern.fullmatch(file.name)) is not None
    }
    later = sorted(numbered, key=lambda file: (numbered[file], file.name), reverse=True)
    yield from {path.absolute(): path for path in (*first, *later)}.values()


def _named(folder: Path) -> str | None:
    """Return what `last_checkpoint` holds, if it may be a path."""
    try:
        text = (folder / LAST).read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.isprintable() and 0 < len(text) < 4096 else None


def _fault(path: Path) -> str | None:
    """Return why a run cannot go on from a checkpoint; None where it can."""
    try:
        content = read_checkpoint(path)
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (SlimError, OSError, zipfile.BadZipFile) as error:
        return first_line(error) if isinstance(error, SlimError) else f'{path} is damaged: {first_line(error)}'
    if damaged is not None:
        return f'{path} is damaged: the checksum of {damaged} is wrong'
    return None if _resumable(content) else f'{path} says no iteration to go on from'


def _resumable(content: dict[str, Any]) -> bool:
    meta = content.get('meta')
    return isinstance(meta, dict) and all(isinstance(meta.get(name), int) for name in ('epoch', 'iter'))


def resumed_from(work_dir: PathLike, load_from: PathLike | None) -> Path | None:
    """Return the local checkpoint that a Runner resumes; None where it is a remote one or there is none."""
    path = load_from or _named(Path(work_dir))
    return Path(path) if path and Path(path).is_file() else None
