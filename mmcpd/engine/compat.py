"""Make the installed OpenMMLab, OneDL's or the original, do what mmcpd's configs and tools expect."""

from __future__ import annotations

import atexit
import os
import sys
from importlib.util import find_spec
from typing import NoReturn

import torch.distributed
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import get_device

from mmcpd.compat import installed


def mend_scopes() -> None:
    """Let `_base_ = 'mmseg::...'` find its package under whatever name it was installed.

    MMEngine maps `mmseg` to the distribution `mmsegmentation`; OneDL's is called `onedl-mmsegmentation`.
    Where the distribution is absent and the module is there, the module's own name takes its place, which
    MMEngine resolves by import. `mmcpd::` is added, so that other people's configs can inherit ours.
    """
    MODULE2PACKAGE.setdefault('mmcpd', 'mmcpd')
    for module, package in MODULE2PACKAGE.items():
        if module != package and installed((package,)) is None and find_spec(module) is not None:
            MODULE2PACKAGE[module] = module


def start_processes(cfg: Config) -> None:
    """Join the process group before the Runner does, if `cfg` asks for several processes without a GPU.

    MMEngine's launcher calls `torch.cuda.set_device` even for gloo; its default wrapper names a CUDA device.

    Raises:
        ValueError: The launcher is not `pytorch`: the others' ranks are only read on accelerators.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none' or get_device() != 'cpu':
        return
    if launcher != 'pytorch':
        raise ValueError(f'--launcher {launcher} needs an accelerator; on CPU use --launcher pytorch')
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg') or {'type': 'MMDistributedDataParallel', 'broadcast_buffers': False}
    if 'find_unused_parameters' in cfg:
        wrapper.setdefault('find_unused_parameters', cfg.find_unused_parameters)
    cfg.model_wrapper_cfg = {**wrapper, 'device_ids': None}


def leave(status: int) -> NoReturn:
    """End this process with an exit status, and its part in a gloo group without a crash.

    Python's finalisation is left out there, handlers of `atexit` are not: a thread of gloo that asks for the
    interpreter meanwhile, to free a tensor, would abort a run that is done. Destroying the group does not end these
    threads where a `DistributedDataParallel` was made (PyTorch 2.14).
    """
    group = torch.distributed.is_available() and torch.distributed.is_initialized()
    if group and torch.distributed.get_backend() == 'gloo':
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
