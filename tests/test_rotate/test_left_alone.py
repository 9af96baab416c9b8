"""Every kind of attention that cannot be rotated is left alone, with the reason, and what can be is rotated."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmcpd.rotate import HeadKind, rotate_
from mmcpd.slim.compare import difference
from tests.helpers import TORCH_2_5
from tests.test_rotate.attentions import DIM, HEADS, WIDTH, Attention, Convolutions, built, plain, run, tokens


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


class LearnedQueries(Attention):
    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.ones(1, HEADS, 2, WIDTH))

    def forward(self, x):
        _, k, v = self.project(x)
        out = F.scaled_dot_product_attention(self.queries.expand(len(x), -1, -1, -1), k, v)
        return self.proj(out.transpose(1, 2).flatten(2))


class MaskOfValues(Attention):
    """The scores take up the values once more."""

    def forward(self, x):
        q, k, v = self.project(x)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=F.pad(v, (0, 2)))
        return self.proj(out.transpose(1, 2).flatten(2))


class LearnedPositions(Attention):
    """The same with a parameter (SAM, MViT)."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.ones(WIDTH, 6))

    forward = RelativePositions.forward


QK, VP = HeadKind.QUERY_KEY, HeadKind.VALUE_PROJECTION
ALONE = {
    Table: {QK: 'a sum'}, Rotary: {QK: 'a factor for each channel or position (rotary embeddings, a gate)'},
    Normed: {QK: 'a norm in norm'}, Cosine: {QK: 'a norm'}, Gated: {QK: 'a factor for each channel'},
    RelativePositions: {QK: 'it is multiplied with a tensor that no layer makes'},
    LearnedPositions: {QK: 'a product with a table or learned matrix'},
    Pooled: {QK: 'pooling', VP: 'pooling'}, Convolved: {VP: 'a grouped convolution in local'},
    BatchNormed: {VP: 'a norm in v.1'}, Activated: {QK: None}, ActivatedProjection: {VP: 'the operation relu'},
    Channels: {QK: 'their product sums over tokens', VP: None}, Grouped: {QK: 'used twice', VP: 'used twice'},
    SharedKeys: {QK: 'it is used twice'}, Returned: {VP: 'it is an output of the model'},
    Computed: {QK: 'a computed weight'}, LearnedQueries: {QK: 'a learned query, key or value'},
    MaskOfValues: {VP: 'it is added to scores'},
    Memory: {QK: 'a concatenation', VP: 'a concatenation'},
}  # fmt: skip


@pytest.mark.parametrize('build', [build for build in ALONE if TORCH_2_5 or build is not Grouped])
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
