"""The factor of an attention whose scale follows its width: into the query's rows, or into the call."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.slim import slim
from mmcpd.slim.call_sites import rewrites_of
from mmcpd.slim.compare import compare
from mmcpd.slim.trial import random_keep

HEADS, WIDTH, TOKENS = 2, 8, 7
sdpa = F.scaled_dot_product_attention


class Attention(nn.Module):
    """Two heads of eight; what a subclass makes of the queries is its `attend`."""

    def __init__(self) -> None:
        super().__init__()
        full = HEADS * WIDTH
        self.stem, self.q, self.k, self.v = nn.Linear(6, full), *(nn.Linear(full, full) for _ in range(3))
        self.qkv, self.proj = nn.Linear(full, 3 * full), nn.Linear(full, 5)
        self.norm = nn.LayerNorm(WIDTH)
        self.depthwise = nn.Conv1d(full, full, 3, padding=1, groups=full)
        self.table = nn.Parameter(torch.randn(TOKENS, WIDTH))
        self.table_by_head = nn.Parameter(torch.randn(HEADS, TOKENS, WIDTH))
        self.prefix = nn.Parameter(torch.randn(1, HEADS, 2, WIDTH))
        self.attention = sdpa

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        q, k, v = (self.split(layer(x)) for layer in (self.q, self.k, self.v))
        return self.proj(self.attend(x, q, k, v).transpose(1, 2).flatten(2))


class Plain(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)


class Twice(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v) + sdpa(self.split(self.q(x * 2)), k, v)


class Depthwise(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(self.split(self.depthwise(self.q(x).mT).mT), k, v)


class PooledTokens(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q.mean(2, keepdim=True), k, v)


class StrongestToken(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(self.split(self.q(x).amax(1, keepdim=True)), k, v)


class PooledByConvolution(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attention(F.avg_pool1d(q.flatten(0, 1).mT, 2).mT.unflatten(0, (-1, HEADS)), k, v)


class Prefix(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(torch.cat([self.prefix.expand(len(x), -1, -1, -1), q], 2), k, v)


class FirstTokenAside(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(torch.cat([q[:, :, :1], q[:, :, 1:] * 2], 2), k, v)


class Rotary(Attention):
    def turned(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        angle = torch.arange(TOKENS).to(x)[:, None]
        return torch.cat([left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1)

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(self.turned(q), self.turned(k), v, attn_mask=None, scale=None)


class ReadByATable(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, attn_mask=q @ self.table.mT)


class PackedReadByATable(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return sdpa(
            q,
            k,
            v,
            attn_mask=torch.einsum('bhqd,hkd->bhqk', q, self.table_by_head),
        )


class Normalised(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(self.norm(q), self.norm(k), v)


class UnitLength(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v)


class Bent(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(F.gelu(q), k, v)


class OwnKey(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, q, v)


class OwnValue(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, q)


class SecondAttentionWithItsOwnScale(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v) + sdpa(q, k, v, scale=0.5)


def helper(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q.mean(2, keepdim=True), k, v)


BY_NUMBER = [helper]  # a function that no method names


class InAHelper(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return helper(q, k, v)


class InATable(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return BY_NUMBER[0](q, k, v)


class BehindOptions(Attention):
    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options = {'scale': None}
        return sdpa(q.mean(2, keepdim=True), k, v, **options)


class OfTurnedTokens(Attention):
    """Their memory has another order, so that the bias of the queries is added by itself."""

    def attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(self.split(self.q(x.mT.contiguous().mT)), k, v)


FOLDED = (Plain, Twice, Depthwise, OfTurnedTokens)
FROZEN = (InATable, BehindOptions)
IN_THE_CALL = tuple(kind for kind in Attention.__subclasses__() if kind not in FOLDED + FROZEN)


def made(kind: type[Attention]) -> tuple[nn.Module, Tensor]:
    """Queries and keys are large, so that a wrong factor shows."""
    torch.manual_seed(0)
    model = kind().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model, torch.randn(2, TOKENS, 6, dtype=torch.float64)


@pytest.mark.parametrize('kind', FOLDED + IN_THE_CALL)
@pytest.mark.parametrize('share', (0.5, 0.8))
def test_a_narrower_query_keeps_the_scale_of_its_attention(kind: type[Attention], share: float) -> None:
    model, x = made(kind)
    coupling = comb(model, x, trial=False, unused='leave')
    keep = random_keep(coupling, share, 0, awkward=True)
    name = 'qkv' if kind is PackedReadByATable else 'q'
    assert not keep[name].all()
    assert compare(model, coupling, keep) < 1e-12
    assert not [
        frozen for frozen in comb(model, x, unused='leave').frozen if 'trial' in frozen.reason
    ]  # nor is one needed
    without = replace(coupling, fixes=replace(coupling.fixes, scales=(), constants=()))
    assert compare(model, without, keep) > 1e-3
    rewritten = any(rewrites_of(module) for module in slim(model, coupling, keep).modules())
    assert rewritten == (kind in IN_THE_CALL)


@pytest.mark.parametrize('kind', FROZEN)
def test_a_query_whose_scale_has_no_place_is_left_alone(kind: type[Attention]) -> None:
    model, x = made(kind)
    coupling = comb(model, x, trial=False, unused='leave')
    [reason] = {frozen.reason for frozen in coupling.frozen if frozen.tensor == 'q.weight' and 'scale' in frozen.reason}
    assert reason.startswith('an attention in the model itself divides by the square root of the width')
    assert compare(model, coupling, random_keep(coupling, 0.5, 0, awkward=True)) < 1e-12
