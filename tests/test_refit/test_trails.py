"""What happens to a layer's output until a sum is followed exactly, and left alone where it cannot be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.layer_calls import LayerCalls
from mmcpd.refit.trails import CallKey, Trails
from mmcpd.slim.compare import evaluating
from tests.helpers import Net, randomise_, sample

IMAGE = sample((2, 4, 6, 6))


def windows(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N * 4, 9, C)."""
    n, c, h, w = x.shape
    return x.reshape(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).reshape(n * 4, -1, c)


def unwindow(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 2, 2, 3, 3, x.shape[-1]).permute(0, 5, 1, 3, 2, 4).reshape(-1, x.shape[-1], 6, 6)


def in_place(m: Net, x: torch.Tensor) -> torch.Tensor:
    out = m.bn(m.conv(x))
    out += x
    return out


def onto_stream(m: Net, x: torch.Tensor) -> torch.Tensor:
    x = x * 2
    x += m.conv(x)
    return x


def cut(m: Net, x: torch.Tensor) -> torch.Tensor:
    padded = F.pad(x, (0, 2, 0, 2))
    return m.conv(padded)[:, :, :6, :6] + x


# The net, and what else the conv's output goes through than moves and scales.
CHAINS = {
    'plain': lambda m, x: x + m.conv(x),
    'norm': lambda m, x: torch.add(m.bn(m.conv(x)), x),
    'in place': in_place,
    'onto the stream': onto_stream,
    'layer scale': lambda m, x: x + m.conv(x).mul_(m.bn.weight.view(1, -1, 1, 1)) / 3,
    'tokens': lambda m, x: x + m.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) * m.bn.bias[:, None, None],
    'windows': lambda m, x: torch.roll(unwindow(m.fc(windows(torch.roll(x, 1, 2)))), -1, dims=2) + x,
    'a constant': lambda m, x: (1.0 + m.conv(x) + m.bn.bias.reshape(4, 1, 1)).contiguous() + x,
    'dropout': lambda m, x: F.dropout(m.conv(x), 0.5, False) + x,
    'a part of it': cut,
    'transposed view': lambda m, x: m.fc(x.flatten(2).mT).mT.unflatten(2, (6, 6)) + x,
}


def follow(run, breaks=None):
    torch.manual_seed(0)
    model = randomise_(
        Net(run, conv=nn.Conv2d(4, 4, 3, padding=1), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 4), after=nn.Conv2d(4, 4, 1))
    )
    found = []

    def on_call(call):
        output = call.run()
        if call.rows is not None and call.rows.tensor != 'after.weight':
            outputs[call.rows.tensor] = output.clone()
            trails.start(output, CallKey(call.rows, call.number), call.input)
        return output

    def on_sum(trail, operand, stream):
        output = outputs[trail.origin.key.rows.tensor]
        wanted = torch.rand(operand.shape, dtype=operand.dtype, generator=torch.Generator().manual_seed(1))
        gain = trail.gain(operand)
        better = output + torch.where(gain.abs() > 1e-9, trail.back(wanted - operand) / gain, 0.0)
        found.append((trail, operand.clone(), trail.replay(output.clone()), wanted, trail.replay(better)))

    outputs: dict[str, torch.Tensor] = {}
    reasons: list[str] = [] if breaks is None else breaks
    trails = Trails(model, on_sum, lambda trail, reason: reasons.append(reason))
    with evaluating(model), trails, LayerCalls(model, on_call):
        trails.close(model(IMAGE))
    return found, trails


@pytest.mark.parametrize('name', CHAINS)
def test_a_sum_is_reached_by_what_is_moved_back(name):
    found, _ = follow(CHAINS[name])
    assert len(found) == 1
    _, operand, replayed, wanted, reached = found[0]
    assert torch.allclose(replayed, operand, atol=1e-12)
    assert torch.allclose(reached, wanted, atol=1e-9)
    assert not torch.allclose(operand, wanted, atol=1e-2)


BROKEN = {
    'an activation': (lambda m, x: x + m.conv(x).relu(), None),
    'an activation in place': (lambda m, x: x + m.conv(x).relu_(), None),
    'in place through a view': (lambda m, x: (y := m.conv(x), y.view(-1).relu_(), x + y)[-1], None),
    'an average': (lambda m, x: F.avg_pool2d(x, 2) + F.avg_pool2d(m.conv(x), 2), None),
    'a reflection': (lambda m, x: F.pad(m.conv(x), (1, 1, 1, 1), mode='reflect') + F.pad(x, (1, 1, 1, 1)), None),
    'attention weights': (lambda m, x: x + m.conv(x) * x.mean((2, 3), keepdim=True), None),
    'a factor': (lambda m, x: torch.add(x, m.conv(x), alpha=2), None),
    'a norm in train mode': (lambda m, x: x + F.batch_norm(m.conv(x), None, None, training=True), None),
    'it is broadcast': (lambda m, x: x + m.conv(x)[:, :, :1, :1], 'its output is broadcast in the sum'),
    'another reader': (
        lambda m, x: (y := m.conv(x), z := m.after(y), x + y + z)[-1],
        'its output is also read by something else than the sum',
    ),
    'an input that is overwritten': (
        lambda m, x: (z := x * 1, y := m.conv(z), z.relu_(), x + y)[-1],
        'its input is overwritten before the sum',
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', BROKEN)
def test_what_cannot_be_undone_is_left_alone(name):
    run, reason = BROKEN[name]
    reasons: list[str] = []
    found, _ = follow(run, reasons)
    assert not found and reasons == ([] if reason is None else [reason])


def test_of_two_layers_the_last_one_ends_in_the_sum():
    found, _ = follow(lambda m, x: m.bn(m.conv(x)) + m.fc(x.movedim(1, -1)).movedim(-1, 1))
    assert [trail.origin.key.rows.tensor for trail, *_ in found] == ['fc.weight']


def test_who_else_reads_a_norms_input_or_a_weight_is_known():
    for run, reads in (
        (lambda m, x: m.bn(m.conv(x)), 1),
        (lambda m, x: (y := m.conv(x), m.bn(y) * y.sigmoid())[-1], 2),
        (lambda m, x: (y := m.conv(x), [m.bn(y), y])[-1], 2),
    ):
        _, trails = follow(run)
        (origin,) = trails.norms.popitem()[1]
        assert origin.output_reads == reads
    _, trails = follow(lambda m, x: m.conv(x) + F.conv2d(x, m.conv.weight * 2, padding=1))
    assert list(trails.readers.values()) == ['mul']
    _, trails = follow(lambda m, x: F.conv2d(x, m.conv.weight.view(4, 4, 3, 3).contiguous(), padding=1))
    assert not trails.readers
