"""Save the state of every generator of random numbers that a forward pass may draw from, and go back to it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RandomState = tuple[Any, Any, torch.Tensor, list[torch.Tensor]]


def random_state() -> RandomState:
    """Return the states of Python's, numpy's, torch's and all CUDA devices' generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_random_state(state: RandomState) -> None:
    """Go back to a state from `random_state`."""
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3]:
        torch.cuda.set_rng_state_all(state[3])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from a seed inside, and go on afterwards as if nothing had been drawn.

    `torch.manual_seed` is not called: before a GPU is first used it would leave its seed for then.

    Example:
        >>> with seeded(0):
        ...     first = torch.rand(3)
        >>> with seeded(0):
        ...     bool((torch.rand(3) == first).all())
        True
    """
    before = random_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    try:
        yield
    finally:
        set_random_state(before)


def draws(call: Callable[[], object]) -> bool:
    """Say whether a call draws random numbers; those of the caller are as before.

    Example:
        >>> draws(lambda: torch.rand(1)), draws(lambda: torch.ones(1))
        (True, False)
    """
    with seeded(0):
        python, (_, numbers, place, *_), cpu, cuda = random_state()
        call()
        after = random_state()
    same = python == after[0] and place == after[1][2] and np.array_equal(numbers, after[1][1])
    return not same or not all(map(torch.equal, (cpu, *cuda), (after[2], *after[3])))
