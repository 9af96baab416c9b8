"""Blocks for random nets, written as people write them; `benchmarks/fuzz.py` puts them together.

A block is made for the shape of what goes in, without the batch: maps are (C, H, W), tokens (L, C), vectors (C,). All
widths come from one random generator, and many are odd. What a block computes does not have to make sense.
"""

from __future__ import annotations

import math
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


# -- maps --------------------------------------------------------------------------------------------------------------
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
        self.weight, self.gains = nn.Parameter(torch.rand(width(rng), c)), nn.Buffer(torch.rand(c, 1, 1))

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
        return (x - x.mean(self.axis, keepdim=True)) / (x.pow(2).mean(self.axis, keepdim=True) + 1).sqrt()


# -- tokens ------------------------------------------------------------------------------------------------------------
class Mlp(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        inner = width(rng)
        self.norm = rng.choice([nn.LayerNorm(c), nn.RMSNorm(c), nn.Identity()])
        self.one, self.two = nn.Linear(c, inner), nn.Linear(inner, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(self.act(self.one(self.norm(x))))


class Packed(Block):
    """Attention as timm writes it, with options."""

    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.heads, self.dim = rng.choice([1, 2, 3]), rng.choice([3, 4, 6])
        self.qkv = nn.Linear(c, 3 * self.heads * self.dim, bias=rng.random() < 0.5)
        self.proj = nn.Linear(self.heads * self.dim, c)
        self.way = rng.choice(['written', 'function', 'pooled', 'rotary', 'table', 'prefix', 'constant', 'norm'])
        self.table = nn.Parameter(torch.rand(self.heads, length, length))
        self.prefix = nn.Parameter(torch.rand(1, self.heads, 1, self.dim))
        self.norm = nn.LayerNorm(self.dim)

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scale = q.shape[-1] ** -0.5
        if self.way == 'function':
            return x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, -1))
        if self.way == 'pooled':
            q = q.mean(2, keepdim=True).expand(-1, -1, N, -1)
        if self.way == 'rotary':
            angles = torch.arange(N, device=x.device, dtype=x.dtype)[:, None]
            q, k = (t * angles.cos() + torch.cat([-t[..., 1:], t[..., :1]], -1) * angles.sin() for t in (q, k))
        if self.way == 'norm':
            q, k = self.norm(q), self.norm(k)
        if self.way == 'prefix':
            k, v = (torch.cat([self.prefix.expand(B, -1, -1, -1), t], dim=2) for t in (k, v))
        if self.way == 'constant':
            scale = 0.3
        attn = (q * scale) @ k.transpose(-2, -1)
        if self.way == 'table':
            attn = attn + self.table
        return x + self.proj((attn.softmax(-1) @ v).transpose(1, 2).reshape(B, N, -1))


class Separate(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.num_heads, dim = 2, rng.choice([6, 8, 10])
        self.q, self.k, self.v = nn.Linear(c, dim), nn.Linear(c, dim), nn.Linear(c, dim)
        self.out, self.masked = nn.Linear(dim, c), rng.random() < 0.5

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.num_heads, x.shape[2] // self.num_heads).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        scores = q @ k.mT / math.sqrt(q.size(-1))
        if self.masked:
            mask = torch.ones(x.shape[1], x.shape[1], device=x.device).triu(1).bool()
            scores = scores.masked_fill(mask, float('-inf'))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Multihead(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        dim, other = rng.choice([6, 8, 12]), width(rng)
        self.q, self.kv = nn.Linear(c, dim), nn.Linear(c, other)
        self.attention = nn.MultiheadAttention(
            dim, 2, kdim=other, vdim=other, batch_first=True, add_bias_kv=rng.random() < 0.3
        )

    def forward(self, x: Tensor) -> Tensor:
        kv = self.act(self.kv(x))
        return self.attention(self.q(x), kv, kv, need_weights=False)[0]


class Encoder(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.inner = nn.Linear(c, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, width(rng), batch_first=True, norm_first=rng.random() < 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x))


class Recurrent(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        kind = rng.choice([nn.LSTM, nn.GRU])
        self.rnn = kind(c, width(rng), batch_first=True, bidirectional=rng.random() < 0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.rnn(x)[0])


class Along(Block):
    """A 1-d convolution along the tokens."""

    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.conv = nn.Conv1d(c, width(rng), 3, padding=1)
        self.norm = nn.BatchNorm1d(self.conv.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x.transpose(1, 2)))).permute(0, 2, 1)


class Picked(Block):
    """Keeps the tokens with the largest score."""

    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.inner, self.score, self.k = nn.Linear(c, width(rng)), nn.Linear(c, 1), max(2, length - 1)

    def forward(self, x: Tensor) -> Tensor:
        index = self.score(x).squeeze(-1).topk(self.k, dim=1).indices
        y = self.act(self.inner(x))
        return y.gather(1, index[..., None].expand(-1, -1, y.shape[-1]))


class Positions(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.table, self.token = nn.Embedding(length, c), nn.Parameter(torch.rand(1, 1, c))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.arange(x.shape[1], device=x.device))
        return torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)


