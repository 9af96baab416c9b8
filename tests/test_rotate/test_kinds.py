"""Every kind of attention that can be rotated is, exactly; every kind that cannot is left alone, with the reason."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.rotate import HeadKind, rotate_
from mmcpd.slim.compare import difference, evaluating

from ..helpers import randomise_

HEADS, WIDTH, DIM = 3, 4, 10
BOTH = {HeadKind.QUERY_KEY: HEADS, HeadKind.VALUE_PROJECTION: HEADS}
SCALE = WIDTH**-0.5


# -- how queries, keys and values are multiplied, (B, heads, N, width) each ----------------------------------------------
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


@pytest.mark.parametrize('kind', KINDS)
def test_the_function_stays_and_every_head_is_rotated(kind):
    model, x = built(KINDS[kind]), tokens(INPUTS.get(kind, DIM))
    dense, out = copy.deepcopy(model), run(model, x)
    done = rotate_(model, x)
    assert {kind: sum(r.heads for r in done.rotated if r.kind is kind) for kind in HeadKind} == BOTH, str(done)
    assert not done.skipped
    assert {r.width for r in done.rotated} == {WIDTH}
    assert difference(out, run(model, x)) < 1e-10
    # the control: with one of the two sides as it was, the function is another
    for part in done.rotated:
        half = copy.deepcopy(model)
        name = part.layers[-1]
        rows = slice(None) if len(part.layers) > 1 else slice(0, HEADS * WIDTH)
        with torch.no_grad():
            half.get_parameter(name)[rows] = dense.get_parameter(name)[rows]
        assert difference(out, run(half, x)) > 1e-6, part


# -- left alone --------------------------------------------------------------------------------------------------------
class Table(Attention):
    def project(self, x):
        q, k, v = super().project(x)
        return [q + torch.linspace(0, 1, q.numel()).view_as(q).to(q), k, v]


class Rotary(Attention):
    def project(self, x):
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1, 0.1], dtype=x.dtype)
        q, k, v = super().project(x)
        return [*(self.turned(t, angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)) for t in (q, k)), v]

    def turned(self, x, cos, sin):
        left, right = x.chunk(2, -1)
        return x * cos + torch.cat([-right, left], -1) * sin


class Normed(Attention):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)

    def project(self, x):
        q, k, v = super().project(x)
        return [self.norm(q), self.norm(k), v]


class Cosine(Attention):
    def project(self, x):
        q, k, v = super().project(x)
        return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]


class Gated(Attention):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def project(self, x):
        q, k, v = super().project(x)
        return [q * self.scale, k, v]


class RelativePositions(Attention):
    """A second product reads the queries."""

    def project(self, x):
        self.positions = torch.linspace(-1, 1, WIDTH * 6, dtype=x.dtype).view(WIDTH, 6)
        return super().project(x)

    def forward(self, x):
        q, k, v = self.project(x)
        out = (q @ k.mT + q @ self.positions).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


class Pooled(Attention):
    def project(self, x):
        q, k, v = super().project(x)
        return [q, *(F.avg_pool2d(t, (2, 1)) for t in (k, v))]


class Convolved(Attention):
    """A depthwise convolution is added to the values that were mixed (as in CSWin)."""

    def __init__(self):
        super().__init__()
        self.local = nn.Conv1d(HEADS * WIDTH, HEADS * WIDTH, 3, padding=1, groups=HEADS * WIDTH)

    def forward(self, x):
        q, k, v = self.project(x)
        near = self.local(v.transpose(1, 2).flatten(2).mT).mT
        return self.proj(plain(q, k, v).transpose(1, 2).flatten(2) + near)


class BatchNormed(Convolutions):
    def __init__(self):
        super().__init__()
        self.v = nn.Sequential(self.v, nn.BatchNorm2d(HEADS * WIDTH))


class Activated(Attention):
    """Linear attention: only the values stay as their layer makes them."""

    def forward(self, x):
        q, k, v = self.project(x)
        out = q.relu() @ (k.relu().mT @ v)
        return self.proj(out.transpose(1, 2).flatten(2))


class ActivatedProjection(Attention):
    def forward(self, x):
        return self.proj(plain(*self.project(x)).transpose(1, 2).flatten(2).relu())


class Channels(Attention):
    """Scores between channels (XCiT): the product sums over tokens."""

    def forward(self, x):
        q, k, v = self.project(x)
        return self.proj((v @ (q.mT @ k).softmax(-1)).transpose(1, 2).flatten(2))


class Grouped(Attention):
    """Three heads of queries share the keys and values of one."""

    def __init__(self):
        super().__init__()
        self.k, self.v = nn.Linear(DIM, WIDTH), nn.Linear(DIM, WIDTH)

    def project(self, x):
        q = self.q(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return [q, self.k(x)[:, None], self.v(x)[:, None]]

    def forward(self, x):
        out = F.scaled_dot_product_attention(*self.project(x), enable_gqa=True)
        return self.proj(out.transpose(1, 2).flatten(2))


class SharedKeys(nn.Module):
    """Two attentions with one weight for their keys."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Attention(), Attention()
        self.second.k.weight = self.first.k.weight

    def forward(self, x):
        return self.second(self.first(x))


class Returned(Attention):
    def forward(self, x):
        q, k, v = self.project(x)
        return self.proj(plain(q, k, v).transpose(1, 2).flatten(2)), v


class Computed(Attention):
    def __init__(self):
        super().__init__()
        self.q = nn.utils.parametrizations.weight_norm(self.q)


class Memory(Attention):
    """Learned keys and values stand beside those of the tokens."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Parameter(torch.ones(HEADS, 2, WIDTH))

    def project(self, x):
        q, k, v = super().project(x)
        more = self.memory.expand(len(x), -1, -1, -1)
        return [q, torch.cat([k, more], 2), torch.cat([v, more], 2)]


QK, VP = HeadKind.QUERY_KEY, HeadKind.VALUE_PROJECTION
ALONE = {
    Table: {QK: 'a sum'}, Rotary: {QK: 'a factor for each channel or position (rotary embeddings, a gate)'},
    Normed: {QK: 'a norm in norm'}, Cosine: {QK: 'a norm'}, Gated: {QK: 'a factor for each channel'},
    RelativePositions: {QK: 'it is multiplied with a tensor that no layer makes'},
    Pooled: {QK: 'pooling', VP: 'pooling'}, Convolved: {VP: 'a grouped convolution in local'},
    BatchNormed: {VP: 'a norm in v.1'}, Activated: {QK: None}, ActivatedProjection: {VP: 'the operation relu'},
    Channels: {QK: 'their product sums over tokens', VP: None}, Grouped: {QK: 'it is used twice', VP: 'it is used twice'},
    SharedKeys: {QK: 'it is used twice'}, Returned: {VP: 'it is an output of the model'},
    Computed: {QK: 'a computed weight'}, Memory: {QK: 'a concatenation', VP: 'a concatenation'},
}  # fmt: skip


@pytest.mark.parametrize('build', ALONE)
def test_what_forbids_it_is_left_alone_and_the_rest_is_rotated(build):
    model, x = built(build), tokens()
    out = run(model, x)
    done = rotate_(model, x)
    assert difference(out, run(model, x)) < 1e-10
    for kind, reason in ALONE[build].items():
        assert all(r.kind is not kind for r in done.rotated), done
        reasons = [s.reason for s in done.skipped if s.kind is kind]
        assert reason is None or (reasons and all(reason in r for r in reasons)), reasons
    free = set(HeadKind) - set(ALONE[build])
    assert {r.kind for r in done.rotated} == free, done
    assert all(s.kind not in free for s in done.skipped), done
