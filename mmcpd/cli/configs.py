"""Find and read the config that a command names, and write the command's options into it."""

from __future__ import annotations

import argparse
import io
import os
from contextlib import redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE, ConfigParsingError
from mmengine.device import get_device
from mmengine.registry import MODELS

from mmcpd.cli.common import UserError, one_line
from mmcpd.engine.compat import mend_scopes
from mmcpd.names import near

# MMEngine's default hooks, which None leaves out of a run.
OWN_HOOKS = ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint')
SUFFIXES = ('.py', '.yml', '.yaml', '.json')  # of the configs that MMEngine reads
INSTALL = 'install that package (mmcpd: pip install -e . in its checkout)'


def read_config(args: argparse.Namespace) -> Config:
    """Read the config that the arguments name and merge `--cfg-options` into it.

    Raises:
        UserError: There is no such config, it has no model, or an option cannot be merged.
    """
    mend_scopes()
    path = config_file(args.config)
    try:
        with redirect_stdout(io.StringIO()):  # OneDL's packages print which of their optional imports are missing
            cfg = Config.fromfile(path)
            scope = str(cfg.get('default_scope'))
            if find_spec(scope) is not None and find_spec(f'{scope}.datasets') is not None:
                import_module(f'{scope}.datasets')
    except FileNotFoundError as error:
        if '.mim' in Path(str(error.filename)).parts:
            raise UserError(
                f'{args.config} inherits from package::..., but {error.filename} is missing: {INSTALL}'
            ) from error
        raise
    except ConfigParsingError as error:
        raise UserError(f'{args.config}: {one_line(error)}') from error
    if 'model' not in cfg:
        raise UserError(f'{args.config} has no model; a config inherits from one that has, by _base_')
    if args.cfg_options:
        try:
            cfg.merge_from_dict(args.cfg_options)
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(f'--cfg-options does not fit {args.config}: {one_line(error)}') from error
    _check_scope(cfg, args.config)
    hooks = cfg.get('default_hooks')
    if isinstance(hooks, dict):  # None leaves any hook out, which MMEngine understands of its own alone
        cfg.default_hooks = {name: hook for name, hook in hooks.items() if hook is not None or name in OWN_HOOKS}
    return cfg


def _check_scope(cfg: Config, name: str) -> None:
    """See that a config's model is found: by the package that `default_scope` names, or in MMEngine's own registry.

    Raises:
        UserError: No scope is named, and only other packages have the model.
    """
    model = cfg.model if isinstance(cfg.model, dict) else {}
    kind = model.get('type')
    if cfg.get('default_scope') or model.get('_scope_') or not isinstance(kind, str) or MODELS.get(kind) is not None:
        return
    scopes = [package for package in MODULE2PACKAGE if find_spec(package) is not None]
    having = [scope for scope in scopes if MODELS.get(f'{scope}.{kind}') is not None]
    if having:
        lines = ' or '.join(f"default_scope = '{scope}'" for scope in having)
        raise UserError(f'{name} does not say which package has its {kind}: add {lines}')


def config_file(name: str) -> Path:
    """Return the file of a config, named by its path or as `package::path` among the configs of an installed package.

    Raises:
        UserError: There is none; the message lists the near names.

    Example:
        >>> config_file('mmpretrain::resnet/resnet18_8xb32_in1k.py').name
        'resnet18_8xb32_in1k.py'
    """
    package, separator, inside = name.partition('::')
    folder = _configs_of(package, name) if separator else Path(name).parent
    path = folder / inside if separator else Path(name)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(f'{name} is no config: those end in {", ".join(SUFFIXES)}')
        return path
    files = folder.glob('**/*.py' if separator else '*.py')
    known = [f'{package}::{file.relative_to(folder).as_posix()}' if separator else str(file) for file in files]
    stems = near(name.removesuffix('.py'), [file.removesuffix('.py') for file in known]).replace(', ', '.py, ')
    raise UserError(f'{name}: there is no such config; ' + (f'near are {stems}.py' if known else f'{folder} has none'))


def _configs_of(package: str, name: str) -> Path:
    """Return the folder in which an installed package ships its configs."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        known = [module for module in MODULE2PACKAGE if find_spec(module) is not None]
        raise UserError(f'{name}: no package {package!r} is installed; near are {near(package, known)}')
    folder = Path(spec.origin).parent / '.mim' / 'configs'
    if not folder.is_dir():
        raise UserError(f'{name}: {package} has no configs, {folder} is missing: {INSTALL}')
    return folder


def set_runner_options(cfg: Config, args: argparse.Namespace) -> None:
    """Write work dir, launcher and the data loaders' defaults into the config, in place."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = str(Path('work_dirs') / Path(cfg.filename).stem)
    for name in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        loader = cfg.get(name)
        if loader is not None:
            # Pinning warns without an accelerator; persistent workers are refused where there are none.
            loader.setdefault('pin_memory', get_device() != 'cpu')
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
            if args.no_pin_memory:
                loader.pin_memory = False
