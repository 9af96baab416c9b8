"""Blocks of tokens for random nets: attention, recurrence, choice; see `fuzz_blocks.py`."""

from __future__ import annotations

import math
from random import Random

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.fuzz_blocks import Block, width


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
