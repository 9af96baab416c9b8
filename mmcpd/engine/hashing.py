"""Name tensors by what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of named tensors, in hexadecimal: of names, types, shapes and every bit, in any order.

    Example:
        >>> one, two = {'a': torch.zeros(2)}, {'a': -torch.zeros(2)}
        >>> digest(one) == digest({'a': torch.zeros(2)}), digest(one) == digest(two)
        (True, False)
    """
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
