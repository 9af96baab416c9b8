"""See that what a command needs is there, before anything is built or written."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import mmengine.registry as root
from mmengine.config import Config, ConfigDict
from mmengine.hooks import CheckpointHook
from mmengine.logging import print_log

from mmcpd.cli.common import UserError
from mmcpd.engine.build import datasets, type_name
from mmcpd.engine.checkpoint_hook import CheckpointHook as Whole
from mmcpd.names import near
from mmcpd.registry import HOOKS

EMBEDDED = 'mmcpd::cpd/resnet50_prune.py'  # runs anywhere: its data ship inside a wheel
# How the folders of the data sets look that people lack most; others' are the paths that they name.
LAYOUTS = {
    'ImageNet': '{root}/train/<class>/*.JPEG and {root}/val/<class>/*.JPEG',
    'CustomDataset': '{root}/train/<class>/*.png and {root}/test/<class>/*.png',
    'ADE20KDataset': '{root}/images/{{training,validation}}/*.jpg and {root}/annotations/{{training,validation}}/*.png',
    'CityscapesDataset': '{root}/leftImg8bit/{{train,val}}/<city>/*.png and '
    '{root}/gtFine/{{train,val}}/<city>/*_labelTrainIds.png',
}
DOWNLOADING = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')  # these fetch their data themselves
SPLIT_IS_A_FOLDER = ('ImageNet', 'ImageNet21k')
NOT_OPTIONS = ('type', 'priority', '_scope_')  # of a hook's dict: MMEngine takes them out


def check_folder(folder: str | os.PathLike, option: str) -> None:
    """See that the folder of an option can be made and written to, and leave no trace.

    Raises:
        UserError: It cannot.
    """
    path = Path(folder).absolute()
    made = [part for part in (path, *path.parents) if not part.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f'{option}: cannot write to the folder {folder} ({error.strerror}); choose another') from error
    finally:
        for part in made:
            if part.exists():
                part.rmdir()


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """See that the folders and files exist that the data sets of these loaders name.

    Raises:
        UserError: One is missing; the message names it, the layout, and the config that needs no data.
    """
    for name in loaders:
        for dataset in datasets(cfg.get(name)):
            kind = type_name(dataset)
            if kind in DOWNLOADING and dataset.get('download', True):
                continue
            for path in _paths(dataset):
                if '://' not in path and not Path(path).exists():
                    root = str(dataset.get('data_root') or path).rstrip('/')
                    layout = LAYOUTS.get(kind, ' and '.join(_paths(dataset)[1:]) or '{root}/...').format(root=root)
                    raise UserError(
                        f'no data: {path} does not exist, which {name} ({kind}) reads. Put the data into '
                        f'{root}, laid out as {layout}, or link it there; {EMBEDDED} needs no data'
                    )


def _paths(dataset: ConfigDict) -> list[str]:
    """Return the root, then the annotation file and the prefixes under it."""
    root = str(dataset.get('data_root') or '')
    split = dataset.get('split') if type_name(dataset) in SPLIT_IS_A_FOLDER else None
    prefix = dataset.get('data_prefix') or split or ''
    parts = [dataset.get('ann_file') or '', *(prefix.values() if isinstance(prefix, dict) else [prefix])]
    return [path for path in (root, *(os.path.join(root, part) for part in parts if part)) if path]


def check_checkpoint(path: str | None, option: str) -> None:
    """See that a local checkpoint exists; a remote one is MMEngine's to fetch.

    Raises:
        UserError: There is no such file.
    """
    if path and '://' not in path and not Path(path).is_file():
        raise UserError(f'{option}: there is no checkpoint {path}')


def use_whole_checkpoints(cfg: Config) -> None:
    """Let checkpoints be saved by mmcpd's `CheckpointHook` wherever a config names MMEngine's, or none, in place.

    Another one is left as it is, with a warning.
    """
    savers(cfg)  # whose places are looked at first
    cfg.default_hooks = {'checkpoint': {'type': 'CheckpointHook'}, **(cfg.get('default_hooks') or {})}
    with root.HOOKS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        for hook in savers(cfg):
            kind = hook['type']
            found = registry.get(kind) if isinstance(kind, str) else kind
            if found is CheckpointHook:
                hook['type'] = 'mmcpd.CheckpointHook'
            elif found is not None and not issubclass(found, Whole):
                print_log(
                    f'{found.__name__} saves the checkpoints: a kill may leave half a one, and a resumed run draws '
                    'other random numbers. Let it inherit from mmcpd.engine.CheckpointHook to mend both',
                    'current',
                    logging.WARNING,
                )


def savers(cfg: Config) -> list[ConfigDict]:
    """Return the configs of the hooks that save checkpoints, whoever wrote them."""
    return [hook for hook in _hooks(cfg) if isinstance(hook, dict) and type_name(hook).endswith('CheckpointHook')]


def _hooks(cfg: Config) -> list[Any]:
    """Return the configs of all hooks.

    Raises:
        UserError: They are not where MMEngine looks for them.
    """
    defaults, customs = cfg.get('default_hooks') or {}, cfg.get('custom_hooks') or ()
    if not isinstance(defaults, dict) or not isinstance(customs, list | tuple):
        raise UserError(
            'default_hooks is a dict of dicts, as dict(prune=dict(type=...)), and custom_hooks a list of dicts'
        )
    return [*defaults.values(), *customs]


def check_hooks(cfg: Config) -> None:
    """Build mmcpd's hooks that a config names, so that a wrong option or value fails before anything else is built.

    Raises:
        UserError: There is no such hook.
        ValueError: An option is unknown or its value makes no sense; the hook says why.
    """
    for config in _hooks(cfg):
        kind = config.get('type') if isinstance(config, dict) else None
        if not str(kind if isinstance(kind, str) else getattr(kind, '__module__', '')).startswith('mmcpd.'):
            continue  # other people's
        kind = type_name(config)
        hook: Any = HOOKS.get(kind)
        if hook is None:
            raise UserError(f'mmcpd has no hook {kind!r}: did you mean {near(kind, HOOKS.module_dict)}?')
        hook(**{name: value for name, value in config.items() if name not in NOT_OPTIONS})
