"""Columns times the weight are the layer's output, for each kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.layer_calls import LayerCall, LayerCalls
from mmcpd.refit.columns import as_matrix, as_weight, columns_at, outputs_at, sample
from mmcpd.slim.compare import evaluating

LAYERS = {
    'linear': (nn.Linear(4, 6), (2, 5, 4)),
    'conv1d': (nn.Conv1d(4, 6, 3, padding=2, dilation=2), (2, 4, 9)),
    'conv2d': (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 4, 7, 6)),
    'conv3d': (nn.Conv3d(4, 6, 2, stride=2), (2, 4, 4, 5, 4)),
    'grouped': (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 6)),
    'depthwise': (nn.Conv2d(4, 8, 3, groups=4, padding='same', dilation=2), (2, 4, 7, 6)),
    'same, even kernel': (nn.Conv2d(4, 6, 4, padding='same'), (2, 4, 7, 6)),
    'unbatched': (nn.Conv2d(4, 6, 3), (4, 7, 6)),
    'transposed': (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 3, 5)),
    'transposed, grouped': (nn.ConvTranspose1d(4, 6, 4, groups=2, stride=3, dilation=2), (2, 4, 5)),
}  # fmt: skip


def call_of(layer: nn.Module, x: torch.Tensor) -> tuple[LayerCall, torch.Tensor]:
    seen = []

    def note(call: LayerCall) -> torch.Tensor:
        seen.append(call)
        return call.run()

    with evaluating(layer), LayerCalls(layer, note):
        return (out := layer(x), seen[0])[1], out


@pytest.mark.filterwarnings('ignore:Using padding=.same. with even')
@pytest.mark.parametrize('name', LAYERS)
def test_columns_times_weight_is_the_output(name):
    layer, shape = LAYERS[name]
    torch.manual_seed(0)
    call, out = call_of(layer.double(), torch.rand(shape, dtype=torch.float64))
    dims, channels = call.weight.dim(), 6 if name != 'depthwise' else 8
    positions = torch.randperm(out.numel() // channels)[:7]
    expected = outputs_at(out, dims, positions)
    matrix = as_matrix(call.kind, call.groups, call.weight)  # (groups, columns, taps, outputs)
    columns = columns_at(call, out.shape, positions)
    found = torch.einsum('pgct,gcto->pgo', columns, matrix).flatten(1) + call.bias
    assert torch.allclose(found, expected, atol=1e-12)
    wrong = torch.einsum('pgct,gcto->pgo', columns.roll(1, 0), matrix).flatten(1) + call.bias
    assert not torch.allclose(wrong, expected, atol=1e-3)
    assert torch.equal(as_weight(call.kind, matrix, call.weight.shape), call.weight)


def test_a_sample_is_the_same_each_time_and_no_larger_than_needed():
    cpu, state = torch.device('cpu'), torch.get_rng_state()
    one = sample(1000, 50, 3, cpu)
    assert torch.equal(one, sample(1000, 50, 3, cpu)) and len(set(one.tolist())) == 50
    assert not torch.equal(one, sample(1000, 50, 4, cpu))
    assert torch.equal(sample(5, 50, 3, cpu), torch.arange(5))
    assert torch.equal(torch.get_rng_state(), state)
