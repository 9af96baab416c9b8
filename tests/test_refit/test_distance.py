"""How far outputs are from the dense ones is measured on all batches."""

from __future__ import annotations

import pytest
import torch

from mmcpd.refit import refit
from tests.helpers import masked, sample
from tests.test_refit.nets import Block, combed


def distance(model, other, x):
    with torch.no_grad():
        return float((model(x) - other(x)).square().sum() / model(x).square().sum())


def test_distances_are_those_on_all_batches():
    """More than 128 pictures, the last of which differ from the others."""
    model, coupling, keep = combed(Block)
    x = sample((160, 3, 8, 8))
    x[140:] *= 30
    done = refit(model, coupling, keep, x.split(40), samples=4)
    old = masked(model, coupling, keep)
    assert done.report.masked_distance == pytest.approx(distance(model, old, x), rel=1e-9)
    assert done.report.refitted_distance == pytest.approx(distance(model, done.model, x), rel=1e-9)
    assert distance(model, old, x[:120]) != pytest.approx(distance(model, old, x), rel=1e-3)
