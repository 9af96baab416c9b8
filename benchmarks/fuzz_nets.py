"""Random nets of blocks, by a plan that can be drawn, kept and made shorter; `benchmarks/fuzz.py` examines them."""

from __future__ import annotations

from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fuzz_blocks import (
    Block,
    Branches,
    Conv,
    Cube,
    Deformed,
    Excite,
    Glu,
    Halves,
    Means,
    OwnBackward,
    Padded,
    Parametrized,
    Pixels,
    Pooled,
    Recomputed,
    Regions,
    Residual,
    Shape,
    Shuffle,
    Standardised,
    Sum,
    Twice,
    Up,
    width,
)
from benchmarks.fuzz_tokens import (
    Along,
    Encoder,
    Mlp,
    Multihead,
    Packed,
    Picked,
    Positions,
    Recurrent,
    Scattered,
    Separate,
    Unflattened,
)


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
