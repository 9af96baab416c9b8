"""Calls of layers' functions are seen with the rows of their parameters, also inside torch's own attention."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.layer_calls import LayerCall, LayerCalls, LayerKind, ParameterRows
from mmcpd.slim.compare import evaluating


def watch(model: nn.Module, *args: object) -> tuple[object, list[LayerCall]]:
    calls: list[LayerCall] = []

    def note(call: LayerCall) -> torch.Tensor:
        calls.append(call)
        return call.run()

    with evaluating(model), LayerCalls(model, note):
        return model(*args), calls


@pytest.mark.parametrize('options', [{}, {'batch_first': True}, {'kdim': 8, 'vdim': 8}, {'add_bias_kv': True}])
def test_torchs_attention_is_open(options):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, **options)
    query, key = torch.rand(3, 5, 16), torch.rand(3, 5, options.get('kdim', 16))
    with evaluating(model):
        expected = model(query, key, key)[0]
    (out, _), calls = watch(model, query, key, key)
    assert torch.equal(out, expected)
    names = ['q_proj_weight', 'k_proj_weight', 'v_proj_weight'] if options.get('kdim') else ['in_proj_weight'] * 2
    assert [c.rows.tensor for c in calls] == [*names, 'out_proj.weight']
    assert [c.bias_rows.tensor for c in calls] == ['in_proj_bias'] * (len(calls) - 1) + ['out_proj.bias']
    if not options.get('kdim'):
        assert calls[1].rows == ParameterRows('in_proj_weight', 16, 48)


def test_a_torch_whose_attention_cannot_be_opened_is_refused_where_it_is_called(monkeypatch):
    def closed(query, key, value, *args, **kwargs):
        """As torch's, but it is handed over without asking."""
        return torch.overrides.handle_torch_function(closed, (query, key, value), query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, 'multi_head_attention_forward', closed)
    model, x = nn.MultiheadAttention(4, 2), torch.rand(3, 1, 4)
    assert len(watch(nn.Linear(4, 4), x)[1]) == 1, 'other layers are seen'
    with pytest.raises(
        RuntimeError, match=rf'cannot be seen with torch {re.escape(torch.__version__)}.*use an earlier'
    ):
        watch(model, x, x, x)


class Parts(nn.Module):
    """One weight in two parts, one convolution called twice, one weight that is computed, one transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv = nn.Linear(4, 6), nn.Conv2d(6, 6, 3)
        self.up = nn.ConvTranspose2d(6, 2, 2, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        top, bottom = self.fc.weight.chunk(2)
        x = torch.cat([F.linear(x, top, self.fc.bias[:3]), F.linear(x, bottom)], -1)  # (N, L, 6)
        x = x.transpose(1, 2).unflatten(2, (8, 8))
        x = self.conv(F.pad(self.conv(x), (1, 1, 1, 1)))
        x = F.conv2d(x, self.conv.weight * 2, padding=1)
        return self.up(x)


def test_parts_repeated_calls_and_computed_weights():
    torch.manual_seed(0)
    model, x = Parts(), torch.rand(2, 64, 4)
    out, calls = watch(model, x)
    assert torch.equal(out, model(x))
    rows = [c.rows and (c.rows.tensor, c.rows.start, c.rows.stop, c.number) for c in calls]
    conv = ('conv.weight', 0, 6)
    expected = [('fc.weight', 0, 3, 0), ('fc.weight', 3, 6, 0), (*conv, 0), (*conv, 1), None, ('up.weight', 0, 6, 0)]
    assert rows == expected
    assert calls[0].bias_rows == ParameterRows('fc.bias', 0, 3) and calls[1].bias_rows is None
    assert calls[-1].kind is LayerKind.TRANSPOSED and calls[-1].groups == 2


def test_what_a_call_returns_goes_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    x = torch.rand(5, 3)
    with LayerCalls(model, lambda call: call.run(input=call.input * 2)):
        out = model(x)
    assert torch.allclose(out, model[1](model[0](x * 2) * 2))


def test_numbers_start_anew():
    model, numbers = nn.Linear(3, 3), []

    def note(call: LayerCall) -> torch.Tensor:
        numbers.append(call.number)
        return call.run()

    calls = LayerCalls(model, note)
    with calls:
        for _ in range(2):
            calls.restart()
            model(model(torch.rand(1, 3)))
    assert numbers == [0, 1, 0, 1]
