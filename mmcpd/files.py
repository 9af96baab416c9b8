"""Write a file whole or not at all, and say in one line why it could not be written."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

if sys.platform != 'win32':
    import fcntl

UNFINISHED = '.unfinished'  # how the name of a file ends that is being written
# What a full, read-only or limited disk says.
REASONS = {
    errno.ENOSPC: 'no space is left',
    errno.EDQUOT: 'the quota is used up',
    errno.EFBIG: 'the file would be larger than the limit',
    errno.EROFS: 'the file system is read-only',
    errno.EACCES: 'permission denied',
    errno.EPERM: 'permission denied',
}
# What torch's writer says of the same, without the reason.
TORCH = ('PytorchStreamWriter failed', 'iostream error', 'inline_container')


class WriteError(OSError):
    """A file cannot be written; the message says in one line which, where, why and what space is left."""


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a place to write a file to, which appears at `path` if the block ends without an error.

    What stood there stays until then, and after any failure. The new file is on the disk before it appears.

    Raises:
        WriteError: The disk is full or read-only.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'answer.txt')
        >>> with whole(path) as unfinished:
        ...     _ = unfinished.write_text('42')
        >>> path.read_text(), [file.name for file in path.parent.iterdir()]
        ('42', ['answer.txt'])
    """
    unfinished = unfinished_name(path)
    with written_or_said(path):
        try:
            yield unfinished
            _flush(unfinished)
            os.replace(unfinished, path)
            _flush(path.parent)
        finally:
            unfinished.unlink(missing_ok=True)


def unfinished_name(path: Path, note: str = '') -> Path:
    """Return where this process writes a file that is not to appear at `path` yet; `sweep` finds what is left there."""
    return path.with_name(f'.{path.name}{note}.{os.getpid()}{UNFINISHED}')


@contextmanager
def written_or_said(path: Path) -> Iterator[None]:
    """Turn what a full or read-only disk raises into a WriteError of one line.

    Example:
        >>> with written_or_said(Path('/proc/slim.pth')):
        ...     raise OSError(errno.ENOSPC, 'No space left on device')
        Traceback (most recent call last):
        mmcpd.files.WriteError: cannot write slim.pth into /proc: no space is left (0.0 MB free). Make room ...
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, WriteError) or why_unwritten(error) is None:
            raise
        raise unwritten(error, path.parent, path.name) from error


def unwritten(error: OSError | RuntimeError, folder: Path, name: str = '') -> OSError:
    """Return the one line for an error that `why_unwritten` knows: the file's own where it says which, or the folder's.

    Example:
        >>> unwritten(OSError(errno.EROFS, 'no'), Path('/proc'))
        WriteError('cannot write into /proc: the file system is read-only (0.0 MB free). Make room there or ...')
    """
    if isinstance(error, WriteError):
        return error
    if isinstance(error, OSError) and isinstance(error.filename, str) and not name:
        name, folder = Path(error.filename).name, Path(error.filename).parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 1e6
    return WriteError(
        f'cannot write {name + " " if name else ""}into {folder.absolute()}: {why_unwritten(error)} ({free:.1f} MB '
        'free). Make room there or choose another folder; what stood there is as it was'
    )


def why_unwritten(error: OSError | RuntimeError) -> str | None:
    """Return why a disk refused what an error is about; None where it is about something else.

    Example:
        >>> why_unwritten(OSError(errno.EROFS, '')), why_unwritten(RuntimeError('no'))
        ('the file system is read-only', None)
    """
    if isinstance(error, WriteError):
        return str(error)
    if isinstance(error, OSError):
        return REASONS.get(error.errno or 0)
    return 'the file could not be written to its end' if any(word in str(error) for word in TORCH) else None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made, for one process: another one that asks for it meanwhile is refused.

    The lock goes with the process, however that ends. Where the system or the disk has no locks, nobody is refused.

    Raises:
        WriteError: another process holds it.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp(), 'pruned')
        >>> with alone_in(folder):
        ...     [file.name for file in folder.iterdir()]
        ['.lock']
        >>> folder.exists()
        False
    """
    if sys.platform == 'win32':
        yield
        return
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / '.lock'
    with lock.open('a') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise WriteError(f'another run writes into {folder}: wait for its end, or give another folder') from error
        except OSError:
            pass
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
            for part in made:  # nothing was written
                if part.is_dir() and not any(part.iterdir()):
                    part.rmdir()


def sweep(folder: Path) -> list[Path]:
    """Remove what killed processes left unfinished in a folder, and return it.

    Example:
        >>> import tempfile
        >>> left = Path(tempfile.mkdtemp(), f'.slim.pth.{2**22 + 1}.unfinished')
        >>> left.touch()
        >>> [file.name for file in sweep(left.parent)], left.exists()
        (['.slim.pth.4194305.unfinished'], False)
    """
    swept = [file for file in folder.glob(f'.*{UNFINISHED}') if not _is_written(file)]
    for file in swept:
        file.unlink(missing_ok=True)
    return swept


def _is_written(unfinished: Path) -> bool:
    """Say whether another process that runs may be writing it; a container's first process often has one number."""
    number = unfinished.name.split('.')[-2]
    if not number.isdecimal() or int(number) == os.getpid():
        return not number.isdecimal()
    try:
        os.kill(int(number), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _flush(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    try:
        place = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder that may be written to but not listed
        return
    try:
        os.fsync(place)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some file systems do not flush folders
            raise
    finally:
        os.close(place)


def write_json(path: Path, content: object) -> None:
    """Write JSON for people to read, whole or not at all; numbers that are not finite, which it does not know, as null.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), 'answer.json')
        >>> write_json(path, {'answer': 42})
        >>> json.loads(path.read_text())
        {'answer': 42}
    """
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + '\n', encoding='utf-8')


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
