"""Every kind of attention that can be rotated is, exactly."""

from __future__ import annotations

import copy

import pytest
import torch

from mmcpd.rotate import HeadKind, rotate_
from mmcpd.slim.compare import difference
from tests.test_rotate.attentions import DIM, HEADS, INPUTS, KINDS, WIDTH, built, run, tokens

BOTH = {HeadKind.QUERY_KEY: HEADS, HeadKind.VALUE_PROJECTION: HEADS}


@pytest.mark.parametrize('kind', KINDS)
def test_the_function_stays_and_every_head_is_rotated(kind):
    model, x = built(KINDS[kind]), tokens(INPUTS.get(kind, DIM))
    dense, out = copy.deepcopy(model), run(model, x)
    done = rotate_(model, x)
    assert {kind: sum(r.heads for r in done.rotated if r.kind is kind) for kind in HeadKind} == BOTH, str(done)
    assert not done.skipped
    assert {r.width for r in done.rotated} == {WIDTH}
    assert difference(out, run(model, x)) < 1e-10
    # the control: with one of the two sides as it was, the function is another
    for part in done.rotated:
        half = copy.deepcopy(model)
        name = part.layers[-1]
        rows = slice(None) if len(part.layers) > 1 else slice(0, HEADS * WIDTH)
        with torch.no_grad():
            half.get_parameter(name)[rows] = dense.get_parameter(name)[rows]
        assert difference(out, run(half, x)) > 1e-6, part
