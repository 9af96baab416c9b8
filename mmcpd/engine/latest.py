"""Find the newest checkpoint from which a run can go on, whatever happened to the newest one."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.slim_file import PathLike
from mmcpd.errors import SlimError, first_line

LAST = 'last_checkpoint'
NAMES = re.compile(r'(?:iter|epoch)_(\d+)\.pth')


def newest_whole(work_dir: PathLike) -> Path | None:
    """Return the newest whole training checkpoint of a work dir, or None where there was never one.

    First comes what `last_checkpoint` names, also where the folder was moved, then the files beside it by their number,
    newest first. A warning names those that are passed over.

    Raises:
        SlimError: There are checkpoints, and none of them is whole: to start anew would write over them.

    Example:
        >>> from tempfile import mkdtemp
        >>> print(newest_whole(mkdtemp()))
        None
    """
    faults: list[str] = []
    for path in _candidates(Path(work_dir)):
        fault = _fault(path)
        if fault is None:
            for line in faults:
                warnings.warn(f'{line}; {path} is taken', stacklevel=2)
            return path
        faults.append(fault)
    if faults:
        raise SlimError(
            f'{work_dir} has checkpoints and none that is whole ({faults[0]}): name one elsewhere, or choose another '
            'work dir to start anew'
        )
    return None


def _candidates(folder: Path) -> Iterator[Path]:
    """Give what may be resumed, the likeliest first, each once."""
    named = _named(folder)
    folders, pattern = [folder], NAMES
    if named is not None:
        beside = folder / named.name
        if named.is_file() or not beside.is_file():
            yield named
        else:
            yield beside
        folders = list(dict.fromkeys([named.parent, folder]))
        if NAMES.fullmatch(named.name) is None and re.search(r'\d', named.stem):  # another filename_tmpl
            *_, number = re.finditer(r'\d+', named.name)
            before, after = named.name[: number.start()], named.name[number.end() :]
            pattern = re.compile(rf'{re.escape(before)}(\d+){re.escape(after)}')
    numbered = [
        (int(match[1]), file)
        for each in folders
        if each.is_dir()
        for file in each.iterdir()
        if (match := pattern.fullmatch(file.name)) is not None and named not in (file, each / file.name)
    ]
    yield from (file for _, file in sorted(numbered, reverse=True))


def _named(folder: Path) -> Path | None:
    """Return the path that `last_checkpoint` holds, if it can be read."""
    try:
        text = (folder / LAST).read_text(encoding='utf-8').strip()
        return Path(text) if text and len(text) < 4096 and '\0' not in text else None
    except (OSError, UnicodeDecodeError):
        return None


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


def resumed_from(work_dir: PathLike, load_from: str | os.PathLike | None) -> Path | None:
    """Return the local checkpoint that a Runner resumes; None where it is a remote one or there is none."""
    path = Path(load_from) if load_from else _named(Path(work_dir))
    return path if path is not None and path.is_file() else None
