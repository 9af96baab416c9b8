"""The file `dense.pth`: the model as it was when pruning began, which is the teacher of a run that teaches itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from torch import Tensor, nn

from mmcpd.engine.hashing import digest
from mmcpd.engine.latest import resumed_from
from mmcpd.engine.reader import PathLike, load, readable
from mmcpd.engine.slim_file import save_whole
from mmcpd.errors import SlimError

DENSE = 'dense.pth'


def write_dense(work_dir: PathLike, model: nn.Module) -> str:
    """Write a model's state dict to `dense.pth`, on the main process, and return the digest that names it."""
    weights = model.state_dict()
    if is_main_process():
        save_whole(Path(work_dir) / DENSE, {'state_dict': weights})
    return _digest(weights)


def read_dense(work_dir: PathLike, load_from: PathLike | None, expected: str) -> dict[str, Tensor]:
    """Return the weights of the run that is resumed, the same on all processes: the main one reads them.

    They are looked for beside the checkpoint, then in the work dir; from elsewhere they are copied there.

    Raises:
        SlimError: There is no such file, or it is damaged or of another run.
    """
    found: list[Any] = [None]
    if is_main_process():
        try:
            found = [_read(Path(work_dir), resumed_from(work_dir, load_from), expected)]
        except SlimError as error:
            found = [str(error)]
    broadcast_object_list(found)
    if isinstance(found[0], str):
        raise SlimError(found[0])
    return found[0]


def _read(work_dir: Path, checkpoint: Path | None, expected: str) -> dict[str, Tensor]:
    own = work_dir / DENSE
    places = [own] if checkpoint is None else list(dict.fromkeys([checkpoint.parent / DENSE, own]))
    faults = []
    for path in places:
        try:
            with readable(path):
                weights = load(path, 'cpu', plain=True)['state_dict']
        except SlimError as error:
            faults.append(f'{path} is missing' if not path.is_file() else str(error))
            continue
        if _digest(weights) == expected:
            if path != own:
                save_whole(own, {'state_dict': weights})
            return weights
        faults.append(f'{path} is of another run')
    raise SlimError(
        f'{faults[0]}: it holds the teacher of the run that is resumed. Put that of its own folder beside the '
        'checkpoint, or resume from before pruning began'
    )


def _digest(weights: Mapping[str, Any]) -> str:
    return digest({name: value for name, value in weights.items() if isinstance(value, Tensor)})
