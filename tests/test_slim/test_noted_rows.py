"""Buffers that no state dict holds get the rows that slimming kept, also in a fresh model."""

from __future__ import annotations

import copy
import io
import json
import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.errors import SlimError
from mmcpd.slim import restructure_, slim, structure
from mmcpd.slim.trial import random_keep

IMAGES = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Scaled(nn.Module):
    """A table of constants per channel, and a basis over two widths at once; neither is saved."""

    def __init__(self, persistent: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)
        self.register_buffer('scale', torch.arange(1.0, 9.0)[:, None, None], persistent)
        self.register_buffer('basis', torch.arange(96.0).reshape(12, 8) % 7 / 7, persistent)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu() * self.scale
        y = self.b(x).relu().mean((2, 3)) + x.mean((2, 3)) @ self.basis.T
        return self.fc(y)


class Nearest(nn.Module):
    """Compares features with stored ones, as retrieval does: the prototypes lie in a child."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.store = nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7)), nn.Module()
        values = torch.rand(20, 7, generator=torch.Generator().manual_seed(3))
        self.store.register_buffer('prototypes', values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) @ self.store.prototypes.T


def reload(build, small: nn.Module, plan: dict) -> nn.Module:
    twin = restructure_(build().double(), json.loads(json.dumps(plan)))
    twin.load_state_dict(small.state_dict())
    return twin.eval()


def slimmed(model: nn.Module, inputs: Tensor, seed: int) -> nn.Module:
    coupling = comb(model, inputs)
    return slim(model, coupling, random_keep(coupling, 0.6, seed))


NETS = {'by channels': (Scaled, IMAGES), 'prototypes': (Nearest, IMAGES.flatten()[:20].reshape(4, 5))}


@pytest.mark.parametrize(('build', 'inputs'), NETS.values(), ids=NETS)
@pytest.mark.parametrize('times', [1, 2])
def test_a_fresh_model_takes_the_kept_rows_from_its_own_buffers(build, inputs, times):
    dense = build().double().eval()
    small = dense
    for seed in range(times):  # notes compose
        small = slimmed(small, inputs, seed)
    plan = structure(dense, small)
    assert plan['rows']
    assert torch.equal(reload(build, small, plan)(inputs), small(inputs))
    leading = copy.deepcopy(plan)
    leading['rows'] = {}
    assert not torch.allclose(reload(build, small, leading)(inputs), small(inputs))
    again = slimmed(reload(build, small, plan), inputs, 9)  # a reloaded model can be slimmed further
    assert torch.equal(reload(build, again, structure(dense, again))(inputs), again(inputs))


def test_a_saved_and_loaded_model_still_knows_its_rows():
    dense = Scaled().double().eval()
    file = io.BytesIO()
    torch.save(slimmed(dense, IMAGES, 0), file)
    small = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    assert torch.equal(reload(Scaled, small, structure(dense, small))(IMAGES), small(IMAGES))


def test_what_the_state_dict_holds_needs_no_rows():
    dense = Scaled(persistent=True).double().eval()
    assert structure(dense, slimmed(dense, IMAGES, 0))['rows'] == {}


def test_rows_that_nobody_knows_are_said():
    dense = Scaled().double().eval()
    small = slimmed(dense, IMAGES, 0)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        structure(dense, small)
    small.scale = small.scale[1:]
    with pytest.warns(UserWarning, match='^scale is not in the state dict, .*: set it after `restructure_`$'):
        assert 'scale' not in structure(dense, small)['rows']


FAULTS = {
    'of a parameter': ('a.weight', [[0], None, None, None]),
    'of nothing': ('other', [[0]]),
    'no list': ('scale', {'0': [0]}),
    'too few dimensions': ('scale', [[0, 1, 2]]),
    'all': ('scale', [None, None, None]),
    'too large': ('scale', [[0, 1, 8], None, None]),
    'negative': ('scale', [[-1, 1, 2], None, None]),
    'twice': ('scale', [[1, 1, 2], None, None]),
    'backward': ('scale', [[2, 1, 0], None, None]),
    'booleans': ('scale', [[False, True, 2], None, None]),
    'another number': ('scale', [[0, 1], None, None]),
}


@pytest.mark.parametrize(('name', 'rows'), FAULTS.values(), ids=FAULTS)
def test_other_rows_are_refused(name, rows):
    dense = Scaled().double().eval()
    coupling = comb(dense, IMAGES)
    keep = coupling.keep()
    keep['a'][3:] = False
    plan = structure(dense, slim(dense, coupling, keep))
    assert plan['rows']['scale'] == [[0, 1, 2], None, None]
    plan['rows'][name] = rows
    fresh = Scaled().double()
    with pytest.raises(SlimError, match=re.escape(name)):
        restructure_(fresh, plan)
    assert fresh.scale.shape[0] == 8
