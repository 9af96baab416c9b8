"""Write tensors as a safetensors file: a header in JSON, then the values, which nothing has to be trusted for.

Source: the format's description, https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mmcpd.errors import SlimError
from mmcpd.files import whole

DTYPES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16', torch.int64: 'I64',
    torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8', torch.bool: 'BOOL',
}  # fmt: skip


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    r"""Write tensors by name, and texts about them; values of more bytes come first, so that all are aligned.

    Raises:
        SlimError: a tensor has a type that the format does not have, or is not dense.

    Example:
        >>> write_tensors(Path('fc.safetensors'), {'fc.bias': torch.ones(2)}, {'of': 'a toy'})
        >>> Path('fc.safetensors').read_bytes()[-8:] == b'\x00\x00\x80?' * 2
        True
    """
    header: dict[str, object] = {'__metadata__': dict(metadata)}
    parts: list[bytes] = []
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
        if tensor.dtype not in DTYPES or tensor.layout is not torch.strided:
            raise SlimError(f'{name} is {tensor.dtype}, {tensor.layout}: a safetensors file holds no such tensor')
        values = tensor.detach().cpu().contiguous()
        raw = values.reshape(-1).view(torch.uint8).numpy().tobytes() if values.numel() else b''
        header[name] = {
            'dtype': DTYPES[tensor.dtype], 'shape': list(tensor.shape), 'data_offsets': [end, end + len(raw)],
        }  # fmt: skip
        parts.append(raw)
        end += len(raw)
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)
    with whole(path) as unfinished, unfinished.open('wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        file.writelines(parts)