class Unflattened(Block):
    """Groups of channels, each scaled by its own softmax."""

    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.inner, self.gate = nn.Linear(c, 3 * rng.choice([2, 4, 5])), nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).unflatten(-1, (3, self.inner.out_features // 3))
        return (y * self.gate(x).softmax(-1)[..., None]).flatten(2)


class Scattered(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.inner = nn.Linear(c, width(rng))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.inner(x))
        index = torch.arange(x.shape[1], device=x.device).flip(0)[None, :, None].expand_as(y)
        return torch.zeros_like(y).scatter_add(1, index, y)


# -- vectors, and from one kind to another -----------------------------------------------------------------------------
class Dense(Block):
    dims = 1

    def build(self, rng: Random, c: int) -> None:
        self.fc = nn.Linear(c, width(rng))
        self.norm = rng.choice([nn.BatchNorm1d, nn.LayerNorm, nn.Identity])(self.fc.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.fc(x)))


class Tied(Block):
    dims = 1

    def build(self, rng: Random, c: int) -> None:
        self.fc = nn.Linear(c, width(rng), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.act(self.fc(x)), self.fc.weight.t())


class Experts(Block):
    dims = 1

    def build(self, rng: Random, c: int) -> None:
        out = width(rng)
        self.parts, self.gate = nn.ModuleList(nn.Linear(c, out) for _ in range(3)), nn.Linear(c, 3)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        return torch.stack([part(x) * gates[:, i : i + 1] for i, part in enumerate(self.parts)]).sum(0)


class ToTokens(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.norm = rng.choice([nn.LayerNorm(c), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(2).transpose(1, 2))


class ToMap(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.height = max(h for h in (1, 2, 3, 4, 5, 6) if length % h == 0)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        return x.permute(0, 2, 1).reshape(n, c, self.height, length // self.height)


class MapMean(Block):
    def build(self, rng: Random, c: int, h: int, w: int) -> None:
        self.flat = rng.random() < 0.3

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.flat else F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)


class TokenMean(Block):
    dims = 2

    def build(self, rng: Random, length: int, c: int) -> None:
        self.first = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.first else x.mean(1)


BLOCKS: dict[str, type[Block]] = {
    kind.__name__: kind
    for kind in (
        Conv, Padded, Up, Residual, Branches, Halves, Glu, Shuffle, Pixels, Excite, Pooled, Twice, Sum, Standardised,
        Parametrized, Recomputed, OwnBackward, Regions, Deformed, Cube, Means, Mlp, Packed, Separate, Multihead,
        Encoder, Recurrent, Along, Picked, Positions, Unflattened, Scattered, Dense, Tied, Experts, ToTokens, ToMap,
        MapMean, TokenMean,
    )
}  # fmt: skip


class Net(nn.Module):
    """Blocks in a row, made one by one for what the ones before them give, and a classifier."""

    def __init__(self, plan: list[tuple[str, int]], shape: Shape = (3, 8, 8)) -> None:
        super().__init__()
        blocks: list[Block] = []
        x = torch.rand(2, *shape)
        for name, seed in plan:
            if BLOCKS[name].dims == x.dim() - 1:
                blocks.append(BLOCKS[name](Random(seed), tuple(x.shape[1:])).eval())
                with torch.no_grad():
                    x = blocks[-1](x)
        self.blocks, self.fc = nn.Sequential(*blocks), nn.Linear(x.shape[2] if x.dim() == 3 else x.shape[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return self.fc(x.mean((2, 3)) if x.dim() == 4 else x.mean(1) if x.dim() == 3 else x)


def plan_of(seed: int, length: int, names: list[str] | None = None) -> list[tuple[str, int]]:
    """Draw blocks that follow one another: each takes what the one before it gives; half of the nets are of tokens."""
    rng, plan, dims = Random(seed), [('Conv', seed)], 3
    after = {'ToTokens': 2, 'ToMap': 3, 'MapMean': 1, 'TokenMean': 1}
    for number in range(length):
        fit = [n for n, kind in BLOCKS.items() if kind.dims == dims and (names is None or n in (*names, *after))]
        early = [name for name in fit if number > length // 2 or not name.endswith('Mean')]
        name = 'ToTokens' if number == 0 and rng.random() < 0.5 else rng.choice(early or fit)
        plan.append((name, rng.randrange(2**31)))
        dims = after.get(name, dims)
    return plan
