"""Gradients of a masked model: what a backward pass computes over all channels is found and frozen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as cp
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare, compare_gradients, gap_of_gradients
from mmcpd.slim.trial import random_keep
from tests.helpers import TORCH_2_5


class NormOverChannels(torch.autograd.Function):
    """A layer norm over (N, C, H, W) whose backward is written by hand, as restoration nets have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        root = (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        normal = (x - x.mean(1, keepdim=True)) / root
        ctx.save_for_backward(normal, root, weight)
        return normal * weight[:, None, None]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        normal, root, weight = ctx.saved_tensors
        g = gradient * weight[:, None, None]
        inner = g - g.mean(1, keepdim=True) - normal * (g * normal).mean(1, keepdim=True)
        return inner / root, (gradient * normal).sum((0, 2, 3))


class CentredInBackward(torch.autograd.Function):
    """The forward is point-wise; only the gradient is less its mean over channels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return (gradient - gradient.mean(1, keepdim=True)) * 2


class Swish(torch.autograd.Function):
    """A point-wise function that saves memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * s * (1 + x * (1 - s))


taken_before = NormOverChannels.apply


class Net(nn.Module):
    """Two convolutions, what a subclass does, and a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Conv2d(12, 5, 1)
        self.weight, self.norm = nn.Parameter(torch.rand(12) + 0.5), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.middle(self.a(x).tanh())).mean((2, 3))


class OwnBackward(Net):
    def middle(self, x: Tensor) -> Tensor:
        return NormOverChannels.apply(self.b(x), self.weight)


class TakenBefore(Net):
    def middle(self, x: Tensor) -> Tensor:
        return taken_before(self.b(x), self.weight)


class OnlyBackward(Net):
    def middle(self, x: Tensor) -> Tensor:
        return CentredInBackward.apply(self.b(x))


class Recomputed(Net):
    reentrant = True

    def inner(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return x - 2 * x.mean(1, keepdim=True)

    def middle(self, x: Tensor) -> Tensor:
        return cp.checkpoint(self.inner, x, use_reentrant=self.reentrant) if x.requires_grad else self.inner(x)


class RecomputedOtherwise(Recomputed):
    reentrant = False


class PointWise(Net):
    def middle(self, x: Tensor) -> Tensor:
        return Swish.apply(self.b(Swish.apply(x)))


class RecomputedNorm(Recomputed):
    def inner(self, x: Tensor) -> Tensor:
        return self.norm(self.b(x).movedim(1, -1)).movedim(-1, 1)


class PlainNorm(Net):
    def middle(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-6).sqrt()


def made(kind: type[Net]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return kind().double().eval(), torch.randn(2, 3, 9, 9, dtype=torch.float64)


@pytest.mark.parametrize('kind', (OwnBackward, TakenBefore, OnlyBackward, Recomputed, RecomputedOtherwise))
def test_channels_that_a_backward_goes_over_are_frozen(kind: type[Net]) -> None:
    model, x = made(kind)
    untried = comb(model, x, trial=False, unused='leave')
    keep = random_keep(untried, 0.5, 0, awkward=True)
    assert not keep['b'].all()
    assert compare(model, untried, keep) < 1e-12, 'the outputs alone show it'
    if kind is RecomputedOtherwise:  # torch compares what the two runs save
        with pytest.raises(cp.CheckpointError):
            compare_gradients(model, untried, keep)
    else:
        assert compare_gradients(model, untried, keep) > 1e-2
    found = comb(model, x, unused='leave')
    assert [group.name for group in found.groups] == ['a']
    assert compare_gradients(model, found, random_keep(found, 0.5, 0, awkward=True)) < 1e-12
    [reason] = {frozen.reason for frozen in found.frozen if 'trial' in frozen.reason}
    wrong = 'a backward of its own, or a recomputation, goes over all channels'
    assert ('CheckpointError' if kind is RecomputedOtherwise else wrong) in reason


@pytest.mark.parametrize('kind', (PointWise, RecomputedNorm, PlainNorm))
def test_channels_whose_gradients_are_right_are_free(kind: type[Net]) -> None:
    model, x = made(kind)
    found = comb(model, x, unused='leave')
    assert [group.name for group in found.groups] == ['a', 'b']
    keep = random_keep(found, 0.5, 0, awkward=True)
    assert compare(model, found, keep) < 1e-12
    assert compare_gradients(model, found, keep) < 1e-12


class TokensBehindNorm(nn.Module):
    """Through a layer norm the gradient comes back in the order of tokens."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 3), norm, nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)).flatten(2).transpose(1, 2))


@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('norm', [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)], ids=['batch', 'instance'])
def test_gradients_of_norms_do_not_depend_on_the_order_in_memory(norm: nn.Module, batch: int) -> None:
    torch.manual_seed(0)
    model, x = TokensBehindNorm(norm).double().eval(), torch.randn(batch, 3, 9, 9, dtype=torch.float64)
    found = comb(model, x)
    keep = random_keep(found, 0.5, 0, awkward=True)
    assert not keep['a'].all()
    assert compare_gradients(model, found, keep) < 1e-12
    keep['a'] = keep['a'].roll(1)
    masked = copy.deepcopy(model)
    mask_(masked, found, keep)
    assert gap_of_gradients(masked, slim(model, found, random_keep(found, 0.5, 0, awkward=True)), found, keep) > 1e-2


def test_comparing_gradients_leaves_the_model_alone() -> None:
    model, x = made(PlainNorm)
    found = comb(model, x, unused='leave')
    compare_gradients(model, found, random_keep(found, 0.5, 0))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not torch.is_grad_enabled() or x.grad is None


class RecomputedHelper(Net):
    """What runs again is a function that knows no module."""

    @staticmethod
    def centred(x: Tensor) -> Tensor:
        return x - 2 * x.mean(1, keepdim=True)

    def middle(self, x: Tensor) -> Tensor:
        x = self.b(x)
        return cp.checkpoint(self.centred, x, use_reentrant=True) if x.requires_grad else self.centred(x)


def test_a_recomputed_function_is_seen_too_and_a_norm_costs_no_second_look(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made(RecomputedHelper)
    assert [group.name for group in comb(model, x, unused='leave').groups] == ['a']
    monkeypatch.setattr('mmcpd.slim.trial.compare_gradients', lambda *_: pytest.fail('gradients are compared'))
    for kind in (RecomputedNorm, PlainNorm) if TORCH_2_5 else (PlainNorm,):
        comb(*made(kind))
