"""Attentions of every kind that can be rotated: products, projections, and both."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.slim.compare import evaluating
from tests.helpers import randomise_

HEADS, WIDTH, DIM = 3, 4, 10
SCALE = WIDTH**-0.5


# -- products of queries, keys and values, (B, heads, N, width) each ---------------------------------------------------
def plain(q, k, v):
    return (q @ k.transpose(-2, -1) * SCALE).softmax(-1) @ v


def scaled_query(q, k, v):
    return ((q * SCALE) @ k.mT).sigmoid() @ v


def einsum(q, k, v):
    scores = torch.einsum('bhnd,bhmd->bhnm', q / 2, k).softmax(-1)
    return torch.einsum('bhnm,bhmd->bhnd', scores, v)


def bmm(q, k, v):
    shape, (q, k, v) = q.shape, (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(shape)


def baddbmm(q, k, v):
    shape, (q, k, v) = q.shape, (t.flatten(0, 1) for t in (q, k, v))
    bias = torch.arange(q.shape[1], dtype=q.dtype).expand(len(q), q.shape[1], -1)
    return torch.baddbmm(bias, q, k.mT, alpha=SCALE).softmax(-1).bmm(v).view(shape)


def fused(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def unfused(q, k, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


def channels_first(q, k, v):
    scores = (q @ k.mT * SCALE).softmax(-1)
    return (v.transpose(-2, -1) @ scores.transpose(-2, -1)).permute(0, 1, 3, 2)


def talking(q, k, v):
    mixed = torch.tensor([[1.0, 0.5, 0], [0, 1, 0.3], [0.2, 0, 1]], dtype=q.dtype)
    return torch.einsum('hg,bgnm->bhnm', mixed, (q @ k.mT).softmax(-1)) @ v


def with_temperature(q, k, v):
    return (q * torch.tensor([0.5, 1, 2], dtype=q.dtype)[:, None, None] @ k.mT).softmax(-1) @ v


def padded_keys(q, k, v):
    k, v = (F.pad(t, (0, 0, 0, 2)) for t in (k, v))
    return (q @ k.mT).softmax(-1) @ v


def windows(q, k, v):
    q, k, v = (t.roll(1, -2).unflatten(-2, (2, 3)).transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = plain(q, k, v).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)
    return out.roll(-1, -2)


ATTENDS = (
    plain, scaled_query, einsum, bmm, baddbmm, fused, unfused, channels_first, talking, with_temperature, padded_keys,
    windows,
)  # fmt: skip


class Attention(nn.Module):
    """Multiply queries, keys and values that are made in one of several ways."""

    def __init__(self, attend=plain, dim=DIM, heads=HEADS, width=WIDTH, bias=(True, True, True)):
        super().__init__()
        self.attend, self.heads, self.width = attend, heads, width
        self.q, self.k, self.v = (nn.Linear(dim, heads * width, bias=b) for b in bias)
        self.proj = nn.Linear(heads * width, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def project(self, x: Tensor) -> list[Tensor]:
        """(B, N, C) -> three of (B, heads, N, width)."""
        return [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)]

    def forward(self, x: Tensor) -> Tensor:
        out = self.attend(*self.project(x))
        return x + self.gamma * self.proj(out.transpose(1, 2).flatten(2))


class Packed(Attention):
    def __init__(self, **options):
        super().__init__(**options)
        self.qkv = nn.Linear(DIM, 3 * HEADS * WIDTH)
        del self.q, self.k, self.v

    def project(self, x):
        return list(self.qkv(x).reshape(*x.shape[:2], 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4))


class WidthFirst(Packed):
    def project(self, x):  # channels as (width, heads, 3)
        return list(self.qkv(x).reshape(*x.shape[:2], WIDTH, HEADS, 3).permute(4, 0, 3, 1, 2).unbind())


class QueryAndPacked(Attention):
    def __init__(self, **options):
        super().__init__(**options)
        self.kv = nn.Linear(DIM, 2 * HEADS * WIDTH)
        del self.k, self.v

    def project(self, x):
        parts = (self.q(x), *self.kv(x).chunk(2, -1))
        return [part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in parts]


class ZeroKeyBias(Packed):
    """As BEiT: the bias is put together in the forward, that of the keys is zero."""

    def __init__(self, **options):
        super().__init__(**options)
        self.qkv.bias = None
        self.q_bias, self.v_bias = (nn.Parameter(torch.ones(HEADS * WIDTH)) for _ in range(2))

    def project(self, x):
        bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
        parts = F.linear(x, self.qkv.weight, bias).chunk(3, -1)
        return [part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in parts]


class Convolutions(Attention):
    """1x1 (and k x k) convolutions as projections, tokens (B, C, 2, 3)."""

    def __init__(self, **options):
        super().__init__(**options)
        self.q, self.k = nn.Conv2d(DIM, HEADS * WIDTH, 1), nn.Conv2d(DIM, HEADS * WIDTH, 3, padding=1)
        self.v, self.proj = nn.Conv2d(DIM, HEADS * WIDTH, 1), nn.Conv2d(HEADS * WIDTH, DIM, 3, padding=1)

    def forward(self, x):
        x = x.mT.unflatten(-1, (2, 3))
        parts = [layer(x).flatten(2).unflatten(1, (HEADS, WIDTH)).mT for layer in (self.q, self.k, self.v)]
        return self.proj(self.attend(*parts).mT.reshape(len(x), -1, 2, 3))


class Reduced(Attention):
    """A convolution reduces tokens before the keys and values are made."""

    def __init__(self, **options):
        super().__init__(**options)
        self.sr = nn.Conv1d(DIM, DIM, 2, stride=2)

    def project(self, x):
        small = self.sr(x.mT).mT
        parts = (self.q(x), self.k(small), self.v(small))
        return [part.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for part in parts]


class Called(nn.Module):
    """The same attention twice."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return self.attention(self.attention(x))


