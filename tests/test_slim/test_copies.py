"""Copies of models on which a training forward left something."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from mmcpd.comb import comb
from mmcpd.coupling import Coupling
from mmcpd.slim import mask_, slim
from mmcpd.slim.compare import compare
from mmcpd.slim.copying import copied, writable_
from mmcpd.slim.trial import random_keep
from mmcpd.slim.weights import set_weights_, weights

EXACT = 1e-12
Images = Tensor


class Net(nn.Module):
    """Two convolutions and a linear layer; a forward of a subclass leaves something behind."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.between(self.b(self.a(x).relu())).mean((2, 3)))

    def between(self, x: Tensor) -> Tensor:
        return x


class KeepsItsMaps(Net):
    """Stores a tensor, nested tensors, and one on an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.log = type('Log', (), {})()
        self.maps: dict[str, Any] = {}

    def between(self, x: Tensor) -> Tensor:
        self.last, self.maps['pair'], self.log.seen = x, (x.relu(), [x]), x * 2
        return x


class TableOfItsSize(Net):
    """Makes a table at the first forward of a size, and notes the size."""

    table: Tensor | None = None
    size: tuple[int, ...] | None = None

    def between(self, x: Tensor) -> Tensor:
        if self.size != tuple(x.shape[2:]):
            self.table, self.size = torch.ones_like(x[:1]).cumsum(-1), tuple(x.shape[2:])
        return x * self.table


class TablesBySize(Net):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[tuple[int, ...], Tensor] = {}

    def between(self, x: Tensor) -> Tensor:
        key = tuple(map(int, x.shape[2:]))
        if key not in self.tables:
            self.tables[key] = torch.ones_like(x[:1]).cumsum(-1)
        return x * self.tables[key]


class MissingAtFirst(Net):
    def between(self, x: Tensor) -> Tensor:
        if not hasattr(self, 'table'):
            self.table = torch.full_like(x[:1], 2)
        return x * self.table


class State(Net):
    """Reads what its last forward left: that is no cache."""

    def __init__(self) -> None:
        super().__init__()
        self.level = torch.zeros(())

    def between(self, x: Tensor) -> Tensor:
        self.level = self.level * 0.5 + x.detach().new_ones(()) + self.fc.bias.mean() * 0
        return x + self.level.detach() * 0 + 0


class Constant(Net):
    """Holds a plain tensor from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def between(self, x: Tensor) -> Tensor:
        return x * self.weights[0] + x * self.weights[1]


def pruned_by_torch() -> nn.Module:
    model = Net()
    prune.l1_unstructured(model.b, 'weight', 0.3)
    prune.random_unstructured(model.fc, 'bias', 0.5)
    return model


def normed(norm: Any) -> nn.Module:
    model = Net()
    norm(model.b)
    return model


KINDS: dict[str, Any] = {
    'maps': KeepsItsMaps,
    'a table of its size': TableOfItsSize,
    'tables by size': TablesBySize,
    'missing at first': MissingAtFirst,
    'state': State,
    'constant': Constant,
    'pruned by torch': pruned_by_torch,
    'weight norm': lambda: normed(weight_norm),
    'spectral norm': lambda: normed(spectral_norm),
    'parametrized': lambda: normed(parametrizations.weight_norm),
}


def built(kind: str) -> tuple[nn.Module, Images]:
    torch.manual_seed(0)
    model: nn.Module = KINDS[kind]()
    return model.double(), torch.randn(2, 3, 9, 9, dtype=torch.float64)


