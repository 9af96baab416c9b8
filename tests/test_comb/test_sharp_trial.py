"""What a trial once had to save has rules of its own, and a trial sees what it should and blames nobody else."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.errors import CombError
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep, trial_of
from tests.helpers import Net, randomise_
from tests.test_comb.test_query_scales import IN_THE_CALL, Attention, made


def picture() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize('kind', IN_THE_CALL)
def test_a_trial_sees_a_wrong_scale_in_float32_and_small_weights(kind: type[Attention]) -> None:
    model, x = made(kind)
    model, x = model.float(), x.float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.05)  # attentions that are diffuse
    found = comb(model, x, trial=False, unused='leave')
    assert trial_of(model, found).faults == {}
    wrong = replace(found, fixes=replace(found.fixes, scales=(), constants=()))
    assert trial_of(model, wrong).faults


# -- rules -------------------------------------------------------------------------------------------------------------
def test_a_batch_norm_over_other_axes_freezes_them() -> None:
    model = randomise_(
        Net(
            lambda m, x: m.b(m.norm(m.a(x).movedim(1, 2)).movedim(2, 1)),
            a=nn.Conv2d(3, 8, 1),
            norm=nn.BatchNorm2d(8),
            b=nn.Conv2d(8, 5, 1),
        )
    )
    found = comb(model, picture(), trial=False)
    assert not found.groups
    assert any(f.reason.startswith('a batch norm over other channels') for f in found.frozen)


class Blur(nn.Module):
    """One kernel for all channels; how it becomes a weight is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)
        self.register_buffer('kernel', torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16)

    def weight(self, x: Tensor) -> Tensor:
        return self.kernel.repeat(x.shape[1], 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(F.conv2d(x, self.weight(x), padding=1, groups=x.shape[1]))


class Expanded(Blur):
    def weight(self, x: Tensor) -> Tensor:
        return self.kernel.expand(x.shape[1], -1, -1, -1)


class OfEachChannel(Blur):
    """Weights that follow from the number of the channel."""

    def weight(self, x: Tensor) -> Tensor:
        scale = torch.arange(x.shape[1], dtype=x.dtype) + 1
        return self.kernel * scale[:, None, None, None]


@pytest.mark.parametrize('kind', (Blur, Expanded))
def test_a_blur_of_each_channel_passes_channels_on(kind: type[Blur]) -> None:
    model = randomise_(kind())
    found = comb(model, picture(), trial=False)
    assert [(group.name, group.units) for group in found.groups] == [('a', 8)]
    assert compare(model, found, random_keep(found, 0.5, 0)) < 1e-12


def test_weights_that_no_layer_produces_freeze_what_they_are_applied_to() -> None:
    model = randomise_(OfEachChannel())
    found = comb(model, picture(), trial=False)
    assert not found.groups
    assert any('a grouped convolution with a weight that no layer produces' in f.reason for f in found.frozen)


# -- what a trial must not blame ---------------------------------------------------------------------------------------
class RunsOnce(nn.Module):
    """A module whose copies do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 5, 1)
        self.home = [id(self)]

    def forward(self, x: Tensor) -> Tensor:
        if self.home != [id(self)]:
            raise RuntimeError('this is a copy')
        return self.b(self.norm(self.a(x)))


def test_an_error_of_the_dense_model_freezes_nothing_and_is_said() -> None:
    found = comb(randomise_(RunsOnce()), picture())
    assert [group.name for group in found.groups] == ['a']
    assert found.untried == 'a copy of the dense model fails as well (RuntimeError: this is a copy)'
    assert 'not tried out: a copy of the dense model fails as well' in str(found)


class NoGradient(nn.Module):
    """A function whose backward raises, in the dense model too."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:  # type: ignore[override]
            raise NotImplementedError('only for inference')

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.Function.apply(self.norm(self.a(x))))


def test_a_backward_that_the_dense_model_has_not_freezes_nothing() -> None:
    found = comb(randomise_(NoGradient()), picture())
    assert [group.name for group in found.groups] == ['a']
    assert not found.untried


def test_on_the_meta_device_no_trial_is_held_and_that_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(1, 8), nn.Conv2d(8, 5, 1)).to('meta')
    found = comb(model, torch.empty(2, 3, 8, 8, device='meta'))
    assert [group.name for group in found.groups] == ['0']
    assert 'not tried out: tensors on the meta device have no values' in str(found)


def test_a_traced_module_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        model[0] = torch.jit.trace(model[0], torch.rand(1, 3, 8, 8))
    with pytest.raises(CombError, match=r'0 is compiled by torch\.jit, and cannot be observed'):
        comb(model, torch.rand(1, 3, 8, 8))
