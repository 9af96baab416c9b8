"""Read checkpoints so that no file can run code: ours, and whatever MMEngine reads in this process."""

from __future__ import annotations

import copy
import io
import os
import pickle
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmcpd.errors import SlimError, first_line

PathLike: TypeAlias = str | os.PathLike
# What reading may raise on bytes that are no checkpoint, or half of one.
GARBAGE = (RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, MemoryError,
           AssertionError, ArithmeticError, struct.error, zipfile.BadZipFile)  # fmt: skip
PICKLE = 2**23  # bytes of a slim file beside the tensors' values
WEIGHTS = ('model', 'model_state_dict')  # where scripts that do not use MMEngine keep what it calls state_dict
STATISTICS = ('mean', 'max', 'min', 'current')
_torch_load = torch.load
_trusted = False


# -- what a training checkpoint holds beside tensors -------------------------------------------------------------------
def _named(name: str, function: Callable[..., Any]) -> Any:
    """Return a function that torch's restricted unpickler calls for this global."""
    twin: Any = partial(function)
    twin.__module__, _, twin.__qualname__ = name.rpartition('.')
    twin.__name__ = twin.__qualname__
    return twin


def _statistic(kind: Any, name: Any) -> Any:
    """Stand for `getattr`, by which MMEngine's logs name their statistics; of anything else it would reach everything.

    Raises:
        pickle.UnpicklingError: Another attribute is asked for.
    """
    if kind is not HistoryBuffer or name not in STATISTICS:
        raise pickle.UnpicklingError(f'GLOBAL builtins.getattr of {name}')
    return getattr(kind, name)


def _encoded(text: str, encoding: str) -> bytes:
    """Stand for `_codecs.encode`, by which pickles of protocol 2 hold bytes; torch 2.4 does not know it.

    Raises:
        pickle.UnpicklingError: Another encoding is asked for.
    """
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'GLOBAL _codecs.encode to {encoding}')
    return text.encode(encoding)


def _safe_globals() -> list[Any]:
    """Return the globals that MMEngine's own training checkpoints need: logs, which hold arrays."""
    modules = ('numpy._core.multiarray', 'numpy.core.multiarray')  # NumPy 2's name, and the one before
    core: Any = np.empty(0).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    dtypes = [kind for kind in vars(getattr(np, 'dtypes', np)).values() if isinstance(kind, type(np.dtype))]
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        *{type(np.dtype(code)) for code in np.typecodes['All']},
        *dtypes,
        *(_named(f'{module}._reconstruct', core) for module in modules),
        *(_named(f'{module}.scalar', scalar) for module in modules),
        _named('builtins.getattr', _statistic),
        _named('_codecs.encode', _encoded),
    ]


GLOBALS = _safe_globals()


# -- reading -----------------------------------------------------------------------------------------------------------
@contextmanager
def _allowed(kinds: list[Any]) -> Iterator[None]:
    """Let torch's restricted unpickler read these too: torch 2.5's `safe_globals`, also in torch 2.4."""
    before = list(torch.serialization.get_safe_globals())
    torch.serialization.add_safe_globals(kinds)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def trust() -> None:
    """Let checkpoints run code when they are read in this process, from now on; a `slim.pth` never needs to.

    `--trust-checkpoint` of the commands and `trust_checkpoint=True` of PruneHook call it.
    """
    global _trusted
    _trusted = True


def load(file: PathLike | io.IOBase, map_location: Any = None, *, plain: bool = False) -> Any:
    """Read what `torch.save` wrote, without running code from it.

    Args:
        file: A path, or a binary file that is open.
        map_location: As in `torch.load`.
        plain: Allow tensors and plain values alone, whatever was said by `trust`.

    Raises:
        SlimError: The file needs code to be run, or is damaged, or no checkpoint.
    """
    if isinstance(file, str | os.PathLike):
        return _load(Path(file), map_location, plain)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'checkpoint'
        path.write_bytes(file.read())
        return _load(path, map_location, plain)


def _load(path: Path, map_location: Any, plain: bool) -> Any:
    with readable(path):
        archive = zipfile.is_zipfile(path)
        if archive or plain:
            check_archive(path, plain)
        try:
            with _allowed([] if plain else GLOBALS):
                # Mapped, a storage cannot be larger than what the file has; torch does not compare them otherwise.
                content = _torch_load(path, map_location=map_location, weights_only=True, mmap=archive)
        except pickle.UnpicklingError as error:
            if _trusted and not plain:
                return _torch_load(path, map_location=map_location, weights_only=False)
            raise _refusal(path, error, plain) from None
        moved = isinstance(map_location, str | torch.device) and torch.device(map_location).type != 'cpu'
        return content if moved or not archive else copy.deepcopy(content)  # which outlives what the file holds now