def train_(model: nn.Module, x: Tensor, steps: int = 2) -> None:
    """Train as anybody does; the last forward leaves its graph on the model."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(x), torch.tensor([0, 1])).backward()
        optimizer.step()
    model.train()(x)


def gap(model: nn.Module, coupling: Coupling) -> float:
    return max(compare(model, coupling, random_keep(coupling, ratio, 3)) for ratio in (0.5, 0.8))


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('trained_before', [False, True])
def test_slim_after_training_forwards(kind: str, trained_before: bool) -> None:
    model, x = built(kind)
    if trained_before:
        train_(model, x)
    coupling = comb(model, x)
    constant = trained_before and kind in ('a table of its size', 'tables by size', 'missing at first')
    if 'norm' not in kind and kind != 'parametrized':
        assert {group.name for group in coupling.groups} == set('a' if constant else 'ab'), str(coupling)
    train_(model, x)
    assert gap(model, coupling) < EXACT
    keep = random_keep(coupling, 0.5, 3)
    small = slim(model, coupling, keep)
    wrong = {name: kept.roll(1) for name, kept in keep.items()}
    assert not coupling.groups or compare(model, coupling, wrong, small) > 1e-6
    for _ in range(2):
        small.train()(x).sum().backward()  # it trains
    copied(small)


def test_a_copy_is_one_of_its_own() -> None:
    model, x = built('maps')
    train_(model, x)
    with pytest.raises(RuntimeError, match='graph leaves'):
        copy.deepcopy(model)
    twin: Any = copied(model)
    assert torch.equal(twin.last, model.last) and twin.last is not model.last and twin.last.is_leaf
    assert torch.equal(twin.maps['pair'][0], model.maps['pair'][0]) and twin.log.seen.is_leaf
    assert twin.maps['pair'][1][0] is twin.last  # one tensor stays one
    assert not model.last.is_leaf


@pytest.mark.parametrize('kind', ['maps', 'a table of its size', 'tables by size', 'missing at first'])
def test_a_cache_is_not_in_the_slim_model_and_combing_leaves_none(kind: str) -> None:
    model, x = built(kind)
    before = [dict(vars(module)) for module in model.modules()]
    coupling = comb(model, x)
    assert [dict(vars(module)) for module in model.modules()] == before
    assert coupling.caches
    assert not getattr(model, 'tables', None) and not getattr(model, 'maps', None)
    train_(model, x)
    small = slim(model, coupling, random_keep(coupling, 0.5, 0))
    for name in ('last', 'table', 'size'):
        assert getattr(small, name, None) is None
    assert not getattr(small, 'tables', None) and not getattr(small, 'maps', None)
    assert hasattr(model, 'last') or hasattr(model, 'table') or model.tables  # of the model itself nothing is taken


def test_constants_and_state_stay() -> None:
    for kind, name in (('constant', 'weights'), ('state', 'level')):
        model, x = built(kind)
        coupling = comb(model, x)
        train_(model, x)
        coupling = coupling if kind == 'constant' else comb(model, x)
        small = slim(model, coupling, random_keep(coupling, 0.5, 0))
        assert torch.equal(getattr(small, name), getattr(model, name))


def test_torchs_own_prune_is_made_permanent_in_the_slim_model() -> None:
    model, x = built('pruned by torch')
    train_(model, x)
    coupling = comb(model, x)
    small: Any = slim(model, coupling, random_keep(coupling, 0.5, 0))
    assert small.b.weight.shape == small.b.weight_orig.shape == small.b.weight_mask.shape
    out = small.eval()(x)
    prune.remove(small.b, 'weight')
    assert torch.equal(small.eval()(x), out) and (small.b.weight == 0).any()


# -- expanded buffers --------------------------------------------------------------------------------------------------
class Expanded(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('scale', torch.full((1, 1, 1), 2.0).expand(12, 1, 1))
        self.register_buffer('shift', torch.zeros(1, 1, 1, 1).expand(1, 12, 1, 1), persistent=False)
        self.factor = nn.Parameter(torch.ones(1).expand(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x) * self.factor[:, None, None]) * self.scale + self.shift
        return self.fc(x.mean((2, 3)))


class ExpandedNorm(Net):
    """A batch norm whose statistics were expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(12)
        self.bn.running_mean = torch.full((1,), 0.3).expand(12)
        self.bn.running_var = torch.full((1,), 1.5).expand(12)

    def between(self, x: Tensor) -> Tensor:
        return self.bn(x)


class ExpandedAgain(Net):
    """Expands its buffer anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('scale', torch.ones(12, 1, 1))

    def between(self, x: Tensor) -> Tensor:
        self.scale = torch.full_like(x[:1, :1, :1, :1], 2.0)[0].expand(self.b.weight.shape[0], 1, 1)
        return x * self.scale


@pytest.mark.parametrize('kind', [Expanded, ExpandedNorm, ExpandedAgain])
def test_expanded_tensors_are_masked_and_slimmed(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        model, x = kind().eval(), torch.randn(2, 3, 9, 9)
    finally:
        torch.set_default_dtype(torch.float32)
    if kind is not ExpandedAgain:
        expanded = [t for t in (*model.buffers(), *model.parameters()) if t.numel() > 1 and 0 in t.stride()]
        with pytest.raises(RuntimeError, match='single memory location'):
            expanded[0].data.add_(1)  # what torch says about them
    coupling = comb(model, x)
    assert {g.name for g in coupling.groups} >= {'a'}
    assert gap(model, coupling) < EXACT
    keep = random_keep(coupling, 0.5, 1)
    small, dense = slim(model, coupling, keep), model(x).detach()
    for _ in range(2):  # again after a forward, which may expand anew
        mask_(model, coupling, keep)
        expected, masked = small(x).detach(), model(x).detach()
        assert float((masked - expected).abs().max()) < EXACT * float(expected.abs().max())
        assert float((dense - expected).abs().max()) > 1e-6


def test_weights_are_written_into_expanded_buffers() -> None:
    model, other = Expanded(), Expanded()
    values = {name: torch.rand(value.shape) for name, value in weights(other).items()}
    set_weights_(model, values)
    assert all(torch.equal(value, values[name]) for name, value in weights(model).items())


def test_an_expanded_tensor_stays_the_same_object() -> None:
    tensor = torch.zeros(1, 1).expand(3, 4)
    assert writable_(tensor) is tensor and tensor.is_contiguous()
    tensor[0] = 1
    assert tensor.sum() == 4
    plain = torch.zeros(3, 1)
    assert writable_(plain).data_ptr() == plain.data_ptr()
