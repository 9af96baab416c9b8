"""A gate's gradient is summed row by row, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.prune.gates import row_dot, untouched


def test_untouched_restores_after_an_exception():
    net = nn.Linear(2, 2)
    weight = net.weight.detach().clone()
    with pytest.raises(RuntimeError, match='planned'), untouched(net):
        net.weight.data.zero_()
        net.weight.grad = torch.ones(2, 2)
        raise RuntimeError('planned')
    assert torch.equal(net.weight, weight) and net.weight.grad is None


@pytest.mark.parametrize('shape', [(7,), (5, 7), (300, 400), (9, 5, 3, 3), (2, 3, 4, 5, 6)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float16])
def test_row_dot(shape, dtype):
    torch.manual_seed(0)
    w, g = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    layouts = [(w, g)]
    if len(shape) == 4:
        layouts.append((w.to(memory_format=torch.channels_last), g.to(memory_format=torch.channels_last)))
    for dim in range(len(shape)):
        product = w.double() * g.double()
        expected = product.movedim(dim, 0).flatten(1).sum(1) if len(shape) > 1 else product
        for a, b in layouts:
            found = row_dot(a, b, dim)
            assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
