"""The states of the generators of random numbers as a checkpoint holds them: tensors, numbers and lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmcpd.random_state import random_state, set_random_state

Plain = dict[str, list[int | float | Tensor | None]]


@dataclass(frozen=True)
class Place:
    """Where a process is in its training data: batches drawn in this pass, and the states when the pass began."""

    passes: int
    drawn: int
    start: Plain


def plain_states() -> Plain:
    """Return the states of Python's, numpy's, torch's and this process's GPU's generators.

    Example:
        >>> import random
        >>> before = plain_states()
        >>> first = random.random(), np.random.rand(), torch.rand(1)
        >>> set_plain_states(before)
        >>> first == (random.random(), np.random.rand(), torch.rand(1))
        True
    """
    (version, words, gauss), (_, key, place, has_gauss, cached), cpu, _ = random_state()
    return {
        'python': [version, torch.tensor(words), gauss],
        'numpy': [torch.from_numpy(np.asarray(key, dtype=np.int64)), int(place), int(has_gauss), float(cached)],
        'torch': [cpu],
        'cuda': [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def set_plain_states(states: Mapping[str, list]) -> None:
    """Go back to states from `plain_states`, on whatever device they were read."""
    version, words, gauss = states['python']
    key, *rest = states['numpy']
    numbers = ('MT19937', key.cpu().numpy().astype(np.uint32), *rest)
    set_random_state(((version, tuple(words.tolist()), gauss), numbers, states['torch'][0].cpu(), []))
    if states['cuda'] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states['cuda'][0].cpu())
