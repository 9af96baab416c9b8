"""Arguments that a call gives by name are read as those that it gives by number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.exact import exact
from tests.helpers import sample

WIDTH, HEADS = 12, 3


class Tokens(nn.Module):
    """A linear layer on tokens, something with sizes in it, and a classifier of their mean."""

    def __init__(self, function, out: int = WIDTH):
        super().__init__()
        self.width, self.half, self.function = WIDTH, WIDTH // 2, function
        self.stem, self.fc = nn.Linear(3, WIDTH), nn.Linear(out, 2)
        self.norm = nn.LayerNorm(WIDTH)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.deep = nn.ConvTranspose1d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.function(self, self.stem(x).tanh()).mean(1))


def glued(parts) -> Tensor:
    first, second = parts
    return first * second


HALF = WIDTH // 2
CALLS = {
    'chunk': (lambda m, x: glued(torch.chunk(input=x, chunks=2, dim=-1)), HALF, HALF),
    'chunk in another order': (lambda m, x: glued(torch.chunk(dim=-1, input=x, chunks=2)), HALF, HALF),
    'tensor_split into sections': (lambda m, x: glued(torch.tensor_split(x, sections=2, dim=-1)), HALF, HALF),
    'tensor_split of tokens': (
        lambda m, x: torch.cat(torch.tensor_split(x, indices=(1,), dim=1)[::-1], 1).cumsum(1), WIDTH, WIDTH
    ),
    'split of torch': (
        lambda m, x: glued(torch.split(tensor=x, split_size_or_sections=m.half, dim=-1)), HALF, HALF
    ),
    'split into a list': (
        lambda m, x: glued(torch.split(x, split_size_or_sections=[m.half, m.half], dim=-1)), HALF, HALF
    ),
    'split of a tensor': (lambda m, x: glued(x.split(split_size=m.half, dim=-1)), HALF, HALF),
    'split_with_sizes': (lambda m, x: glued(x.split_with_sizes(split_sizes=[m.half, m.half], dim=-1)), HALF, HALF),
    'narrow': (
        lambda m, x: torch.narrow(input=x, dim=-1, start=0, length=m.half) * x.narrow(-1, start=m.half, length=m.half),
        HALF, HALF,
    ),
    'reshape': (
        lambda m, x: torch.reshape(input=x, shape=(len(x) * x.shape[1], m.width)).reshape(x.shape), WIDTH, WIDTH
    ),
    'unflatten': (
        lambda m, x: torch.unflatten(input=x, dim=-1, sizes=(HEADS, m.width // HEADS)).flatten(2), WIDTH, WIDTH // HEADS
    ),
    'layer_norm': (
        lambda m, x: F.layer_norm(input=x, normalized_shape=(m.width,), weight=m.norm.weight, bias=m.norm.bias),
        WIDTH, WIDTH,
    ),
    'a depthwise convolution': (
        lambda m, x: F.conv1d(
            input=x.mT, weight=m.depthwise.weight, bias=m.depthwise.bias, padding=1, groups=m.depthwise.groups
        ).mT,
        WIDTH, WIDTH,
    ),
    'a depthwise transposed convolution': (
        lambda m, x: F.conv_transpose1d(input=x.mT, weight=m.deep.weight, groups=m.width, padding=1).mT, WIDTH, WIDTH
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', CALLS)
def test_sizes_that_are_keywords(name):
    function, out, units = CALLS[name]
    exact(Tokens(function, out).double(), sample((2, 5, 3)), {'stem': units})


class Attention(nn.Module):
    """An attention whose query, key and value are keywords; its scale is that of its width."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, WIDTH) for _ in range(3))
        self.fc = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(query=q, value=v, key=k, dropout_p=0.0)
        return self.fc(out.transpose(1, 2).flatten(2))


def test_an_attention_by_keywords_keeps_its_scale():
    found = exact(Attention().double(), sample((2, 5, 3)), {'q': WIDTH // HEADS, 'v': WIDTH // HEADS})
    assert found.fixes.scales or found.fixes.constants
