"""A masked forward leaves nothing in memory: no frame that holds itself, and with it the model and its activations."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mmcpd.slim.call_sites import code_place, in_own_function, spot


@pytest.mark.parametrize('place', [code_place, in_own_function, lambda: spot(0, 1)], ids=['statistic', 'own', 'size'])
def test_asking_for_a_place_leaves_no_frame(place: Callable[[], object]) -> None:
    def run() -> weakref.ref[nn.Module]:
        held = nn.Linear(1, 1)
        place()
        return weakref.ref(held)

    gc.collect()
    gc.disable()
    try:
        assert run()() is None
    finally:
        gc.enable()


def test_a_frame_that_holds_itself_would_be_seen() -> None:
    def run() -> weakref.ref[torch.Tensor]:
        held = torch.zeros(1)
        itself = [held]
        itself.append(itself)  # type: ignore[arg-type]
        return weakref.ref(held)

    gc.disable()
    try:
        assert run()() is not None
    finally:
        gc.enable()
