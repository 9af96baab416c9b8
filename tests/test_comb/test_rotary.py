"""Rotary embeddings: channels turn in pairs, which stay or go together; their tables follow, or freeze by name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmcpd.comb import comb
from mmcpd.comb.renewed import renewed_by
from tests.exact import exact
from tests.helpers import check_equal, randomise_, sample

HEADS, WIDTH, TOKENS = 3, 8, 5


def angles(tokens: int, width: int = WIDTH) -> Tensor:
    return torch.arange(tokens)[:, None] / 10 ** (torch.arange(0, width, 2) / width)


class Attention(nn.Module):
    """An attention whose queries and keys are turned by a table (tokens, width) of cosines and one of sines."""

    def __init__(self):
        super().__init__()
        self.fc, self.qkv, self.proj = nn.Linear(3, 16), nn.Linear(16, 3 * HEADS * WIDTH), nn.Linear(HEADS * WIDTH, 4)
        table = angles(TOKENS).repeat_interleave(2, 1)
        self.register_buffer('cos', table.cos())
        self.register_buffer('sin', table.sin())

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.qkv(self.fc(x).tanh()).reshape(batch, tokens, 3, HEADS, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, -1))

    def turned(self, x: Tensor) -> Tensor:
        even, odd = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        return x * self.cos + torch.stack((-odd, even), -1).reshape(x.shape) * self.sin


class Unflattened(Attention):
    def turned(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return x * self.cos + torch.stack((-odd, even), -1).flatten(-2) * self.sin


class BySlices(Attention):
    def turned(self, x: Tensor) -> Tensor:
        return x * self.cos + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * self.sin


class ByHalves(Attention):
    def turned(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, -1)
        return x * self.cos + torch.cat((-right, left), -1) * self.sin


class AsComplexNumbers(Attention):
    def turned(self, x: Tensor) -> Tensor:
        turn = torch.complex(self.cos[:, ::2], self.sin[:, ::2])
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


class OfOneAngle(Attention):
    """The same angle for all pairs: no table is as wide as they are."""

    def turned(self, x: Tensor) -> Tensor:
        turn = torch.polar(torch.ones(TOKENS, 1).to(x), torch.arange(TOKENS)[:, None].to(x))
        return torch.view_as_real(torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * turn).flatten(-2)


@pytest.mark.parametrize('kind', [Attention, Unflattened, BySlices, ByHalves, AsComplexNumbers, OfOneAngle])
def test_pairs_of_channels_stay_or_go_together(kind):
    exact(kind().double(), sample((2, TOKENS, 3)), {'fc': 16, 'qkv': WIDTH // 2})


class Renewed(Attention):
    """The tables are made anew where there are more tokens than they are for."""

    def turned(self, x: Tensor) -> Tensor:
        if x.shape[2] != len(self.cos):
            self.fill(x.shape[2])
        return super().turned(x)

    def fill(self, tokens: int) -> None:
        table = angles(tokens).repeat_interleave(2, 1).to(self.cos)
        self.register_buffer('cos', table.cos())
        self.sin = table.sin()


def test_a_table_that_another_size_makes_anew_freezes_what_it_turns():
    model = randomise_(Renewed())
    found = comb(model, sample((2, TOKENS, 3)))
    assert [g.name for g in found.groups] == ['fc']
    reason = next(f.reason for f in found.frozen if f.tensor == 'qkv.weight')
    assert reason.startswith('Renewed.fill makes it anew for another size of the input')
    assert "unused='leave'" in reason
    check_equal(model, found)
    model(sample((2, TOKENS + 1, 3)))  # and it is still the model's


def test_where_the_size_never_changes_it_is_pruned():
    exact(Renewed().double(), sample((2, TOKENS, 3)), {'fc': 16, 'qkv': WIDTH // 2})


class Typed(Attention):
    """The same, with an annotation, and of the type and on the device of the table before."""

    def turned(self, x: Tensor) -> Tensor:
        if x.shape[2] != len(self.cos):
            table = angles(x.shape[2]).repeat_interleave(2, 1)
            self.cos: Tensor = table.cos().to(self.cos.device, dtype=self.cos.dtype)
            self.sin = table.sin().type_as(self.sin)
        return super().turned(x)


def test_of_which_type_a_table_was_says_nothing_of_its_width():
    assert renewed_by(Typed) == {'cos': 'Typed.turned', 'sin': 'Typed.turned'}
    assert [g.name for g in comb(randomise_(Typed()), sample((2, TOKENS, 3))).groups] == ['fc']


class Averaging(nn.Module):
    """A running average, which follows the widths as the layers do, and a count."""

    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer('mean', torch.zeros(8))
        self.register_buffer('shift', torch.zeros(8))
        self.seen = torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.training:
            old = self.mean
            new = 0.9 * old + 0.1 * x.mean((0, 1))
            self.mean = new
            self.register_buffer('shift', self.shift * 0.5)
            self.seen += 1
        return self.fc(x - self.mean - self.shift)


def test_what_is_computed_from_its_own_value_is_not_made_anew():
    assert renewed_by(Averaging) == {}
    exact(Averaging().double(), sample((2, 4, 3)), {'stem': 8})


def test_methods_that_call_each_other_and_code_that_cannot_be_read_end():
    class Both(nn.Module):
        def forward(self, x):
            return self.again(x)

        def again(self, x):
            self.left, (self.right, self.rest[0]) = x, (x, x)
            return self.forward(x) if x.numel() < 0 else len(x)

    assert renewed_by(Both) == {'left': 'Both.again', 'right': 'Both.again'}
    assert renewed_by(nn.Conv2d) == {}
    namespace: dict[str, object] = {'Module': nn.Module}
    exec('class Typed(Module):\n    def forward(self, x):\n        self.x = x', namespace)
    assert renewed_by(namespace['Typed']) == {}


class Grandparent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if len(self.table) < x.shape[1]:
            self.table = self.made(x.shape[1])
        return self.fc(self.stem(x) + self.table[: x.shape[1]])


class Parent(Grandparent):
    def __init__(self):
        super().__init__()
        self.stem, self.fc = nn.Linear(3, 8), nn.Linear(8, 2)
        self.register_buffer('table', torch.randn(TOKENS, 8, generator=torch.Generator().manual_seed(0)))

    def made(self, tokens: int) -> Tensor:
        return torch.zeros(tokens, 8)


class Child(Parent):
    """It changes what happens before, as subclasses of positions do, and leaves the rest to its parents."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class Elsewhere(Parent):
    """A method of the same name that its parent's forward never reaches."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.stem(x) + self.table)


def test_what_the_forward_of_a_parent_makes_anew_is_found():
    assert renewed_by(Child) == {'table': 'Grandparent.forward'}
    assert renewed_by(Elsewhere) == {}
    assert comb(randomise_(Child()), sample((2, TOKENS, 3))).groups == ()
    exact(Elsewhere().double(), sample((2, TOKENS, 3)), {'stem': 8})
