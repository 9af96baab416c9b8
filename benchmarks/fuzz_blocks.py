"""Blocks of maps for random nets, written as people write them; `fuzz_nets.py` puts them together.

A block is made for the shape of what goes in, without the batch: maps are (C, H, W), tokens (L, C), vectors (C,). All
widths come from one random generator, and many are odd. What a block computes does not have to make sense.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import deform_conv2d, roi_align

Shape = tuple[int, ...]
ACTS: list[Callable[[], nn.Module]] = [
    nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.Mish, nn.LeakyReLU, nn.Tanh, nn.Softplus, nn.Identity,
]  # fmt: skip


def width(rng: Random) -> int:
    return rng.choice([4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16])


def norm(rng: Random, c: int) -> nn.Module:
    divisors = [g for g in (1, 2, 3, 4) if c % g == 0 and c // g > 1]
    return rng.choice([nn.BatchNorm2d(c), nn.BatchNorm2d(c), nn.GroupNorm(rng.choice(divisors or [1]), c),
                       nn.InstanceNorm2d(c, affine=True), nn.Identity()])  # fmt: skip


class Block(nn.Module):
    """A part of a net; `dims` is how many dimensions go in, without the batch."""

    dims = 3

    def __init__(self, rng: Random, shape: Shape) -> None:
        super().__init__()
        self.act = rng.choice(ACTS)()
        self.build(rng, *shape)

    def build(self, rng: Random, *shape: int) -> None:
        raise NotImplementedError

    def __call__(self, *args: Any) -> Tensor:
        return super().__call__(*args)


class Conv(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        kernel = rng.choice([1, 3])
        groups = rng.choice([1, 1, *(g for g in (2, 3, c) if c % g == 0)])
        out = groups * rng.choice([1, 2, 3]) if groups > 1 else width(rng)
        dilation = rng.choice([1, 2]) if kernel == 3 else 1
        stride = rng.choice([1, 1, 2]) if min(h, w) >= 6 else 1
        self.conv = nn.Conv2d(c, out, kernel, stride, dilation * (kernel // 2), dilation, groups, rng.random() < 0.5)
        self.norm = norm(rng, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Padded(Block):
    """Pads in its own forward and calls the function with weights of its own."""

    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.weight, self.bias = nn.Parameter(torch.rand(width(rng), c, 3, 3)), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.conv2d(F.pad(x, (2, 0, 1, 1)), self.weight)) + self.bias


class Up(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv, self.size = nn.ConvTranspose2d(c, width(rng), 2, 2), (h, w)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.act(self.conv(x)), self.size, mode='bilinear')


class Residual(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        inner = width(rng)
        self.one, self.two = nn.Conv2d(c, inner, 3, padding=1), nn.Conv2d(inner, c, 1)
        self.norm, self.scale = norm(rng, inner), nn.Parameter(torch.rand(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.two(self.act(self.norm(self.one(x))))


class Branches(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.parts = nn.ModuleList(nn.Conv2d(c, width(rng), k, padding=k // 2) for k in (1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(self.act(part(x)) for part in self.parts)], dim=1)


class Halves(Block):
    """One half gates the other."""

    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv = nn.Conv2d(c, 2 * width(rng), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        a, b = x.chunk(2, dim=1) if self.training else x.split(x.shape[1] // 2, dim=1)
        return self.act(a) * b.sigmoid()


class Glu(Halves):
    def forward(self, x: Tensor) -> Tensor:
        return F.glu(self.act(self.conv(x)), dim=1)


class Shuffle(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.groups, self.conv = rng.choice([2, 3]), nn.Conv2d(c, 6 * rng.choice([1, 2]), 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, h, w = x.shape
        return self.act(x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w))


class Pixels(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv, self.after = nn.Conv2d(c, 4 * width(rng), 1), rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(F.pixel_shuffle(self.act(self.conv(x)), 2), 2)
        return F.interpolate(F.pixel_unshuffle(x, 2), scale_factor=2.0) if self.after and x.shape[-1] % 2 == 0 else x


class Excite(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.down = nn.Linear(c, width(rng))
        self.up = nn.Linear(self.down.out_features, c)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.act(self.down(x.mean((2, 3))))).sigmoid()[:, :, None, None]


class Pooled(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.way = rng.choice([
            nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1), nn.AdaptiveMaxPool2d((h, w)), nn.LPPool2d(2, 1),
            nn.UpsamplingNearest2d((h, w)), nn.Dropout2d(0.3), nn.PReLU(c), nn.LocalResponseNorm(1),
        ])  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x)


class Twice(Block):
    """One layer is called twice, under two names."""

    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv = nn.Conv2d(c, c, 3, padding=1)
        self.again, self.norm = self.conv, nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.act(self.norm(self.conv(x))))


class Sum(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.weight = nn.Parameter(torch.rand(width(rng), c))
        self.register_buffer('gains', torch.rand(c, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum('nchw,dc->ndhw', self.act(x * self.gains), self.weight)


class Standardised(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv = nn.Conv2d(c, width(rng), 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        weight = (weight - weight.mean((1, 2, 3), keepdim=True)) / (weight.var((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        return self.act(F.conv2d(x, weight, self.conv.bias, padding=1))


class Parametrized(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        way = rng.choice([parametrizations.spectral_norm, parametrizations.weight_norm])
        self.conv = way(nn.Conv2d(c, width(rng), 1))
        self.norm = norm(rng, self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Recomputed(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv, self.norm = nn.Conv2d(c, c, 1), nn.GroupNorm(1, c)

    def _inner(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self._inner, x, use_reentrant=False) + x


class _OwnNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        y = (x - mean) / (var + 1e-5).sqrt()
        ctx.save_for_backward(y, var, weight)
        return weight[None, :, None, None] * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, var, weight = ctx.saved_tensors
        g = grad * weight[None, :, None, None]
        inner = g - y * (g * y).mean(1, keepdim=True) - g.mean(1, keepdim=True)
        return inner / (var + 1e-5).sqrt(), (grad * y).sum((0, 2, 3))


class OwnBackward(Block):
    """A layer norm over channels with a backward of its own, as restoration nets have it."""

    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.weight, self.conv = nn.Parameter(torch.rand(c)), nn.Conv2d(c, width(rng), 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(_OwnNorm.apply(x, self.weight)))


class Regions(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv, self.size = nn.Conv2d(c, width(rng), 1), min(h, w)

    def forward(self, x: Tensor) -> Tensor:
        boxes = torch.tensor([[float(i), 0.0, 0.0, 3.0, 4.0] for i in range(len(x))]).to(x)
        return self.act(roi_align(self.conv(x), boxes, self.size))


class Deformed(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.offsets, self.weight = nn.Conv2d(c, 18, 1), nn.Parameter(torch.rand(width(rng), c, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(deform_conv2d(x, self.offsets(x).tanh(), self.weight, padding=1))


class Cube(Block):
    """Two frames through a 3-d convolution."""

    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv = nn.Conv3d(c, width(rng), (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(torch.stack([x, x.flip(-1)], dim=2))[:, :, 0])


class Means(Block):
    """Subtracts statistics over channels, written by hand."""

    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.conv, self.axis = nn.Conv2d(c, width(rng), 1), rng.choice([1, (1, 2, 3), (2, 3)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(x))
        return (x - 0.7 * x.mean(self.axis, keepdim=True)) / (x.pow(2).mean(self.axis, keepdim=True) + 1).sqrt()
