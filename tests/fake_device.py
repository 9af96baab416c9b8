"""A second device without hardware: its tensors refuse to meet those of the CPU, as tensors on CUDA do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device('cuda:0')
COPIES = ('_to_copy', 'copy_', '_copy_from')


class OnDevice(Tensor):
    """A tensor whose data lie on the CPU and whose `device` is another."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE, requires_grad=False,
        )  # fmt: skip
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f'OnDevice({self.inner})'

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on the data; tensors of both devices may not meet, but for scalars, copies and CPU indices."""
    op = func._schema.name.split('::')[-1]
    found = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    ours = [value for value in found if isinstance(value, OnDevice)]
    plain = [value for value in found if not isinstance(value, OnDevice) and value.dim()]
    by_index = op in ('index', 'index_put_', 'index_put') and isinstance(args[0], OnDevice)
    if ours and plain and op not in COPIES and not by_index:
        raise RuntimeError(f'Expected all tensors to be on the same device: {op} meets {DEVICE} and cpu')
    device = kwargs.get('device')
    kwargs = {name: value for name, value in kwargs.items() if name not in ('device', 'pin_memory')}
    if device is not None:
        kwargs['device'] = torch.device('cpu')
    there = bool(ours) if device is None else torch.device(device).type == DEVICE.type
    if op == 'copy_':
        there = isinstance(args[0], OnDevice)
    out = func(*tree_map(lambda v: v.inner if isinstance(v, OnDevice) else v, args),
               **tree_map(lambda v: v.inner if isinstance(v, OnDevice) else v, kwargs))  # fmt: skip
    if op.endswith('_') and not op.startswith('__') and isinstance(args[0], Tensor):
        return args[0]
    return tree_map(
        lambda v: OnDevice(v) if there and isinstance(v, Tensor) and not isinstance(v, OnDevice) else v, out
    )


class Device(TorchDispatchMode):
    """Let what asks for that device have it, and count what is copied there."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = 0

    def __enter__(self) -> Device:
        torch._C._ensureCUDADeviceGuardSet()  # as torch's own fake tensors do
        self._start, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
        self._cudnn, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False  # whose norms run nowhere here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.cuda._lazy_init = self._start
        torch.backends.cudnn.enabled = self._cudnn
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.copies += (
            func._schema.name == 'aten::_to_copy' and torch.device(kwargs.get('device') or 'cpu').type == DEVICE.type
        )
        return run(func, args, kwargs)


def moved(model: nn.Module) -> nn.Module:
    """Put a model's parameters and buffers there, in place."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.data), requires_grad=parameter.requires_grad)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model
