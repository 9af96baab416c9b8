"""The state of a pruner, which a checkpoint holds."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

from ..coupling import Keep


class PrunerState(TypedDict):
    """What a run resumes from: plain tensors, integers and one flag."""

    keep: Keep
    importance: dict[str, Tensor]
    iteration: int
    last: int
    waiting: bool
    frozen: list[str]
