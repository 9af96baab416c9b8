"""What a refit is given: what it refuses, and a teacher."""

from __future__ import annotations

import pytest
from torch import nn

from mmcpd.refit import refit
from tests.helpers import call, gap, masked
from tests.test_refit.nets import IMAGES, Block, combed


def test_arguments_that_cannot_be_used_are_refused():
    model, coupling, keep = combed(Block)
    with pytest.raises(ValueError, match='no batch to refit on'):
        refit(model, coupling, keep, [])
    with pytest.raises(ValueError, match='ridge must be positive'):
        refit(model, coupling, keep, [IMAGES], ridge=0)
    with pytest.raises(ValueError, match='has no entry for group'):
        refit(model, coupling, {}, [IMAGES])
    with pytest.raises(ValueError, match='the model is masked already'):
        refit(masked(model, coupling, keep), coupling, keep, [IMAGES])
    with pytest.raises(ValueError, match=r"the teacher has no 'stem.weight' of shape \(8, 3, 3, 3\)"):
        refit(model, coupling, keep, [IMAGES], teacher=nn.Linear(2, 2))
    broken = IMAGES.clone()
    broken[0] = float('nan')
    with pytest.raises(ValueError, match=r"'stem.weight' reads or puts out values that are not finite"):
        refit(model, coupling, keep, [broken])


def test_a_masked_model_is_refitted_to_a_teacher():
    model, coupling, keep = combed(Block)
    done = refit(masked(model, coupling, keep), coupling, keep, [IMAGES], teacher=model)
    assert gap(call(coupling, done.model), call(coupling, refit(model, coupling, keep, [IMAGES]).model)) == 0
