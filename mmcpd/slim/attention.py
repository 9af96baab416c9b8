"""Modules that cannot be slimmed by setting attributes, and what takes their place.

`nn.MultiheadAttention` has one width for its embedding and for its heads together; after pruning these differ. The
replacement has the same parameters under the same names, so state dicts fit. A row in `REPLACEMENTS` is all it takes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SlimMultiheadAttention(nn.Module):
    """Self- or cross-attention whose heads are narrower than its embedding; values and queries may differ.

    Args:
        source: the attention to take over; parameters, dropout and `batch_first` are its own.
        num_heads: number of kept heads; all by default.
        scale: factor on q k^T, that of the dense module.

    Shapes: query `(B, L, E)`, key and value `(B, S, E)` with `batch_first`, else `(L, B, E)` and `(S, B, E)`.
    """

    _qkv_same_embed_dim = False  # read by torch's encoder, whose fused kernel knows one width only

    def __init__(self, source: nn.MultiheadAttention, num_heads: int | None = None, scale: float | None = None) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads or source.num_heads, scale or source.head_dim**-0.5
        self.dropout, self.batch_first = source.dropout, source.batch_first
        self.in_proj_weight, self.in_proj_bias = source.in_proj_weight, source.in_proj_bias
        self.q_proj_weight, self.k_proj_weight = source.q_proj_weight, source.k_proj_weight
        self.v_proj_weight, self.add_zero_attn = source.v_proj_weight, source.add_zero_attn
        self.bias_k, self.bias_v = source.bias_k, source.bias_v
        self.out_proj = nn.utils.skip_init(nn.Linear, 1, 1, bias=source.out_proj.bias is not None)
        self.out_proj.weight, self.out_proj.bias = source.out_proj.weight, source.out_proj.bias
        self.out_proj.out_features, self.out_proj.in_features = source.out_proj.weight.shape
        self.train(source.training)

    @property
    def embed_dim(self) -> int:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        return int(weight.shape[1])

    def arguments(self) -> dict[str, Any]:
        """Return what the class needs beside the source, in plain types."""
        return {'num_heads': self.num_heads, 'scale': self.scale}

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention` does, with its arguments and results."""
        if query.dim() == 2:  # one sequence, (L, E)
            batch = 0 if self.batch_first else 1
            query, key, value = (t.unsqueeze(batch) for t in (query, key, value))
            padding = None if key_padding_mask is None else key_padding_mask[None]
            mean = average_attn_weights
            out, probabilities = self.forward(query, key, value, padding, need_weights, attn_mask, mean, is_causal)
            return out.squeeze(batch), probabilities if probabilities is None else probabilities[0]
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._project(query, key, value)
        more = k.shape[2] - key.shape[1]  # positions that the module adds, which no mask hides
        attn_mask, key_padding_mask = (m if m is None else F.pad(m, (0, more)) for m in (attn_mask, key_padding_mask))
        mask = merge_masks(attn_mask, key_padding_mask, q, self.num_heads)
        probabilities = None
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.scale  # (B, heads, L, S)
            probabilities = (logits if mask is None else logits + mask).softmax(-1)
            out = F.dropout(probabilities, self.dropout, self.training) @ v
            probabilities = probabilities.mean(1) if average_attn_weights else probabilities
        else:
            dropout = self.dropout if self.training else 0.0
            causal = is_causal and mask is None
            scale: float | None = self.scale
            if torch.onnx.is_in_onnx_export():  # torch 2.4 cannot export a scale of its own
                q, scale = q * (self.scale * int(q.shape[-1]) ** 0.5), None
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), probabilities

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return queries, keys and values, (B, heads, L, d), with the positions that the module adds."""
        v_rows = self.out_proj.weight.shape[1]
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        packed = weights[0] is None
        qk_rows = (self.in_proj_weight.shape[0] - v_rows) // 2 if packed else weights[0].shape[0]
        rows = [qk_rows, qk_rows, v_rows]
        weights = self.in_proj_weight.split(rows) if packed else weights
        biases = self.in_proj_bias.split(rows) if self.in_proj_bias is not None else (None, None, None)
        found: list[Tensor] = []
        for x, weight, bias, last in zip(
            (query, key, value), weights, biases, (None, self.bias_k, self.bias_v), strict=True
        ):
            x = F.linear(x, weight, bias)
            x = x if last is None else torch.cat([x, last.expand(len(x), -1, -1)], 1)
            x = F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn and found else x
            found.append(x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        return found


def merge_masks(mask: Tensor | None, padding: Tensor | None, like: Tensor, heads: int) -> Tensor | None:
    """Add an attention mask (L, S) or (B * heads, L, S) and a padding mask (B, S) as numbers to add to the logits."""
    if mask is not None and mask.dim() == 3:
        mask = mask.unflatten(0, (-1, heads))
    if padding is not None:
        padding = padding[:, None, None, :]
    parts = [
        like.new_zeros(part.shape).masked_fill(part, float('-inf')) if part.dtype == torch.bool else part
        for part in (mask, padding)
        if part is not None
    ]
    return reduce(torch.add, parts) if parts else None


class Replacement(NamedTuple):
    """What is replaced, and by what."""

    source: Callable[[nn.Module], bool]
    kind: type[nn.Module]


REPLACEMENTS = {
    'MultiheadAttention': Replacement(
        lambda m: type(m) is nn.MultiheadAttention,
        SlimMultiheadAttention,
    )
}


def replacement(module: nn.Module) -> str | None:
    """Return the kind of replacement that a module needs, or None."""
    return next((name for name, r in REPLACEMENTS.items() if r.source(module)), None)
