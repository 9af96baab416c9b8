"""Nets whose sizes can only follow by a number in their source: what other processes import."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Divides the embedding's width by the heads, as many vision transformers do."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(B, N, C))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        self.blocks = nn.Sequential(Attention(16, 2), Attention(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x)).mean(1))


class Written(nn.Module):
    """Says its sizes in figures."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 12, 3), nn.Linear(12 * 4, 5)
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.conv(x).relu(), 2)
        return self.out(self.fc(x.view(-1, 12, 4).transpose(1, 2).reshape(-1, 4, 12).transpose(1, 2).flatten(1)))


class OwnReduce(Written):
    """Pickles itself in its own way."""

    def __reduce__(self) -> tuple[Any, ...]:
        return OwnReduce, (), self.state()

    def state(self) -> dict[str, Any]:
        return dict(vars(self))


class Slotted(Written):
    """Has a state of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), 'packed': True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert state.pop('packed')
        vars(self).update(state)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    'transformer': lambda: (Transformer().double().eval(), torch.randn(2, 5, 6, dtype=torch.float64)),
    'written': lambda: (Written().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)),
    'own reduce': lambda: (OwnReduce().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)),
    'own state': lambda: (Slotted().double().eval(), torch.randn(2, 3, 8, 8, dtype=torch.float64)),
}


def spread(q: Tensor) -> Tensor:
    """Another function than its namesake in a subclass's file."""
    return q * 2


class Spreading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.queries, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def other(self, x: Tensor) -> Tensor:
        return spread(x)