def _refusal(path: Path, error: pickle.UnpicklingError, plain: bool) -> SlimError:
    found = re.search(r'(?:GLOBAL|class|function|callable) ([a-zA-Z_]\w*(?:\.\w+)+(?: of \w+)?)', str(error))
    if found is None:
        return SlimError(f'{path} is truncated or not a checkpoint')
    name = found[1]
    if plain:
        return SlimError(f'{path} holds more than weights ({name}), and is not read')
    return SlimError(
        f'{path} is refused: to read it is to run {name}, which its writer chose. If you trust its writer, use '
        '--trust-checkpoint, or trust_checkpoint=True of PruneHook or of the teacher'
    )


def check_archive(path: Path, plain: bool) -> None:
    """See that reading an archive of `torch.save` takes no more memory than its size: entries are plain, each once.

    Raises:
        SlimError: It is no archive where a plain file must be one, or an entry is compressed or larger than the file.
    """
    with zipfile.ZipFile(path) as archive:
        entries, comment = archive.infolist(), archive.comment
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    once = len({entry.filename for entry in entries}) == len(entries)
    whole = sum(max(entry.file_size, entry.compress_size) for entry in entries) <= path.stat().st_size
    short = not plain or all(entry.file_size <= PICKLE for entry in entries if entry.filename.endswith('.pkl'))
    if comment or not (stored and once and whole and short):
        raise SlimError(f'{path} is no archive that torch.save wrote: what it holds is larger than it says')


@contextmanager
def readable(path: PathLike) -> Iterator[None]:
    """Turn what is raised on a bad file into a SlimError that names the file.

    Raises:
        SlimError: The file is missing, or reading it fails.
    """
    if '://' not in str(path) and not Path(path).expanduser().is_file():
        raise SlimError(f'{path}: there is no such checkpoint')
    try:
        yield
    except SlimError:
        raise
    except pickle.UnpicklingError as error:
        raise SlimError(f'{path} is truncated or not a checkpoint') from error
    except GARBAGE as error:
        reason = ascii(first_line(error))[1:-1]  # it may quote the file's own bytes
        said = '' if isinstance(error, KeyError) else f': {reason}'  # a key of the unpickler's own
        raise SlimError(f'{path} is truncated or not a checkpoint{said}') from error


def _as_mmengine_names_it(content: Any) -> Any:
    """Return a checkpoint with its weights under `state_dict`, also where another training script wrote it."""
    if not isinstance(content, dict) or 'state_dict' in content:
        return content
    for name in WEIGHTS:
        values = content.get(name)
        if isinstance(values, dict) and values and all(isinstance(value, torch.Tensor) for value in values.values()):
            return {'state_dict': values, **{key: value for key, value in content.items() if key != name}}
    return content


# -- MMEngine's reading ------------------------------------------------------------------------------------------------
@contextmanager
def _instead_of_torch() -> Iterator[None]:
    """Let `torch.load` be `load`: each of MMEngine's loaders, for files and addresses of all kinds, ends in it."""

    def safe(file: Any, map_location: Any = None, *_: Any, **__: Any) -> Any:
        return load(file, map_location)

    torch_module: Any = torch
    before, torch_module.load = torch.load, safe
    try:
        yield
    finally:
        torch_module.load = before


def install() -> None:
    """Let MMEngine read all checkpoints of this process by `load`: the Runner's, teachers', those of `init_cfg`."""
    theirs: Any = CheckpointLoader.load_checkpoint

    def load_checkpoint(filename: str, map_location: Any = None, logger: Any = 'current') -> Any:
        with _instead_of_torch():
            content = theirs(filename, map_location, logger)
        content = _as_mmengine_names_it(content)
        meta = content.get('meta') if isinstance(content, dict) else None
        if isinstance(meta, dict) and not _trusted:
            meta.pop('config', None)  # a text, which `Runner.resume` would run as Python
        return content

    setattr(CheckpointLoader, 'load_checkpoint', staticmethod(load_checkpoint))  # noqa: B010
