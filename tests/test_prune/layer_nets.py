"""Nets with gates for every way in which layers are called: by parts, twice, computed, transposed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from tests.test_prune.gate_nets import gated


class Narrowed(nn.Module):
    """A shuffle behind grouped convolutions: the same channel of each group goes, and is read inside the groups."""

    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 4, 'g1': 2, 'g2': 4}

    def __init__(self):
        super().__init__()
        self.conv, self.g1 = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, groups=2)
        self.g2, self.out = nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 4, 1)

    def forward(self, x, gates):
        wide = {name: gate.repeat_interleave(2 if name == 'g1' else 1, -1) for name, gate in gates.items()}
        wide = {name: torch.cat([gate, gate], -1) for name, gate in wide.items()}
        x = self.g1(gated(self.conv(x).relu(), wide, 'conv')).relu()
        x = gated(x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2), wide, 'g1')
        return self.out(gated(self.g2(x).relu(), wide, 'g2')).mean((2, 3))


class Functional(nn.Module):
    """Halves of a weight in functions, one convolution called twice, and padding in its own forward."""

    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'a': 6, 'b': 3}

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3)
        self.twice, self.fc = nn.Conv2d(6, 6, 3), nn.Linear(6, 4)

    def forward(self, x, gates):
        gates = {name: gate.repeat(*[1] * (gate.dim() - 1), 2) if name == 'b' else gate for name, gate in gates.items()}
        x = gated(self.a(x).relu(), gates, 'a')
        top, bottom = self.b.weight.chunk(2)
        first, second = self.b.bias.chunk(2)
        x = torch.cat([F.conv2d(x, top, first, padding=1), F.conv2d(F.pad(x, (1, 1, 1, 1)), bottom, second)], 1)
        for _ in range(2):
            x = F.conv2d(F.pad(gated(x.tanh(), gates, 'b'), (1, 1, 1, 1)), self.twice.weight)
        return F.linear(gated(x.mean((2, 3)), gates, 'b'), self.fc.weight)


class Transposed(nn.Module):
    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'conv': 6, 'up': 5}

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.out = nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.Conv2d(5, 4, 1)

    def forward(self, x, gates):
        x = self.up(gated(self.conv(x).relu(), gates, 'conv'))
        return self.out(gated(x.tanh(), gates, 'up')).mean((2, 3))


class Computed(nn.Module):
    """Weights that the forward computes: standardised, scaled by a parameter, scaled by a number."""

    inputs = (5, 3, 6, 6)
    sites: ClassVar = {'a': 6, 'b': 5}

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 1, bias=False)
        self.gain = nn.Parameter(torch.rand(5, 1, 1, 1) + 0.5)

    def forward(self, x, gates):
        x = gated(self.a(x).relu(), gates, 'a')
        x = gated(F.conv2d(x, self.b.weight * self.gain).tanh(), gates, 'b')
        return F.conv2d(x, self.c.weight * 0.5).mean((2, 3))


class TokensFirst(nn.Module):
    """Tokens (L, N, C), and the samples as the inner part of (L * N, C)."""

    inputs = (5, 7, 3)
    sites: ClassVar = {'a': 6, 'b': 5}

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x, gates):
        x = gated(self.a(x).relu(), gates, 'a', -1).transpose(0, 1)  # (L, N, C)
        tokens, samples = x.shape[:2]
        x = self.b(x).tanh().transpose(0, 1)
        x = gated(x, gates, 'b', -1).transpose(0, 1).reshape(tokens * samples, -1)
        return self.c(x).unflatten(0, (tokens, samples)).mean(0)


class Torchs(nn.Module):
    """torch's own attention; its gates are put on queries and on what the values became."""

    inputs = (5, 7, 6)
    sites: ClassVar = {'embed': 8, 'attention.in_proj': 4, 'attention.out_proj': 8}

    def __init__(self):
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(6, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 4)
        nn.init.normal_(self.attention.in_proj_bias)

    def forward(self, x, gates):
        x = gated(self.embed(x), gates, 'embed', -1).transpose(0, 1)  # (L, N, C)
        if gates:
            x = self.explicit(x.transpose(0, 1), gates).transpose(0, 1)
        else:
            x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(gated(x.transpose(0, 1), gates, 'attention.out_proj', -1)).mean(1)

    def explicit(self, x, gates):
        q, k, v = F.linear(x, self.attention.in_proj_weight, self.attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        x = ((gated(q, gates, 'attention.in_proj', -1) / 2) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.attention.out_proj(gated(x, gates, 'attention.in_proj', -1).transpose(1, 2).flatten(2))


class KeysFirst(nn.Module):
    """Keys and queries are rows of one weight, in two calls; the gate is on the queries, the later rows."""

    inputs = (5, 7, 3)
    sites: ClassVar = {'both': 6, 'v': 5}

    def __init__(self):
        super().__init__()
        self.both, self.v, self.proj = nn.Linear(3, 12), nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x, gates):
        (key, query), (key_bias, query_bias) = self.both.weight.chunk(2), self.both.bias.chunk(2)
        k, q = F.linear(x, key, key_bias), gated(F.linear(x, query, query_bias), gates, 'both', -1)
        return self.proj((q @ k.transpose(-2, -1)).softmax(-1) @ gated(self.v(x), gates, 'v', -1)).mean(1)


LAYERS = [Narrowed, Functional, KeysFirst, Transposed, Computed, TokensFirst, Torchs]
