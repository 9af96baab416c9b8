"""Find the newest checkpoint from which a run can go on, whatever happened to the newest one."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

from mmengine.logging import print_log

from mmcpd.engine.checkpoints import read_checkpoint
from mmcpd.engine.reader import PathLike
from mmcpd.errors import SlimError, first_line

LAST = 'last_checkpoint'
TEMPLATES = ('iter_{}.pth', 'epoch_{}.pth')


def newest_whole(work_dir: PathLike, folders: Sequence[PathLike] = (), templates: Sequence[str] = ()) -> str | None:
    """Return the newest whole training checkpoint of a run, or None where there was never one.

    That is the one of the highest number that can be read, unless what `last_checkpoint` names was written later: a run
    that began anew, or from an earlier one, leaves later numbers of the run before it. A warning names those that are
    passed over, and says if the one that is taken is not the one that is named. A remote one is not looked at.

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
    own = None if named is None else _moved(Path(work_dir), Path(named)).absolute()
    paths = numbered(work_dir, *([] if own is None else [own]), folders=folders, templates=templates)
    if own is not None and own not in paths:
        paths.insert(0, own)
    faults: list[str] = []
    for path in paths:
        try:
            age = _age(path)
        except SlimError as error:
            faults.append(str(error))
            continue
        if own is None:
            faults.append(f'{work_dir} has checkpoints and no {LAST} that names one')
        elif own in paths[paths.index(path) + 1 :]:
            path = _later(path, age, own, faults)
        for line in faults:
            print_log(f'{line}; {path} is taken', 'current', logging.WARNING)
        return str(path)
    if faults:
        raise SlimError(
            f'{work_dir} has checkpoints and none that is whole ({faults[0]}): name one elsewhere, or choose another '
            'work dir to start anew'
        )
    return None


def _later(path: Path, age: tuple[str, int], named: Path, faults: list[str]) -> Path:
    """Return which of two whole checkpoints was written later; `faults` gets why the named one is not taken."""
    try:
        if _age(named)[0] > age[0]:
            return named
        faults.append(f'{LAST} names {named}, which is older')
    except SlimError as error:
        faults.append(str(error))
    return path


def _moved(work_dir: Path, path: Path) -> Path:
    """Return where a checkpoint is that `last_checkpoint` names, also where the folder was moved."""
    moved = work_dir / path.name
    return moved if moved.is_file() else path


def numbered(
    work_dir: PathLike, *like: Path, folders: Sequence[PathLike] = (), templates: Sequence[str] = ()
) -> list[Path]:
    """Return the checkpoints of a folder, and of others, by their numbers, the highest first; `like`: named as these.

    Example:
        >>> from tempfile import mkdtemp
        >>> folder = Path(mkdtemp())
        >>> for name in ('epoch_9.pth', 'epoch_10.pth', 'best_acc_epoch_11.pth'):
        ...     (folder / name).touch()
        >>> [path.name for path in numbered(folder)]
        ['epoch_10.pth', 'epoch_9.pth']
    """
    names = [*TEMPLATES, *templates]
    for path in like:
        names += [f'{before}{{}}{after}' for before, after in re.findall(r'^(.*?)\d+(\D*)$', path.name)]
    places = dict.fromkeys([Path(work_dir), *map(Path, folders), *(path.parent for path in like)])
    patterns = [re.compile(r'(\d+)'.join(map(re.escape, name.split('{}')))) for name in names]
    found = {
        (int(match[1]), file.absolute())
        for folder in places
        if folder.is_dir()
        for file in folder.iterdir()
        for pattern in patterns
        if (match := pattern.fullmatch(file.name)) is not None
    }
    return [path for _, path in sorted(found, reverse=True)]


def _named(folder: Path) -> str | None:
    """Return what `last_checkpoint` holds, if it may be a path."""
    try:
        text = (folder / LAST).read_text(encoding='utf-8').strip()
    except (OSError, UnicodeDecodeError):
        return None
    return text if text.isprintable() and 0 < len(text) < 4096 else None


def _age(path: Path) -> tuple[str, int]:
    """Return when a whole checkpoint was written, and its iteration.

    Raises:
        SlimError: No run can go on from it: it is missing, damaged, or says no iteration.
    """
    content = read_checkpoint(path)
    try:
        damaged = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile) as error:
        raise SlimError(f'{path} is damaged: {first_line(error)}') from error
    if damaged is not None:
        raise SlimError(f'{path} is damaged: the checksum of {damaged} is wrong')
    meta = content.get('meta')
    if not isinstance(meta, dict) or not all(isinstance(meta.get(name), int) for name in ('epoch', 'iter')):
        raise SlimError(f'{path} says no iteration to go on from')
    return str(meta.get('time', '')), meta['iter']


def resumed_from(work_dir: PathLike, load_from: PathLike | None) -> Path | None:
    """Return the local checkpoint that a Runner resumes; None where it is a remote one or there is none."""
    path = load_from or _named(Path(work_dir))
    return Path(path) if path and Path(path).is_file() else None
