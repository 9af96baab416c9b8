"""Put the modes of a model's modules back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Let a block change which modules train, and put each back into its own mode afterwards.

    Example:
        >>> with modes_kept(model):
        ...     _ = model.train(not model.training)
        ...     inside = model.training
        >>> inside != model.training
        True
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