class Torch(nn.Module):
    def __init__(self, cross=False, **options):
        super().__init__()
        other = dict(kdim=7, vdim=5) if cross else {}
        self.attention = nn.MultiheadAttention(HEADS * WIDTH, HEADS, batch_first=True, **other)
        self.into, self.key, self.value = nn.Linear(DIM, HEADS * WIDTH), nn.Linear(DIM, 7), nn.Linear(DIM, 5)
        self.cross, self.options = cross, options

    def forward(self, x):
        x, key, value = self.into(x), self.key(x), self.value(x)
        return self.attention(x, *((key, value) if self.cross else (x, x)), **self.options)[0]


KINDS = {
    **{attend.__name__: (lambda attend=attend: Attention(attend)) for attend in ATTENDS},
    'packed': Packed, 'packed, fused': lambda: Packed(attend=fused), 'width first': WidthFirst,
    'query and packed': QueryAndPacked, 'zero key bias': ZeroKeyBias, 'convolutions': Convolutions,
    'reduced': Reduced, 'called twice': Called, 'torch': Torch, 'torch, weights not needed':
    lambda: Torch(need_weights=False), 'torch, cross': lambda: Torch(cross=True),
    'torch, cross, weights not needed': lambda: Torch(cross=True, need_weights=False),
    'no bias': lambda: Attention(bias=(False, False, False)),
    'a bias of queries': lambda: Attention(bias=(True, False, False)),
    'a bias of keys': lambda: Attention(bias=(False, True, True)),
    'wider than its input': lambda: Attention(dim=2),
    'encoder': lambda: nn.TransformerEncoderLayer(12, HEADS, 16, batch_first=True),
}  # fmt: skip
INPUTS = {'wider than its input': 2, 'encoder': 12}


def tokens(width: int = DIM) -> Tensor:
    return torch.rand(2, 6, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def built(build) -> nn.Module:
    torch.manual_seed(0)
    return randomise_(build()).double().eval()


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    with evaluating(model):
        return model(x)
