"""What is cut is compared with what was masked before anything is written."""

from __future__ import annotations

import pytest

from mmcpd.comb import comb
from mmcpd.engine.saving import cut_checked
from mmcpd.errors import SlimError
from mmcpd.slim import mask_
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep
from tests.helpers import randomise_
from tests.test_slim.test_trial import Chaotic, Wrong, X


def masked(model):
    model = randomise_(model).float()
    found = comb(model, X.float(), trial=False)
    keep = random_keep(found, 0.5, 0)
    mask_(model, found, keep)
    return model, found, keep


def test_a_model_that_makes_much_of_rounding_is_cut():
    model, found, keep = masked(Chaotic())
    assert compare(model, found, keep) > 1e-3  # in float32
    assert cut_checked(model, found, keep).odd.out_features < 8


def test_a_model_that_is_cut_into_another_is_not():
    with pytest.raises(SlimError, match='so nothing is written'):
        cut_checked(*masked(Wrong()))
    with pytest.raises(SlimError, match='so nothing is written'):
        cut_checked(*masked(Chaotic(wrong=True)))
