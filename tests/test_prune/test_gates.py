"""A gate's gradient is summed row by row, and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcpd.comb import comb
from mmcpd.prune.gates import Gates, row_dot, untouched


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


class ReadByABuffer(nn.Module):
    """Channels, normed or not, that a table of constants reads."""

    def __init__(self, norm: bool):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8) if norm else nn.Identity()
        self.register_buffer('table', torch.randn(8, 5))
        self.gate = None

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        if self.gate is not None:
            x = x * self.gate[:, None, None]
        return x.mean((2, 3)) @ self.table


@pytest.mark.parametrize('norm', [True, False])
def test_where_a_buffer_reads_the_gate_is_behind_the_producer(norm):
    torch.manual_seed(0)
    net, x = ReadByABuffer(norm).double(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    coupling = comb(net.eval(), x)
    gates, noise = Gates(coupling.groups), torch.randn(4, 5, dtype=torch.float64)
    behind = 'norm' if norm else 'conv'
    assert {cut.tensor for cut in gates.cuts} == {f'{behind}.weight', f'{behind}.bias'}
    net.train()
    (net(x) * noise).sum().backward()
    found = gates.gradient(net)
    net.gate = torch.ones(8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((net(x) * noise).sum(), net.gate)
    torch.testing.assert_close(found.double(), expected)
